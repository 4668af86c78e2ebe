"""Plans made ahead: what is refused, and what is said when routers did something else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan import PlanSettings
from megatron_ultraep.plan.foresight import solve_step
from megatron_ultraep.runtime.calls import Backwards, Call
from megatron_ultraep.runtime.foresight import Foresight, ForesightMismatch
from megatron_ultraep.runtime.planning import splits_of

LAYOUT = ExpertLayout(experts=8, ranks=2, slots=2)
KEYS = [MicroBatchKey("actor", "train", 3, number) for number in range(2)]
LAYERS = {2: 0, 5: 1}  # Megatron's layer numbers; the others are dense


@pytest.fixture
def step():
    loads = np.random.default_rng(0).integers(0, 50, (len(KEYS), len(LAYERS), 2, 8))
    loads[:, :, :, 0] += 400
    return solve_step(loads, [LAYOUT] * len(LAYERS), PlanSettings(min_tokens=1))


def taken(step, rank=1, **keywords):
    foresight = Foresight(rank, torch.device("cpu"))
    foresight.set(step, KEYS, dict.fromkeys(LAYERS, LAYOUT), LAYERS, **keywords)
    return foresight


def route(foresight, key, layer, loads):
    """As a layer does whose router takes these loads."""
    foreseen = foresight.take(key, layer)
    foreseen.seen.copy_(torch.tensor(loads))
    foreseen.used = True


def test_what_the_host_knows_is_what_the_plan_says(step):
    foresight = taken(step)
    for m, key in enumerate(KEYS):
        for number, n in LAYERS.items():
            plan, foreseen = step.plan(m, n), foresight.take(key, number)
            assert np.array_equal(foreseen.host.numpy(), splits_of(plan, 1))
            assert foreseen.filled.replicas == len(plan.replicas) > 0
            held = [slot for _, rank, slot in plan.replicas if rank == 1]
            assert foreseen.filled.slots == max((slot + 1 for slot in held), default=0)
            assert foreseen.plan.same_bits(plan)
    assert foresight.take(MicroBatchKey("actor", "eval", 3, 0), 2) is None
    assert foresight.take(None, 2) is None


def test_routes_as_foreseen_pass(step):
    foresight = taken(step)
    route(foresight, KEYS[0], 5, step.loads[0, 1, 1])  # the others were not run
    foresight.check()


def test_other_routes_are_named(step):
    foresight = taken(step, samples={KEYS[1]: ["p7-0", "p9-3"]})
    route(foresight, KEYS[0], 2, step.loads[0, 0, 1])
    wrong = step.loads[1, 1, 1].astype(np.int64)
    wrong[:2] += (1, -1)
    route(foresight, KEYS[1], 5, wrong)
    with pytest.raises(ForesightMismatch, match=r"MoE layer 5 in actor/train/step 3/micro-batch 1 .*p7-0, p9-3"):
        foresight.check()


def test_plans_for_other_homes_are_refused(step):
    moved = ExpertLayout(experts=8, ranks=2, slots=2, home_slot=(1, 0, 2, 3, 4, 5, 6, 7))
    foresight = Foresight(0, torch.device("cpu"))
    with pytest.raises(ForesightMismatch, match=r"MoE layer 5 was planned for .* plan again after experts have moved"):
        foresight.set(step, KEYS, {2: LAYOUT, 5: moved}, LAYERS)


def test_a_micro_batch_is_planned_once(step):
    foresight = taken(step)
    with pytest.raises(
        ForesightMismatch, match=r"micro-batch 0, MoE layer 2 has a plan already: clear\(\) ends a step"
    ):
        foresight.set(step, KEYS, dict.fromkeys(LAYERS, LAYOUT), LAYERS)
    foresight.clear()
    foresight.set(step, KEYS, dict.fromkeys(LAYERS, LAYOUT), LAYERS)


def test_what_backward_needs_next_is_the_layer_before():
    backwards = Backwards()
    calls = {name: Call(SimpleNamespace()) for name in ("m0 first", "m0 second", "m1 first")}
    for name, call in calls.items():
        backwards.add(name.split()[0], name, call)
    assert backwards.next_after(calls["m0 second"]) == ("m0 first", calls["m0 first"])
    assert backwards.next_after(calls["m0 first"]) is None
    assert backwards.next_after(calls["m0 first"]) is None, "it is over"
    assert backwards.next_after(calls["m1 first"]) is None


def test_calls_whose_backward_never_comes_do_not_pile_up():
    backwards = Backwards()
    for number in range(3 * Backwards.MOST_KEYS):
        backwards.add(number, "layer", Call(SimpleNamespace()))
    assert len(backwards._calls) <= Backwards.MOST_KEYS + 1
