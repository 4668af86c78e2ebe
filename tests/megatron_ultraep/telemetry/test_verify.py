"""Stored plans are made again from stored loads, whoever made them, and what was changed is found."""

import dataclasses

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import Costs, PlanSettings, solve
from megatron_ultraep.plan.foresight import solve_step
from megatron_ultraep.telemetry.blocks import Block, Shape, pack, row
from megatron_ultraep.telemetry.recorder import Recorder
from megatron_ultraep.telemetry.verify import PlanCheck, differences, settings_of, verify_plans
from tests.megatron_ultraep.telemetry.plans import key, make_plan, zipf_loads

COSTS = Costs(token_ps=2_000_000, copy_ps_per_kib=40_000, replica_bytes=300_000, fixed_ps=1_000_000)
SETTINGS = {
    "no gate": PlanSettings(min_tokens=8, tolerance_ppm=0),
    "gate": PlanSettings(min_tokens=64, costs=COSTS),
    "nothing pays": PlanSettings(min_tokens=64, costs=dataclasses.replace(COSTS, copy_ps_per_kib=4_000_000_000)),
}


def layouts(rng, count):
    """Of one shape, with experts at home anywhere."""
    return [ExpertLayout(32, 8, tuple(rng.permutation(32).tolist()), node_size=4, slots=2) for _ in range(count)]


def record(directory, settings, plans, name="a", **meta):
    with Recorder(directory, max_mib=4, name=name, meta=meta) as recorder:
        if settings is not None:
            recorder.remember(plan_settings=dataclasses.asdict(settings))
        for (microbatch, layer), plan in plans.items():
            recorder.record(key(3, microbatch), layer, plan)
    return directory


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ahead", [False, True])
def test_plans_are_made_again_bit_for_bit(tmp_path, name, ahead):
    rng, settings = np.random.default_rng(7), SETTINGS[name]
    homes = layouts(rng, 5)
    loads = np.stack([[zipf_loads(homes[n], seed=10 * m + n) for n in range(5)] for m in range(6)])
    loads[0, 0] = 0
    step = solve_step(loads, homes, settings)
    plans = {
        (m, n): step.plan(m, n) if ahead else solve(loads[m, n], homes[n], settings) for m in range(6) for n in range(5)
    }
    found = verify_plans(record(tmp_path / "deep" / "er", settings, plans).parent)
    replicas = sum(len(plan.replicas) for plan in plans.values())
    assert found == PlanCheck(30, replicas, 0, ())
    assert (replicas > 0) == (name != "nothing pays")


def test_plans_of_another_planner_are_found(tmp_path):
    found = verify_plans(record(tmp_path, PlanSettings(), {(0, layer): make_plan(seed=layer) for layer in range(30)}))
    assert found.plans == 30
    assert "a.000000.loads.npz: actor/train/step 3/micro-batch 0, layer 0: slot 0 of rank" in found.mismatches[0]
    assert found.mismatches[-1].endswith("more differences")


def test_other_settings_than_those_kept_are_found(tmp_path):
    homes = layouts(np.random.default_rng(0), 1)[0]
    plans = {(0, 0): solve(zipf_loads(homes), homes, SETTINGS["no gate"])}
    assert verify_plans(record(tmp_path, SETTINGS["nothing pays"], plans)).mismatches


@pytest.mark.parametrize(
    "meta", [{}, {"plan_settings": None}, {"plan_settings": {"min_tokens": 1}}, {"plan_settings": {"costs": {"a": 1}}}]
)
def test_without_settings_nothing_is_claimed(tmp_path, meta):
    assert settings_of(meta) is None
    plans = {(0, layer): make_plan(seed=layer) for layer in range(4)}
    assert verify_plans(record(tmp_path, None, plans, **meta)) == PlanCheck(0, 0, 4, ())


def test_settings_survive_being_kept():
    for settings in SETTINGS.values():
        assert settings_of({"plan_settings": dataclasses.asdict(settings)}) == settings


def test_a_damaged_chunk_is_a_mismatch_and_the_others_are_verified(tmp_path):
    homes, settings = layouts(np.random.default_rng(1), 1)[0], SETTINGS["no gate"]
    for name in ("a", "b"):
        record(tmp_path, settings, {(0, 0): solve(zipf_loads(homes), homes, settings)}, name=name)
    path = tmp_path / "a.000000.loads.npz"
    path.write_bytes(path.read_bytes()[:-40])
    found = verify_plans(tmp_path)
    assert found.plans == 1
    assert len(found.mismatches) == 1
    assert "a.000000.loads.npz: " in found.mismatches[0]


def test_homes_that_are_no_permutation_are_a_sentence(tmp_path):
    homes, settings = layouts(np.random.default_rng(2), 1)[0], SETTINGS["no gate"]
    block = pack([row(key(), 1, solve(zipf_loads(homes), homes, settings))], Shape.of(homes))
    assert list(differences(block, 0, settings)) == []
    broken = dataclasses.replace(block, home_slot=np.zeros_like(block.home_slot))
    assert "no plan can be made of it" in next(iter(differences(broken, 0, settings)))


def test_what_is_remembered_is_in_chunks_from_then_on(tmp_path):
    with Recorder(tmp_path, max_mib=4, name="a", meta={"x": 1}) as recorder:
        recorder.record(key(0), 1, make_plan())
        recorder.flush()
        recorder.remember(y=[2], x=3)
        recorder.record(key(1), 1, make_plan())
        with pytest.raises(ValueError, match="expected meta of JSON values"):
            recorder.remember(z=object())
    first, second = (Block.read(path).meta for path in sorted(tmp_path.glob("*.npz")))
    assert (first, second) == ({"x": 1}, {"x": 3, "y": [2]})
