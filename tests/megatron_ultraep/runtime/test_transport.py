"""Weights arrive in slots, gradients come home in the order of ranks: every transport, any lateness of any rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.runtime.transport import Move, _waves, moves_of
from scripts.gpu_ranks import GpuPools
from tests.megatron_ultraep.runtime import exchange
from tests.megatron_ultraep.runtime.exchange import layout_of, plan_of

TRANSPORTS = ["collective", "symmetric"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20), st.integers(1, 3))
def test_waves(pairs, width):
    moves = [Move(i, home, 0, rank, 0) for i, (home, rank) in enumerate(pairs)]
    waves = _waves(moves, width)
    assert sorted((m for w in waves for m in w), key=lambda m: m.expert) == moves
    for home in range(4):
        order = [m for w in waves for m in w if m.home == home]
        assert order == [m for m in moves if m.home == home], "another order of summation"
        assert all(sum(m.home == home for m in w) <= width for w in waves)


def test_moves_are_ordered_by_expert_then_rank():
    planned = plan_of(layout_of(3, 6, 2), [[2, -1], [1, -1], [0, 1]])
    assert moves_of(planned.plan) == (
        Move(0, 0, 0, 2, 0),
        Move(1, 0, 1, 1, 0),
        Move(1, 0, 1, 2, 1),
        Move(2, 1, 0, 0, 0),
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_replicas(device_ranks, transport):
    layout = layout_of(2, 6, 3, home_slot=(5, 0, 3, 1, 4, 2))
    assert device_ranks(2).run(exchange.exchange_many, transport, layout, range(12)) == [[], []]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_three_ranks(ranks, transport):
    """One expert on both other ranks; ranks that send and receive; more gradients than are received at a time."""
    assert ranks(3).run(exchange.exchange_many, transport, layout_of(3, 6, 2), range(12)) == [[], [], []]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nodes(ranks, transport):
    layout = layout_of(4, 8, 2, node_size=2)
    assert ranks(4).run(exchange.exchange_many, transport, layout, range(6)) == [[]] * 4


@pytest.mark.parametrize("seed", range(3))
def test_late_ranks(device_ranks, seed):
    """Each kernel on each rank may be late; calls follow each other without anybody else's synchronisation."""
    layout = layout_of(2, 4, 2)
    late = device_ranks(2).run(
        exchange.exchange_many, "symmetric", layout, range(seed, seed + 16), delays_ns=2_000_000, seed=seed
    )
    assert late == [[], []]


def test_forwards_that_were_given_up(device_ranks):
    assert device_ranks(2).run(exchange.given_up, "symmetric", layout_of(2, 4, 2)) == [[], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradient_dtypes(device_ranks, dtype):
    weights = {torch.float64: torch.float32, torch.float16: torch.float16}.get(dtype, torch.bfloat16)
    wrong = device_ranks(2).run(
        exchange.exchange_many, "symmetric", layout_of(2, 4, 2), range(6), dtype=weights, gradient_dtype=dtype
    )
    assert wrong == [[], []]


def test_sums_have_the_same_bits_however_late_ranks_are(ranks):
    first, second = (
        ranks(3).run(exchange.unordered_sums, "symmetric", layout_of(3, 3, 1), 3_000_000, s) for s in (1, 2)
    )
    for (mine, zeros), (again, _) in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
        assert zeros == [0.0] * len(zeros)
    assert any(bool(t.any()) for t in first[0][0])


def test_waiting_has_a_limit(ranks):
    said = ranks(2).run(exchange.wait_in_vain, layout_of(2, 2, 1))
    assert "rank 0 waited 0.5 s for rank 1 to free its weight slots (call 1)" in said[0]


@pytest.mark.gpu
def test_waiting_on_a_gpu_has_a_limit():
    pools = GpuPools()  # of its own: a device that has trapped is of no more use
    try:
        (raised, said), _ = pools(2).run(exchange.wait_in_vain_on_a_gpu, layout_of(2, 2, 1))
    finally:
        pools.stop()
    assert "CUDA error" in raised
    assert "rank 0 waited 2 s for rank 1 to free its weight slots (call 1)" in said
