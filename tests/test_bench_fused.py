"""The benchmark of fused schedules runs, emulated and on tiny models, and its rows hold what they promise."""

import json

import pytest

from scripts import bench_fused
from scripts.bench_fused_rank import METHODS, Row, placement


@pytest.mark.parametrize(
    "how",
    [["--sleep", "1"], pytest.param(["--hidden", "64", "--rows", "16"], marks=pytest.mark.slow)],
    ids=["sleep", "models"],
)
def test_runs(ranks, tmp_path, how, capsys):
    file = tmp_path / "fused.json"
    short = ["--ranks", "2", "--repetitions", "1", "--solve-seconds", "0.2", "--cases", "equal,half,reference"]
    assert bench_fused.main([*how, *short, "--json", str(file)], ranks) == 0
    document = json.loads(file.read_text())
    assert document["measured"] is (how[0] != "--sleep")
    assert ("EMULATED" in document["where"]) is (how[0] == "--sleep")
    assert {"hardware", "versions", "settings"} <= set(document)
    rows = document["rows"]
    assert [(row["case"], row["method"]) for row in rows] == [
        (case, method) for case in ("equal", "half", "reference") for method in METHODS
    ]
    for row in rows:
        assert row["ms"] > 0
        assert row["predicted"] >= row["bound"] * (1 - 1e-4)
        assert row["of_predicted"] == pytest.approx(row["ms"] / row["predicted"], rel=1e-2)
    assert "speed-up" in capsys.readouterr().out


def test_placement():
    assert placement(4, 4) == ((3, 2, 1, 0),)
    assert placement(2, 4) == ((1, 0), (3, 2))
    assert placement(1, 2) == ((0,), (1,))


def test_bars():
    def row(method, ms):
        return Row("equal", method, ms, ms, ms, 1.0, 100.0, 100.0, 90.0, 0.1, None)

    assert bench_fused.missed([row("fused", 109.0), row("serial", 300.0)]) == []
    assert bench_fused.missed([row("fused", 111.0)]) == ["equal: measured 111.00 ms, predicted 100.00 ms (1.110)"]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SystemExit, match="at least 2 nodes of 2 ranks, got 2 ranks"):
        bench_fused.main(["--ranks", "2", "--ep", "2"])
    with pytest.raises(SystemExit, match="expected cases among"):
        bench_fused.cases(4, "equal,other", 8)
