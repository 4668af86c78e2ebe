"""Plans made ahead change when balancing is decided and nothing else; plans of other routes are an error in time."""

import dataclasses
import re

import numpy as np
import pytest

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.runtime.foresight import ForesightMismatch
from rl.training.foresight import PassPlans, choose_homes, expert_groups, group_loads
from rl.training.worker import TrainWorker
from tests.ranks import RankError
from tests.rl.training.balancing import biased_model
from tests.rl.training.common import make_layout, worst
from tests.rl.training.planning import BALANCE, Run, loads_of, merge, skewed_samples, told, train

NODES = dataclasses.replace(BALANCE, node_size=2)
SYMMETRIC = dataclasses.replace(BALANCE, transport="symmetric")
# ranks, run
CASES = {
    "ep2": (2, Run({"ep": 2})),
    "ep2, symmetric": (2, Run({"ep": 2}, balance=SYMMETRIC)),
    "ep2, two sets of slots": (2, Run({"ep": 2}, balance=dataclasses.replace(BALANCE, slot_sets=2))),
    "ep2, two sets of slots, symmetric": (2, Run({"ep": 2}, balance=dataclasses.replace(SYMMETRIC, slot_sets=2))),
    "ep2, recompute full, moved": (2, Run({"ep": 2}, homes="random", spec={"recompute": ("full",)})),
    "ep2, recompute full, moved, symmetric": (
        2, Run({"ep": 2}, balance=SYMMETRIC, homes="random", spec={"recompute": ("full",)}),
    ),
    "tp2xep2": (2, Run({"tp": 2, "ep": 2})),
    "tp2xep2, moved": (2, Run({"tp": 2, "ep": 2}, homes="random")),
    "pp2xep2": (4, Run({"pp": 2, "ep": 2})),
    "pp2xep2, moved": (4, Run({"pp": 2, "ep": 2}, homes="random")),
    "ep4 in two nodes, homes chosen": (4, Run({"ep": 4}, balance=NODES, homes="chosen")),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return biased_model(tmp_path_factory.mktemp("foresight") / "m", strength=25.0)


@pytest.fixture(scope="module")
def stock(directory):
    """Runs without the plugin, by layout, each made once."""
    made = {}

    def of(ranks, world, run):
        key = str((run.layout, run.spec))
        if key not in made:
            plain = dataclasses.replace(run, balance=None, foresight=False, homes="nowhere")
            made[key] = merge(ranks(world).run(train, directory, plain))
        return made[key]

    return of


@pytest.mark.parametrize("case", CASES)
def test_training_equals_stock(ranks, directory, stock, case):
    world, run = CASES[case]
    expected = stock(ranks, world, run)
    found = merge(ranks(world).run(train, directory, run))
    assert found["taken"] > 0
    assert found["replicas"] > 0
    assert (found["moved"] > 0) == (run.homes != "nowhere")
    assert np.abs(found["losses"] / expected["losses"] - 1).max() <= 1e-10
    assert worst(found["old"], expected["old"]) <= 1e-10
    assert worst(found["tensors"], expected["tensors"]) <= 1e-10
    assert worst(found["weights"], expected["weights"]) <= 1e-7  # Adam's first steps divide by small gradients


def test_exact_plans_and_foreseen_plans_are_the_same(ranks, directory):
    run = Run({"ep": 2})
    ahead = merge(ranks(2).run(train, directory, run))
    exact = merge(ranks(2).run(train, directory, dataclasses.replace(run, foresight=False)))
    assert exact["taken"] == 0
    assert ahead["replicas"] == exact["replicas"]


def mistaken(directory, run):
    """How often the optimizer stepped, and what was said, when a step has plans of other routes."""
    stepped = []
    whole = TrainWorker.train

    def watched(self, *arguments, **keywords):
        step = self.optimizer.step
        self.optimizer.step = lambda: (stepped.append(1), step())[1]
        try:
            return whole(self, *arguments, **keywords)
        finally:
            self.optimizer.step = step

    TrainWorker.train = watched
    try:
        train(directory, run)
    except ForesightMismatch as error:
        return len(stepped), str(error)
    finally:
        TrainWorker.train = whole
    return len(stepped), ""


@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2, "ep": 2}])
def test_plans_of_other_routes_are_an_error_before_the_optimizer_steps(ranks, directory, layout):
    for stepped, said in ranks(2).run(mistaken, directory, Run(layout, wrong=1, only_train=True)):
        assert stepped == 1, "the optimizer stepped with wrong plans"
        assert re.search(r"MoE layer \d in actor/train/step 1/micro-batch \d \(samples s\d", said)


