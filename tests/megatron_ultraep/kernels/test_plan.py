"""The kernels plan as ``plan.solve`` does, bit for bit: on a GPU, on a CPU, and on a CPU with warps of 32."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.kernels import build
from megatron_ultraep.kernels.plan import PlanKernel, to_plan
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import Costs, PlanSettings, solve
from megatron_ultraep.plan.generator import simulate
from megatron_ultraep.plan.search import MOST_TOKENS
from megatron_ultraep.runtime import reroute

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def skewed(rng, ranks, experts):
    """int64 ``[G, E]``: some experts hot, some idle."""
    popularity = rng.pareto(rng.choice([0.5, 1.0, 3.0]), experts) + 0.01
    return rng.poisson(np.minimum(popularity * rng.choice([1, 30, 1000]), 1e5), (ranks, experts))


def one_expert(rng, ranks, experts):
    loads = rng.integers(0, 3, (ranks, experts))
    loads[:, rng.integers(experts)] += rng.integers(1, 20_000)
    return loads


def idle_ranks(rng, ranks, experts):
    loads = skewed(rng, ranks, experts)
    loads[rng.random(ranks) < 0.5] = 0
    loads[:, rng.random(experts) < 0.5] = 0
    return loads


def ties(rng, ranks, experts):
    return rng.choice([0, 0, 100, 200], (1, experts)).repeat(ranks, 0)


def hot_rank(rng, ranks, experts):
    """Of neighbouring experts all are hot: with homes in order, whole ranks."""
    loads = skewed(rng, ranks, experts)
    first = rng.integers(experts)
    loads[:, first : first + rng.integers(1, 5)] += rng.integers(1, 3000)
    return loads


def half_hot(rng, ranks, experts):
    """With homes in order, ranks far above and below the mean: slots run out, and replicas are relayed."""
    heat = rng.choice([1, 2, 6], ranks).repeat(experts // ranks)
    return rng.integers(20, 100, (ranks, experts)) * heat


def few(rng, ranks, experts):
    return rng.integers(0, 2, (ranks, experts)) * rng.integers(0, 4)


def huge(rng, ranks, experts):
    """About as many tokens as are allowed."""
    loads = rng.dirichlet(np.full(ranks * experts, 0.1)) * 2**30
    return np.floor(loads).reshape(ranks, experts)


LOADS = [skewed, one_expert, idle_ranks, ties, hot_rank, half_hot, half_hot, few, huge]


def random_problem(rng, most_ranks=16):
    """Loads, layout, settings and a source rank."""
    ranks = int(rng.integers(1, most_ranks + 1))
    node_size = int(rng.choice([d for d in range(1, ranks + 1) if ranks % d == 0]))
    experts = ranks * int(rng.integers(1, 7))
    home_slot = rng.permutation(experts) if rng.random() < 0.5 else np.arange(experts)
    layout = ExpertLayout(experts, ranks, tuple(home_slot.tolist()), node_size, int(rng.choice([0, 1, 1, 2, 3])))
    loads = LOADS[rng.integers(len(LOADS))](rng, ranks, experts).astype(np.int64)
    if loads.sum() > MOST_TOKENS:  # many ranks, with many tokens each
        loads = loads * MOST_TOKENS // loads.sum()
    costs = None
    if rng.random() < 0.5:
        costs = Costs(
            token_ps=int(rng.choice([0, 1, 1000, 4 * 10**9])),
            copy_ps_per_kib=1024,
            replica_bytes=int(rng.choice([0, 1, 10_000, 10**6])),
            fixed_ps=int(rng.choice([0, 5000, 10**6])),
        )
    options = PlanSettings(
        int(rng.choice([1, 1, 2, 30, 1024])), int(rng.choice([0, 10_000, 100_000, 1_000_000])), costs
    )
    return loads, layout, options, int(rng.integers(ranks))


def check(loads, layout, options, source, device):
    """The kernel's plan and table are the planner's; returns the plan."""
    expected = solve(loads, layout, options)
    made = PlanKernel(layout, options, source, torch.device(device))(torch.from_numpy(loads).to(device))
    table = made.table.cpu().numpy()
    for name in ("replica_expert", "quota"):
        assert np.array_equal(getattr(made, name).cpu().numpy(), getattr(expected, name))
    assert made.decisions.shape == (len(expected.decisions), 6)
    plan = to_plan(layout, made.told.cpu().numpy())
    assert plan.decisions == expected.decisions
    assert np.array_equal(plan.replica_expert, expected.replica_expert)
    assert np.array_equal(plan.quota, expected.quota)
    assert plan.same_bits(expected)
    check_table(expected, source, table)
    return plan


def check_table(plan, source, table):
    most, room = plan.copies.shape[1], plan.layout.node_size
    tables = reroute.tables(plan, source)
    exists = plan.copies >= 0
    assert table.shape == (plan.layout.experts, 3 + 2 * room)
    assert np.array_equal(table[:, 0], exists.sum(1))
    assert np.array_equal(table[:, 1], tables[:, 0])
    assert np.array_equal(table[:, 2], np.where(table[:, 0] > 1, tables[:, 1], 1))
    assert np.array_equal(table[:, 3 : 3 + most][exists], tables[:, 2 : 2 + most][exists])
    assert np.array_equal(table[:, 3 + room : 3 + room + most][exists], tables[:, 2 + most :][exists])


def simulated(ranks, experts, imbalance, seed):
    _, loads = simulate(ranks=ranks, experts=experts, tokens=1024, topk=8, target_imbalance=imbalance, seed=seed)
    return loads


COSTS = Costs(token_ps=80_000, copy_ps_per_kib=3, replica_bytes=20 * 2**20, fixed_ps=10**7)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_random_problems(seed):
    check(*random_problem(np.random.default_rng(seed)), "cpu")


@pytest.fixture(scope="module")
def warps_of_32():
    with mock.patch("megatron_ultraep.kernels.plan.library_of", return_value=build.library("lanes")):
        yield


@pytest.mark.usefixtures("warps_of_32")
@pytest.mark.parametrize("seed", range(40))
def test_random_problems_with_warps_of_32(seed):
    # Every third may be larger than a warp.
    check(*random_problem(np.random.default_rng(seed), 16 if seed % 3 else 70), "cpu")


@pytest.mark.usefixtures("warps_of_32")
@pytest.mark.parametrize("gate", [None, COSTS])
def test_nodes_larger_than_a_warp_with_warps_of_32(gate):
    loads = simulated(64, 256, 2.0, 0)
    plan = check(loads, ExpertLayout(256, 64, slots=2), PlanSettings(128, costs=gate), 3, "cpu")
    assert plan.decisions[0].outcome == "balanced"


@pytest.mark.usefixtures("warps_of_32")
@pytest.mark.parametrize(("ranks", "homes"), [(33, 3), (64, 32), (65, 2), (128, 1), (129, 2), (3, 33)])
def test_sizes_between_variants_with_warps_of_32(ranks, homes):
    # Members of a warp keep 1, 2 or 4 ranks in registers, up to 32 experts each; more are in shared memory.
    rng = np.random.default_rng(ranks)
    layout = ExpertLayout(ranks * homes, ranks, tuple(rng.permutation(ranks * homes).tolist()), slots=2)
    for kind in (skewed, half_hot):
        loads = kind(rng, ranks, ranks * homes).astype(np.int64)
        loads = np.minimum(loads, MOST_TOKENS // loads.size)
        check(loads, layout, PlanSettings(int(rng.choice([1, 300])), 0), ranks - 1, "cpu")


def relays():
    """A node whose slots below the target run out early: 41 ranks, so more replicas than a warp has members."""
    loads = half_hot(np.random.default_rng(1), 41, 164)
    return loads, ExpertLayout(164, 41, slots=1), PlanSettings(1, 0), 40


@pytest.mark.usefixtures("warps_of_32")
def test_relays_with_warps_of_32():
    check(*relays(), "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_relays(device):
    check(*relays(), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gate", [None, COSTS])
@pytest.mark.parametrize("imbalance", [1.5, 2.0, 3.0])
@pytest.mark.parametrize(("ranks", "experts"), [(64, 256), (512, 512)])
def test_large_problems(ranks, experts, imbalance, gate, device):
    loads = simulated(ranks, experts, imbalance, 1)
    layout = ExpertLayout(experts, ranks, node_size=64, slots=2)
    plan = check(loads, layout, PlanSettings(128, costs=gate), 5, device)
    assert "balanced" in {decision.outcome for decision in plan.decisions}


@pytest.mark.parametrize("device", DEVICES)
def test_one_node_of_512_ranks(device):
    # There is room for fewer warps than attempts.
    loads = simulated(512, 512, 2.0, 2)
    plan = check(loads, ExpertLayout(512, 512, slots=2), PlanSettings(64, 0), 511, device)
    assert (plan.replica_expert >= 0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_may_be_called_again(device):
    layout = ExpertLayout(24, 6, node_size=3, slots=2)
    kernel = PlanKernel(layout, PlanSettings(1), 0, torch.device(device))
    rng = np.random.default_rng(0)
    for _ in range(3):
        loads = one_expert(rng, 6, 24).astype(np.int64)
        made = kernel(torch.from_numpy(loads).to(device))
        assert to_plan(layout, made.told.cpu().numpy()).same_bits(solve(loads, layout, PlanSettings(1)))


def test_every_way_to_decide_occurs():
    # So that the random problems above are worth something.
    seen = set()
    for seed in range(300):
        loads, layout, options, _ = random_problem(np.random.default_rng(seed))
        seen |= {decision.outcome for decision in solve(loads, layout, options).decisions}
    assert seen == {"balanced", "within_tolerance", "gain_below_cost", "no_replica_possible", "empty"}


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 4000, 500))
def test_many_random_problems_on_a_gpu(first):
    for seed in range(first, first + 500):
        try:
            check(*random_problem(np.random.default_rng(seed), 16 if seed % 4 else 130), "cuda")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def test_refusals():
    layout = ExpertLayout(8, 4, slots=1)
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="source rank from 0 to 3, got 4"):
        PlanKernel(layout, PlanSettings(), 4, device)
    with pytest.raises(ValueError, match=r"shared memory.*take smaller nodes"):
        PlanKernel(ExpertLayout(512, 512, slots=64), PlanSettings(), 0, device)
    with pytest.raises(ValueError, match="up to 65536 experts"):
        PlanKernel(replace(layout, experts=2**17, home_slot=()), PlanSettings(), 0, device)
    kernel = PlanKernel(layout, PlanSettings(), 0, device)
    for loads in (torch.zeros(4, 8), torch.zeros(4, 4, dtype=torch.int64), torch.zeros(8, 4, dtype=torch.int64).T):
        with pytest.raises(ValueError, match="contiguous int64 loads"):
            kernel(loads)
    with pytest.raises(ValueError, match="loads on cpu"):
        kernel(torch.zeros(4, 8, dtype=torch.int64, device="meta"))
