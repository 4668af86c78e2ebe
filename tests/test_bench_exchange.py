"""The benchmark of the exchange runs, on tiny sizes, and its rows hold what they promise."""

import json

import pytest

from scripts import bench_exchange
from scripts.bench_exchange_rows import Overlap, Row, cases


def test_runs(ranks, tmp_path, capsys):
    file = tmp_path / "exchange.json"
    assert bench_exchange.main(["--cpu", "--bars", "--repeats", "1", "--json", str(file)], ranks) == 0
    assert "Bits: equal" in capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["measured"]
    assert {"hardware", "versions", "settings", "limits"} <= set(document)
    rows = document["rows"]
    assert [row["part"] for row in rows] == ["place"] * 8 + ["reduce"] * 12 + ["control"] * 8
    for row in rows:
        assert row["us"] > 0
        assert row["bar_us"] is row["bound_us"] is None
        checked = row["part"] == "place" or row["method"] in ("kernel", "gather_loads")
        assert row["equal"] is (True if checked else None)
    assert len(document["overlaps"]) == 6


@pytest.mark.parametrize("size", [2, 4])
def test_cases(size):
    assert [case.busiest for case in cases("place", size)] == [1, 2, 3, 1]
    assert [case.busiest for case in cases("reduce", size)] == ([1, 2, 1] if size == 2 else [1, 2, 3, 1])
    for case in cases("place", size) + cases("reduce", size):
        assert all(home != rank for home, _, rank, _ in case.moves)
    spread = cases("place", size)[2]
    assert len({rank for _, _, rank, _ in spread.moves}) == (1 if size == 2 else 3)


def test_verdict(capsys):
    kept = Row("place", "a", "kernel", 105.0, bar_us=105.0, equal=True)
    missed = Row("place", "b", "kernel", 106.0, bar_us=105.0, equal=True)
    wrong = Row("reduce", "c", "kernel", 1.0, equal=False)
    assert bench_exchange.verdict([kept], bars=True) == 0
    assert bench_exchange.verdict([kept, missed], bars=False) == 0
    assert bench_exchange.verdict([kept, missed], bars=True) == 1
    assert bench_exchange.verdict([wrong], bars=False) == 1
    assert "c, , kernel: bits are wrong" in capsys.readouterr().out


def test_overlap():
    hidden = Overlap(
        "reduce", "a", "fp32", 24, gemm_us=1000.0, exchange_us=200.0, gemm_beside_us=1000.0, both_us=1000.0
    )
    assert (hidden.slowdown, hidden.efficiency) == (1.0, 1.0)
    after = Overlap("reduce", "a", "fp32", 24, gemm_us=1000.0, exchange_us=200.0, gemm_beside_us=1200.0, both_us=1200.0)
    assert (after.slowdown, after.efficiency) == (1.2, 0.0)
