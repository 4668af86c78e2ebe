"""Comparators do what their sources say, on the same terms."""

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import PlanSettings, comparators, eplb, solve, ultraep
from megatron_ultraep.plan.optimum import Optimum, optimum
from tests.megatron_ultraep.plan.cases import problems, single_node


def test_eplb_reproduces_its_published_example():
    weight = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    physical, copies = eplb.rebalance_experts(weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert physical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert copies.sum(axis=1).tolist() == [16, 16]


def test_eplb_refuses_numbers_that_do_not_divide():
    with pytest.raises(ValueError, match="GPUs that divide the replicas"):
        eplb.rebalance_experts(np.ones((1, 4)), num_replicas=7, num_groups=2, num_nodes=1, num_gpus=2)


def test_ultraep_by_hand():
    # Mean 100, target 101: rank 0 gives 149 of its hot expert, 51 then 48 of them fill the two coldest ranks.
    tokens = np.array([250, 0, 50, 0, 50, 0, 50, 0])
    assert ultraep.plan_node(tokens, 4, 1, 1024) == [(0, 1, 51), (0, 2, 51), (0, 3, 47)]


def test_ultraep_ignores_the_floor_only_on_the_fast_path():
    tokens = np.array([1200, 1000, 800])
    assert ultraep.plan_node(tokens, 3, 1, min_tokens=1024) == [(0, 2, 190)]


@settings(max_examples=40, deadline=None)
@given(problems())
def test_all_conserve_tokens_and_respect_the_bound(problem):
    loads, layout, options = problem
    bound = comparators.bound(loads, layout)
    inside_nodes = [
        comparators.none(loads, layout),
        comparators.ultraep(loads, layout, options.min_tokens),
        comparators.lplb(loads, layout),
        comparators.of_plan(solve(loads, layout, options)),
    ]
    for balance in inside_nodes:
        assert balance.tokens.sum() == loads.sum()
        assert balance.tokens.max() >= bound
        assert balance.replicas <= layout.ranks * layout.slots
        assert balance.tokens.max() <= inside_nodes[0].tokens.max()
    assert comparators.eplb(loads, layout).tokens.sum() == loads.sum()
    assert inside_nodes[3].min_replica_tokens >= (options.min_tokens if inside_nodes[3].replicas else 0)


def test_lplb_is_bound_by_its_graph():
    # Slots of ranks 2 and 3 hold experts of ranks 3 and 0: rank 0 can give to rank 3 only.
    loads, layout = single_node([1000, 0, 0, 0], 4, slots=1)
    assert comparators.lplb(loads, layout).tokens.tolist() == [500, 0, 0, 500]


@settings(max_examples=30, deadline=None)
@given(problems())
def test_reordering_balances_homes(problem):
    loads, layout, _ = problem
    moved = comparators.reordered(loads, layout)
    assert (moved.node_size, moved.slots) == (layout.node_size, layout.slots)
    # LPT with room for equally many: no rank exceeds the mean by more than the largest expert.
    tokens = comparators.none(loads, moved).tokens
    nodes = tokens.reshape(-1, layout.node_size)
    assert (nodes.max(axis=1) - nodes.min(axis=1) <= loads.sum(axis=0).max()).all()


def test_optimum_by_hand():
    # 1000 tokens on one of four ranks with a slot each: 250 everywhere, three replicas.
    tokens = np.array([1000, 0, 0, 0])
    assert optimum(tokens, 4, 1, 1) == Optimum(250, 3)
    # Within 350 two replicas of 325 and more suffice: 300 at home.
    assert optimum(tokens, 4, 1, 1, target=350) == Optimum(250, 2)
    # A floor of 400 leaves 400 for each of two replicas at best.
    assert optimum(tokens, 4, 1, 400) == Optimum(400, 2)
    assert optimum(tokens, 4, 0, 1) == Optimum(1000, 0)


def test_a_relay_is_what_the_optimum_needs():
    tokens = np.array([184, 193, 13])
    loads, layout = single_node(tokens, 3, slots=1)
    assert optimum(tokens, 3, 1, 1).peak == 130
    assert solve(loads, layout, PlanSettings(1, 0)).after.max() == 130


def test_bound_counts_nodes():
    loads, _ = single_node([100, 100, 0, 0], 4, slots=1)
    assert comparators.bound(loads, ExpertLayout(4, 4, slots=1)) == 50
    assert comparators.bound(loads, ExpertLayout(4, 4, node_size=2, slots=1)) == 100