def test_plans_that_leave_experts_out_are_the_same_error(ranks, directory):
    """Such a plan cannot even be followed: tokens have nowhere to go."""
    with pytest.raises(RankError, match=r"ForesightMismatch: .*MoE layer \d in actor/old_logprob/step 1"):
        ranks(2).run(train, directory, Run({"ep": 2}, wrong=1, grossly=True))


def unbalanced(directory):
    train(directory, Run({"ep": 2}, balance=BalanceConfig(slots=2, min_tokens=1, gate=False, node_size=4)))


def test_a_layout_that_cannot_be_balanced_says_so(ranks, directory):
    with pytest.raises(RankError, match="node_size"):
        ranks(2).run(unbalanced, directory)


# ------------------------------------------------------------------ the driver's half, without ranks


def test_groups_are_those_of_megatron():
    layout = ParallelLayout(world=16, tp=2, pp=2, ep=4)
    groups = expert_groups(layout, told(layout))
    assert [group.ranks for group in groups] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    assert groups[0].sources == groups[2].sources == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert groups[1].sources == ((2, 0), (2, 1), (3, 0), (3, 1))
    assert [group.numbers for group in groups] == [(1, 2), (1, 2), (3, 4), (3, 4)]
    assert groups[2].moe_layers == (2, 3)


def test_ranks_that_balance_differently_are_refused():
    layout = ParallelLayout(world=2, ep=2)
    other = told(layout)
    other[1] = dataclasses.replace(other[1], settings=PlanSettings(2))
    with pytest.raises(ValueError, match="balance alike"):
        expert_groups(layout, other)


def test_a_stage_without_moe_layers_is_given_empty_plans():
    layout = ParallelLayout(world=4, pp=2, ep=2)
    ranks = told(layout)
    for rank in (0, 1):
        ranks[rank] = dataclasses.replace(ranks[rank], layouts={})
    groups = expert_groups(layout, ranks)
    assert [group.ranks for group in groups] == [(2, 3)]


@pytest.fixture(scope="module")
def arch(directory):
    from rl.models.architecture import read_architecture

    return read_architecture(directory)


def test_loads_of_all_ranks_are_the_tokens_of_the_batch(arch):
    layout = ParallelLayout(world=4, tp=2, ep=4)
    samples = skewed_samples(arch, 0)
    groups = expert_groups(layout, told(layout, arch.experts, arch.layers))
    batch = make_layout(samples, layout, 64)
    (loads,) = loads_of(groups, samples, batch, layout, arch)
    rows = sum(m.rows for of_rank in batch.micro_batches for m in of_rank)
    assert (loads.sum(axis=(0, 2, 3)) == rows * arch.topk).all()
    without = {s.sample_id: s.histogram for s in samples if s.sample_id != "s3"}
    with pytest.raises(ValueError, match="none of sample s3"):
        group_loads(groups, batch, without, {}, topk=2, tp_size=2)


def test_homes_are_chosen_where_it_pays_and_alike_for_expert_data_parallel_groups(arch):
    layout = ParallelLayout(world=8, ep=4)
    samples = skewed_samples(arch, 0)
    groups = expert_groups(layout, told(layout, arch.experts, arch.layers, node_size=2))
    assert len(groups) == 2
    loads = loads_of(groups, samples, make_layout(samples, layout, 64), layout, arch)
    chosen = choose_homes(groups, {}, loads, move_ns_per_mib=25_000, horizon=1)
    assert sorted(chosen) == [1, 2, 3, 4]
    assert sum(len(plan.moves) for plan in chosen.values()) > 0
    homes = {number: plan.layout.home_slot for number, plan in chosen.items()}
    again = choose_homes(groups, homes, loads, move_ns_per_mib=25_000, horizon=1)
    assert sum(plan.after_ps for plan in again.values()) <= sum(plan.after_ps for plan in chosen.values())


def test_the_digest_tells_plans_apart(arch):
    from megatron_ultraep.plan.foresight import solve_step

    layout = ParallelLayout(world=2, ep=2)
    samples = skewed_samples(arch, 0)
    groups = expert_groups(layout, told(layout, arch.experts, arch.layers))
    loads = loads_of(groups, samples, make_layout(samples, layout, 64), layout, arch)
    (group,), (of_group,) = groups, loads
    made = [
        PassPlans(groups, (solve_step(of_group, group.layouts(homes), group.settings),))
        for homes in ({}, {}, {1: (7, 6, 5, 4, 3, 2, 1, 0)})
    ]
    assert made[0].digest == made[1].digest != made[2].digest
    parts, of_rank = made[0].parts(2)
    assert of_rank == [1, 1]
    assert parts[1].index == {1: 0, 2: 1, 3: 2, 4: 3}
