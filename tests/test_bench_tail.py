"""The benchmark of the tail runs, on a small part, and its rows are what they say."""

import json

import pytest

from rl.simulation.threshold import FRACTIONS
from scripts import bench_tail


def test_simulated(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_tail, "LAWS", (bench_tail.LAWS[1], bench_tail.LAWS[-1]))
    monkeypatch.setattr(bench_tail, "SHARES", (0.1, 0.6))
    file = tmp_path / "tail.json"
    assert bench_tail.main(["--engines", "4", "--seeds", "2", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    rows = document["simulated"]
    assert document["real"] is None
    assert len(rows) == 2 * 2 * 2 * len(FRACTIONS)
    for row in rows:
        assert row["speedup_worst"] <= row["speedup"] <= row["bound"] + 1e-9
        assert row["generated"] <= row["seconds"]
        if row["fraction"] == 0 or row["sigma"] == 0:
            assert row["speedup"] == pytest.approx(1)
    assert max(row["speedup"] for row in rows if row["inference"] == 0.6) > 1.2
    printed = capsys.readouterr().out
    assert "Simulated, with engine latencies measured in" in printed
    assert "Where gathering does not win" in printed
    assert "at no R_t" in printed
