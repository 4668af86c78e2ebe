"""Every plan is legal, deterministic and no worse than none; the invariants are those of ``plan/quota.py``."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import Costs, PlanSettings, comparators, quota, search, solve
from megatron_ultraep.plan.generator import simulate
from megatron_ultraep.plan.optimum import optimum
from tests.megatron_ultraep.plan.cases import problems, random_loads, single_node, uncompiled_search

COSTS = Costs(token_ps=1000, copy_ps_per_kib=1024, replica_bytes=100, fixed_ps=5000)
costs = st.sampled_from([None, COSTS, replace(COSTS, replica_bytes=10_000), replace(COSTS, fixed_ps=0)])


def check_legal(plan, loads, floor):
    layout = plan.layout
    home = np.array([layout.home_rank(e) for e in range(layout.experts)])
    assert np.array_equal(plan.loads, loads)  # per source rank and expert
    assert (plan.quota >= 0).all()
    assert plan.replica_expert.shape == (layout.ranks, layout.slots)
    width = layout.experts_per_rank + layout.slots
    for expert, rank, slot in plan.replicas:
        assert rank // layout.node_size == home[expert] // layout.node_size
        assert rank != home[expert]
        assert plan.physical_tokens[rank * width + layout.experts_per_rank + slot] >= floor
    assert len({(expert, rank) for expert, rank, _ in plan.replicas}) == len(plan.replicas)
    assert not plan.quota[:, plan.expert_of < 0].any()
    assert not plan.quota.flags.writeable
    assert not plan.replica_expert.flags.writeable


def check_decisions(plan):
    size = plan.layout.node_size
    for node, decision in enumerate(plan.decisions):
        ranks = slice(node * size, (node + 1) * size)
        assert decision.before == plan.before[ranks].max()
        assert decision.after == plan.after[ranks].max()
        assert decision.bound == -(-plan.before[ranks].sum() // size)
        assert decision.bound <= decision.after <= decision.before
        has_replicas = bool((plan.replica_expert[ranks] >= 0).any())
        assert has_replicas == (decision.outcome == "balanced")
        assert has_replicas == (decision.after < decision.before)


@settings(max_examples=200, deadline=None)
@given(problems(), costs)
def test_plans_are_legal_and_never_worse_than_none(problem, gate):
    loads, layout, options = problem
    before = loads.copy()
    plan = solve(loads, layout, replace(options, costs=gate))
    check_legal(plan, loads, options.min_tokens)
    check_decisions(plan)
    assert np.array_equal(loads, before)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_source_uses_its_own_copy_first(problem):
    loads, layout, options = problem
    plan = solve(loads, layout, options)
    width = layout.experts_per_rank + layout.slots
    for physical in np.nonzero(plan.expert_of >= 0)[0]:
        rank = physical // width
        most = min(loads[rank, plan.expert_of[physical]], plan.physical_tokens[physical])
        assert plan.quota[rank, physical] == most


@settings(max_examples=60, deadline=None)
@given(problems())
def test_same_bits_from_equal_arguments(problem):
    loads, layout, options = problem
    plan = solve(loads, layout, options)
    frozen = np.asfortranarray(loads)
    frozen.setflags(write=False)
    inverse = np.argsort(np.argsort(layout.home_slot))  # the same permutation, made in another way
    again = ExpertLayout(layout.experts, layout.ranks, tuple(map(int, inverse)), layout.node_size, layout.slots)
    assert plan.same_bits(solve(loads, layout, options))
    assert plan.same_bits(solve(frozen, again, options))


@settings(max_examples=60, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_homes_inside_a_rank_does_not_matter(problem, random):
    loads, layout, options = problem
    home_slot = np.array(layout.home_slot)
    for rank in range(layout.ranks):
        mine = list(layout.experts_of(rank))
        home_slot[random.sample(mine, len(mine))] = rank * layout.experts_per_rank + np.arange(len(mine))
    shuffled = ExpertLayout(layout.experts, layout.ranks, tuple(home_slot.tolist()), layout.node_size, layout.slots)
    one, two = solve(loads, layout, options), solve(loads, shuffled, options)
    assert np.array_equal(one.replica_expert, two.replica_expert)
    assert one.decisions == two.decisions
    for source in range(layout.ranks):
        assert np.array_equal(one.until(source), two.until(source))


@settings(max_examples=60, deadline=None)
@given(problems(most_ranks=4), costs)
def test_compiled_and_plain_python_give_the_same_bits(problem, gate):
    loads, layout, options = problem
    options = replace(options, costs=gate)
    with mock.patch.object(search, "compiled", return_value=PLAIN.plan_arrays):
        plain = solve(loads, layout, options)
    assert plain.same_bits(solve(loads, layout, options))


PLAIN = uncompiled_search()


def test_largest_remainder_by_hand():
    # 10 tokens by weights 7, 7, 7 and 3: shares 2.92, 2.92, 2.92 and 1.25, three left after rounding down. 8 tokens:
    # 2.33, 2.33, 2.33 and 1, one left for three equal remainders: the lowest id takes it.
    weights = np.array([7, 7, 7, 3])
    for tokens, expected in ((10, [3, 3, 3, 1]), (8, [3, 2, 2, 1]), (0, [0, 0, 0, 0]), (24, [7, 7, 7, 3])):
        share = np.zeros(4, dtype=np.int64)
        PLAIN._apportion(weights, 24, tokens, np.zeros(4, dtype=np.int64), share)
        assert share.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.data())
def test_apportioning_is_the_largest_remainder_method(weights, data):
    total = sum(weights)
    if not total:
        return
    quota_tokens = data.draw(st.integers(0, total))
    share = np.zeros(len(weights), dtype=np.int64)
    PLAIN._apportion(np.array(weights), total, quota_tokens, np.zeros(len(weights), dtype=np.int64), share)
    expected = [w * quota_tokens // total for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda s: (-(weights[s] * quota_tokens % total), s))
    for source in by_remainder[: quota_tokens - sum(expected)]:
        expected[source] += 1
    assert share.tolist() == expected


def test_one_hot_expert_by_hand():
    # Mean 250 of 1000 tokens on rank 0: three replicas of 250 leave 250 at home.
    loads, layout = single_node([1000, 0, 0, 0], 4, slots=1)
    plan = solve(loads, layout, PlanSettings(min_tokens=100, tolerance_ppm=0))
    assert plan.after.tolist() == [250] * 4
    assert plan.replica_expert.tolist() == [[-1], [0], [0], [0]]
    assert plan.quota[1].tolist() == [0, 0, 0, 250, 0, 0, 0, 0]  # rank 1's own copy takes all of its 250
    assert plan.decisions[0].outcome == "balanced"


def test_a_relay_where_slots_run_out():
    # One slot on the only cold rank: rank 1 fills it, and takes over what rank 0 has too much.
    loads, layout = single_node([184, 193, 13], 3, slots=1)
    plan = solve(loads, layout, PlanSettings(min_tokens=1, tolerance_ppm=0))
    assert plan.after.tolist() == [130, 130, 130]
    assert plan.replica_expert.tolist() == [[-1], [0], [1]]


ADVERSARIAL = {
    "all zero": ([0] * 8, 4, 2, "empty"),
    "one token": ([1] + [0] * 7, 4, 2, "within_tolerance"),
    "one expert takes all": ([100_000] + [0] * 7, 4, 2, "balanced"),
    "fewer tokens than the floor": ([1000] + [0] * 7, 4, 2, "no_replica_possible"),
    "no slot": ([100_000] + [0] * 7, 4, 0, "no_replica_possible"),
    "one rank": ([5000, 1, 1], 1, 2, "within_tolerance"),
    "one expert per rank": ([60_000, 10, 10], 3, 2, "balanced"),
    "flat": ([7000] * 8, 4, 2, "within_tolerance"),
    "two ranks": ([9000, 3000], 2, 1, "balanced"),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_loads(name):
    tokens, ranks, slots, outcome = ADVERSARIAL[name]
    loads, layout = single_node(tokens, ranks, slots)
    plan = solve(loads, layout)
    check_legal(plan, loads, 1024)
    check_decisions(plan)
    assert plan.decisions[0].outcome == outcome


def test_ranks_without_tokens():
    loads = np.zeros((4, 8), dtype=np.int64)
    loads[2, 5] = 50_000  # only rank 2 has tokens, all for an expert of rank 2
    plan = solve(loads, ExpertLayout(8, 4, slots=1))
    check_legal(plan, loads, 1024)
    assert plan.after.max() <= 12_625


def test_nodes_are_decided_one_by_one():
    loads = np.zeros((6, 6), dtype=np.int64)
    loads[0] = [9000, 3000, 4000, 4000, 0, 0]
    plan = solve(loads, ExpertLayout(6, 6, node_size=2, slots=1))
    assert [d.outcome for d in plan.decisions] == ["balanced", "within_tolerance", "empty"]


# Gate ---------------------------------------------------------------------------------------------------------------


def gated(loads, layout, **changes):
    return solve(loads, layout, PlanSettings(min_tokens=10, costs=replace(COSTS, **changes)))


def test_a_gain_below_the_cost_makes_no_replica():
    loads, layout = single_node([9000, 3000], 2, slots=1)
    cheap = gated(loads, layout).decisions[0]
    assert cheap.outcome == "balanced"
    assert cheap.saved_ps > cheap.cost_ps > 0
    dear = gated(loads, layout, fixed_ps=3_000_000)  # 3000 tokens of 1000 ps
    assert dear.replicas == ()
    assert dear.decisions[0].outcome == "gain_below_cost"
    assert dear.decisions[0].saved_ps <= dear.decisions[0].cost_ps
    assert gated(loads, layout, token_ps=0).decisions[0].outcome == "gain_below_cost"


def makespan(plan, gate):
    """What the gate minimises, summed over nodes, from the finished plan."""
    layout = plan.layout
    total = 0
    for first in range(0, layout.ranks, layout.node_size):
        ranks = range(first, first + layout.node_size)
        mine = [(expert, rank) for expert, rank, _ in plan.replicas if rank in ranks]
        sent = [sum(layout.home_rank(expert) == r for expert, _ in mine) for r in ranks]
        received = [sum(rank == r for _, rank in mine) for r in ranks]
        copies = gate.fixed_ps + gate.replica_ps * max(sent + received) if mine else 0
        total += gate.token_ps * int(plan.after[first : first + layout.node_size].max()) + copies
    return total


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_gate_takes_the_shorter_makespan(problem):
    loads, layout, options = problem
    plan = solve(loads, layout, replace(options, costs=COSTS))
    assert makespan(plan, COSTS) <= makespan(solve(loads, replace(layout, slots=0)), COSTS)
    for decision in plan.decisions:
        if decision.outcome == "balanced":
            assert decision.saved_ps > decision.cost_ps
            assert decision.saved_ps == COSTS.token_ps * (decision.before - decision.after)


@settings(max_examples=40, deadline=None)
@given(problems(most_ranks=4))
def test_dearer_copies_never_balance_further(problem):
    loads, layout, options = problem
    after = []
    for replica_bytes in (0, 1000, 10_000, 100_000, 10_000_000, 10**9):
        gate = replace(COSTS, replica_bytes=replica_bytes, fixed_ps=0)
        plan = solve(loads, layout, replace(options, costs=gate))
        after.append([d.after for d in plan.decisions])
    assert (np.diff(after, axis=0) >= 0).all()


def test_a_node_that_waits_for_another_makes_no_replicas():
    layout = ExpertLayout(8, 4, node_size=2, slots=1)
    loads = np.zeros((4, 8), dtype=np.int64)
    loads[:, 0:4] = [[50, 50, 0, 0]] * 4  # node 0: 400 and 0 tokens
    loads[:, 4:8] = [[300, 300, 250, 250]] * 4  # node 1: 2400 and 2000
    free = Costs(1000, 0, 0)
    plan = solve(loads, layout, PlanSettings(min_tokens=1, costs=free))
    assert [d.outcome for d in plan.decisions] == ["gain_below_cost", "balanced"]
    assert plan.before.tolist()[:2] == plan.after.tolist()[:2] == [400, 0]
    assert plan.after.max() < plan.before.max()
    assert np.array_equal(plan.loads, loads)
    assert solve(loads, layout, PlanSettings(min_tokens=1)).decisions[0].outcome == "balanced"  # no gate


# Quality ------------------------------------------------------------------------------------------------------------


def test_distance_to_the_exact_optimum():
    """Nodes of 2 to 4 ranks against the exact optimum (or the tolerance, where that is higher).

    Measured over 1000 such nodes: equal in 98.6%, 0.03% above it on average, 14% in the worst.
    """
    rng = np.random.default_rng(0)
    ratios, extra = [], []
    for _ in range(100):
        ranks, per_rank, slots = int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
        tokens = random_loads(rng, 1, ranks * per_rank)[0] + 1
        floor = max(1, int(tokens.sum()) // (ranks * int(rng.choice([16, 64]))))
        loads, layout = single_node(tokens, ranks, slots)
        plan = solve(loads, layout, PlanSettings(min_tokens=floor))
        tolerated = plan.decisions[0].bound * 101 // 100
        try:
            exact = optimum(tokens, ranks, slots, floor, tolerated, time_limit_s=5)
        except TimeoutError:
            continue
        ratios.append(max(plan.after.max(), tolerated) / max(exact.peak, tolerated))
        if ratios[-1] == 1:
            extra.append(len(plan.replicas) - exact.replicas)
    assert len(ratios) > 90
    assert np.mean(ratios) < 1.002
    assert np.mean(np.array(ratios) == 1) >= 0.95
    assert max(ratios) < 1.15
    assert np.mean(extra) < 0.05


@pytest.mark.parametrize(("ranks", "experts", "node_size", "imbalance"), [(8, 128, 8, 2.0), (64, 256, 64, 1.5)])
def test_within_one_percent_of_the_bound_without_more_replicas_than_ultraep(ranks, experts, node_size, imbalance):
    _, loads = simulate(ranks=ranks, experts=experts, tokens=8192, topk=8, target_imbalance=imbalance, seed=0)
    layout = ExpertLayout(experts, ranks, node_size=node_size, slots=2)
    mine = comparators.of_plan(solve(loads, layout))
    assert mine.tokens.max() <= 1.01 * comparators.bound(loads, layout)
    assert mine.replicas <= comparators.ultraep(loads, layout).replicas
    assert mine.min_replica_tokens >= 1024


# Input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ([[1, 2], [3, 4]], "numpy array, got list"),
        (np.ones((2, 4)), "int64 loads, which are exact, got float64"),
        (np.ones((2, 4), dtype=np.int32), "got int32: convert"),
        (np.ones((4, 2), dtype=np.int64), r"\[ranks, experts\] = \[2, 4\], got \[4, 2\]"),
        (np.array([[1, 2, 3, 4], [1, -7, 1, 1]]), "got -7 from source rank 1 for expert 1"),
        (np.full((2, 4), 2**62), "at most 1073741824 tokens"),
        (np.full((2, 4), 2**28), "at most 1073741824 tokens"),
    ],
)
def test_wrong_loads_are_refused(loads, message):
    with pytest.raises(ValueError, match=message):
        solve(loads, ExpertLayout(4, 2, slots=1))


def test_the_most_tokens_that_are_allowed():
    loads = np.zeros((2, 2), dtype=np.int64)
    loads[0, 0] = search.MOST_TOKENS
    plan = solve(loads, ExpertLayout(2, 2, slots=1), PlanSettings(costs=Costs(4 * 10**9, 0, 0)))
    check_legal(plan, loads, 1024)
    assert plan.after.max() <= search.MOST_TOKENS * 0.505


def test_without_a_place_for_the_cache_it_compiles_all_the_same():
    def njit(signatures, cache=False, nogil=False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    with mock.patch("numba.njit", njit):
        assert search.compiled.__wrapped__() is search.plan_arrays


def test_one_signature():
    solve(*single_node([5, 6], 2, slots=1))
    assert len(search.compiled().signatures) == 1
    assert quota.solve is solve
