"""Weights arrive in slots, gradients come home in the order of the moves, however few staging buffers there are."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.runtime.slots import ExpertShape, SlotPool
from megatron_ultraep.runtime.transport import CollectiveTransport, Move, _waves

SHAPE = ExpertShape(("a", "b"), ((2, 3), (4,)), torch.float64, torch.device("cpu"))


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


def move_around(moves, staging):
    """Slots' contents after placing, and what came home, on this rank."""
    transport = CollectiveTransport(dist.new_group(list(range(dist.get_world_size()))))
    pool = SlotPool(SHAPE, 2, staging)
    homes = [
        [torch.full(s, 10.0 * transport.rank + place, dtype=torch.float64) for s in SHAPE.shapes] for place in (0, 1)
    ]
    transport.place(moves, homes.__getitem__, pool.weights)
    slots = {s: float(pool.weights[s][1][0]) for s in range(2)}
    gradients = pool.gradients(torch.float32)
    for move in moves:
        if move.rank == transport.rank:
            for buffer in gradients[move.slot]:
                buffer.fill_(100 * move.expert + move.rank)
    came = []
    transport.send_home(
        moves, gradients, pool.received(torch.float32), lambda place, g: came.append((place, float(g[1][0])))
    )
    loads = transport.gather_loads(torch.tensor([transport.rank, 7]))
    transport.close()
    return slots, came, loads.tolist()


@pytest.mark.parametrize("staging", [1, 2])
def test_place_and_send_home(ranks, staging):
    # Expert e at home on rank e // 2; rank 0's expert 1 goes to both others, one rank both sends and receives.
    moves = [Move(1, 0, 1, 1, 0), Move(1, 0, 1, 2, 1), Move(0, 0, 0, 2, 0), Move(2, 1, 0, 0, 1)]
    results = ranks(3).run(move_around, moves, staging)
    assert results[0][0] == {0: 0.0, 1: 10.0}
    assert results[1][0] == {0: 1.0, 1: 0.0}
    assert results[2][0] == {0: 0.0, 1: 1.0}
    assert results[0][1] == [(1, 101.0), (1, 102.0), (0, 2.0)]
    assert results[1][1] == [(0, 200.0)]
    assert results[2][1] == []
    assert all(loads == [[0, 7], [1, 7], [2, 7]] for _, _, loads in results)
