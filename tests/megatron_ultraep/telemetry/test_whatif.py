import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.replay import RoutingTrace, TraceSample, padding_routes
from megatron_ultraep.telemetry import Recorder, read
from megatron_ultraep.telemetry.whatif import (
    evenly,
    make_plan,
    open_input,
    pack_trace,
    plan_blocks,
    record_cases,
    trace_cases,
    unbalanced,
)
from tests.megatron_ultraep.replay.routes import valid_routes
from tests.megatron_ultraep.telemetry.plans import key, zipf_loads
from tests.megatron_ultraep.telemetry.plans import make_plan as hand_plan


def make_trace(rows=(5, 9, 3, 7, 4), layers=3, experts=8, topk=2):
    samples = [TraceSample(f"s{i}", valid_routes(n, layers, experts, topk, seed=i)) for i, n in enumerate(rows)]
    return RoutingTrace(experts, layers, topk, tuple(samples), {"name": "tiny"})


def test_loads_of_a_trace_are_what_training_would_dispatch():
    trace = make_trace()
    batch = pack_trace(trace, 2, tokens_per_micro_batch=10)
    cases = {(c.key.microbatch, c.layer): c.loads for c in trace_cases(trace, batch)}
    assert len(cases) == batch.num_microbatches * trace.moe_layers
    for rank in range(2):
        for index, micro_batch in enumerate(batch.micro_batches[rank]):
            for layer in range(trace.moe_layers):
                expected = np.zeros(trace.experts, dtype=int)
                for segment in micro_batch.segments:
                    for row in trace.samples[segment.sample].routes[:, layer]:
                        expected[row] += 1
                for row in padding_routes(np.arange(micro_batch.used, micro_batch.rows), layer, trace.experts, 2):
                    expected[row] += 1
                assert cases[index, layer][rank].tolist() == expected.tolist()


def test_samples_without_rows_are_left_out():
    trace = make_trace((4, 0, 3))
    assert pack_trace(trace, 1).sample_ids == ("s0", "s2")


def test_unbalanced_sends_every_token_home():
    layout = ExpertLayout(12, 4, tuple(np.random.default_rng(2).permutation(12).tolist()), node_size=2, slots=2)
    loads = zipf_loads(layout, 5)
    plan = unbalanced(loads, layout)
    np.testing.assert_array_equal(plan.loads, loads)
    np.testing.assert_array_equal(plan.before, plan.after)
    assert plan.replicas == ()
    assert [d.before for d in plan.decisions] == [int(plan.before[n : n + 2].max()) for n in (0, 2)]
    assert {d.outcome for d in unbalanced(np.zeros_like(loads), layout).decisions} == {"empty"}


def test_plans_of_the_planner_are_kept_as_load_records():
    layout = ExpertLayout(8, 4, node_size=2, slots=1)
    trace = make_trace((400,) * 8)
    cases = list(trace_cases(trace, pack_trace(trace, 4, 800)))
    settings = PlanSettings(min_tokens=1)
    (block,) = plan_blocks(cases, layout, settings)
    assert len(block) == len(cases)
    plans = [make_plan(c.loads, layout, settings) for c in cases]
    assert block.rank_after().tolist() == [p.after.tolist() for p in plans]
    assert any(p.replicas for p in plans)


def test_recorded_tokens_are_spread_evenly(tmp_path):
    layout = ExpertLayout(12, 4, tuple(reversed(range(12))), slots=1)
    plan = hand_plan(layout, seed=3)
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        r.record(key(), 5, plan)
    for ranks in (1, 4, 6):
        (case,) = record_cases(read(tmp_path), ranks)
        assert case.loads.shape == (ranks, 12)
        assert case.loads.dtype == np.int64
        assert case.loads.sum(axis=0).tolist() == plan.loads.sum(axis=0).tolist()
        assert np.ptp(case.loads, axis=0).max() <= 1
        assert np.ptp(case.loads.sum(axis=1)) <= 1
        assert case.home_slot == layout.home_slot


def test_evenly():
    assert np.nonzero(evenly(10, 3))[0].tolist() == [0, 4, 9]
    assert evenly(4, 100).all()
    assert evenly(5, 1).tolist() == [True, False, False, False, False]


def test_inputs_that_are_neither_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no such file"):
        open_input(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"expected load records .* found none: set the record directory"):
        open_input(tmp_path)
    trace = make_trace()
    trace.save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"give a trace such as .*t\.safetensors"):
        open_input(tmp_path)
    assert open_input(tmp_path / "t.safetensors").experts == 8
    (tmp_path / "x.txt").write_text("no trace")
    with pytest.raises(ValueError, match=r"x\.txt: expected a routing trace .*; give a routing trace"):
        open_input(tmp_path / "x.txt")
    RoutingTrace(8, 3, 2, ()).save(tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="expected a trace with routes, got 0 samples"):
        open_input(tmp_path / "empty.safetensors")
    with Recorder(tmp_path / "loads", max_mib=1, name="a") as r:
        r.record(key(), 0, hand_plan())
    with pytest.raises(ValueError, match="give the directory that holds it"):
        open_input(tmp_path / "loads" / "a.000000.loads.npz")
