"""The benchmark of foresight runs, on a small part, and its rows hold what they promise."""

import json

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import PlanSettings
from megatron_ultraep.plan.foresight import solve_step
from megatron_ultraep.replay.trace import RoutingTrace, TraceSample
from scripts import bench_foresight


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_foresight, "LAYERS", 1)
    monkeypatch.setattr(bench_foresight, "MICROBATCHES", 4)
    monkeypatch.setattr(bench_foresight, "REPEATS", 1)


def test_simulated(small, tmp_path, capsys):
    file = tmp_path / "foresight.json"
    given = ["--seeds", "1", "--kappas", "2000", "inf", "--imbalances", "1.5", "--layers", "2", "--json", str(file)]
    bench_foresight.main([*given, "--bars"])  # the time of planning is another matter on a busy machine
    document = json.loads(file.read_text())
    assert document["simulated"]
    assert not [text for text in document["missed"] if "planning takes" not in text]
    assert document["planning"]["layers"] == 2
    rows = document["rows"]
    assert [row["method"] for row in rows] == list(bench_foresight.METHODS) * 4
    assert {(row["case"], row["kappa"]) for row in rows} == {
        (case, kappa) for case in ("clustered", "shuffled") for kappa in (2000.0, "inf")
    }
    for row in rows:
        assert row["after"] >= row["bound"] >= 1.0
        assert row["min_replica_tokens"] >= row["floor"] or row["method"] == "ultraep"
        if row["method"] == "ours":
            assert row["over_bound_worst"] <= 1.01
            assert row["after"] <= 1.03
            assert row["moved_gib"] > 0
            assert len(row["bound_of_microbatch"]) == 4
        if row["method"] in ("none", "ultraep", "replicas"):
            assert row["moved_experts"] == 0
    assert "Where reordering does not help" in capsys.readouterr().out


def test_recorded_routes(tmp_path, capsys):
    """Hot experts in one node."""
    rng = np.random.default_rng(0)
    weights = np.r_[np.full(4, 8.0), np.ones(12)]
    samples = tuple(
        TraceSample(f"s{i}", np.argsort(-weights * rng.random((60, 2, 16)), axis=2)[:, :, :2].astype(np.uint8))
        for i in range(32)
    )
    RoutingTrace(16, 2, 2, samples).save(tmp_path / "routes")
    file = tmp_path / "trace.json"
    given = ["--trace", str(tmp_path / "routes"), "--ranks", "4", "--node-size", "2", "--json", str(file)]
    assert bench_foresight.main(given) == 0
    document = json.loads(file.read_text())
    assert not document["simulated"]
    by_method = {row["method"]: row for row in document["rows"]}
    assert by_method["ours"]["kappa"] == "trace"
    assert by_method["ours"]["after"] < by_method["replicas"]["after"] < by_method["none"]["after"]


def test_missed_bars_are_told():
    """One expert has all tokens and there is no slot: nothing helps, and the exact optimum says so."""
    loads = np.zeros((1, 1, 4, 8), dtype=np.int64)
    loads[..., 0] = 5000
    step = solve_step(loads, [ExpertLayout(8, 4)], PlanSettings())
    told = bench_foresight.above_bound(step, PlanSettings(), "here")
    assert told == [
        "here, micro-batch 0, layer 0: 20000 tokens, 4.0000 x bound 5000; slots and a floor of 1024 allow 20000"
    ]
    row = {"method": "ours", "kappa": 2000.0, "after": 1.04, "case": "clustered", "imbalance": 2.0, "seed": 0}
    missed = bench_foresight.missed_bars([row], told, {"seconds": 0.6})
    assert missed[0] == told[0]
    assert "1.0400 on average" in missed[1]
    assert "planning takes 0.600 s" in missed[2]
