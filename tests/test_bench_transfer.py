"""The benchmark of weight transfers between pairs of processes that share a device runs, and bits arrive."""

import json

import pytest

from scripts import bench_transfer


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_staged(tmp_path):
    file = tmp_path / "staged.json"
    given = ["--staged", "--gib", "0.02", "--pairs", "2", "--buckets", "1", "--repeats", "1", "--json", str(file)]
    assert bench_transfer.main(given) == 0
    document = json.loads(file.read_text())
    assert document["measured"]
    assert document["settings"]["NCCL_NVLS_ENABLE"] == "0"
    rows = [(row["what"], row["variant"]) for row in document["rows"]]
    assert rows == [
        ("link", "broadcast"),
        ("link", "copy within a device"),
        ("signal", "page"),
        ("signal", "store"),
        ("staged", "1 MiB"),
        ("staged", "64 MiB, tiny model"),
    ]
    for row in document["rows"]:
        assert row["layout"] == "2+2"
        assert row["ms"] > 0
        assert row["equal"] is (True if row["what"] == "staged" else None)
