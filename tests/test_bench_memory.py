"""The memory benchmark's path on CPUs: parts that are counted exactly are those of really built models."""

import json

import pytest

from scripts import bench_memory
from scripts.bench_memory import CASES, EXACT, Case, Row, architecture_of, planned, row_of


def test_on_cpus(ranks, tmp_path, capsys):
    names = ["EP 2, 2 slots", "PP 2, VPP 2, recompute full", "EP 2, recompute moe_act, layernorm"]
    file = tmp_path / "memory.json"
    assert bench_memory.main(["--cpu", "--cases", *names, "--json", str(file)], ranks) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"]["name"] for row in rows] == [case.name for case in CASES if case.name in names]
    for row in rows:
        assert row["off"] is None
        for part in ("parameters", "gradients", "slots"):
            assert row["measured"][part] == row["planned"][part]
        assert row["measured"]["optimizer"] == pytest.approx(row["planned"]["optimizer"], rel=0.02)
    assert next(row for row in rows if "slots" in row["case"]["name"])["measured"]["slots"] > 0
    assert "bar kept" in capsys.readouterr().out


def test_names_are_unique_and_layouts_fit():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        layers = architecture_of(case).layers
        assert layers % (case.parallel.get("pp", 1) * case.parallel.get("vpp", 1)) == 0
        assert planned(case, 2, staged=False, stage=0)["total"] < 75 * 2**30, f"{case.name} is for GPUs of 80 GB"


@pytest.mark.parametrize(("total", "kept"), [(100, True), (91, True), (89, False), (112, False)])
def test_bar(total, kept):
    exact = dict.fromkeys(EXACT, 1)
    row = Row(Case("c", 1), exact | {"total": 100}, exact | {"total": total})
    assert row.kept is kept


def test_a_miscount_misses_the_bar_on_cpus():
    exact = dict.fromkeys(EXACT, 1000)
    assert not Row(Case("c", 1), exact, exact | {"gradients": 1100}).kept


def test_the_fullest_rank_is_shown():
    ranks = [{"planned": {"total": 1}, "measured": {"total": total}} for total in (5, 9, 7)]
    assert row_of(Case("c", 3), ranks).measured["total"] == 9
