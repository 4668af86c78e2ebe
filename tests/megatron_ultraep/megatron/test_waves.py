"""Waves move every element where it belongs, in bounded memory, whatever the permutation and the cuts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.megatron.waves import Tensor, copies, cycles, rounds, waves


@given(st.permutations(range(9)), st.permutations(range(9)))
def test_cycles_are_the_change_of_homes(before, after):
    found = cycles(before, after)
    goes_to = {a: b for a, b in zip(before, after, strict=True) if a != b}
    assert {a: b for cycle in found for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True)} == goes_to


def cut(numel, ranks, rng):
    edges = [0, *sorted(rng.integers(0, numel + 1, len(ranks) - 1)), numel]
    return [(rank, int(a), int(b)) for rank, a, b in zip(ranks, edges, edges[1:], strict=False)]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ep=st.integers(1, 4),
    edp=st.integers(1, 3),
    width=st.integers(1, 3),
    numel=st.integers(1, 40),
    sharded=st.booleans(),
    itemsize=st.sampled_from([2, 4, 8]),
    room=st.integers(1, 50),
)
def test_every_element_arrives(seed, ep, edp, width, numel, sharded, itemsize, room):
    rng = np.random.default_rng(seed)
    slots = ep * width
    tensor = Tensor(1, "w", "main", numel, itemsize)
    grid = [[e * edp + d for d in range(edp)] for e in range(ep)]
    holders = {
        slot: cut(numel, grid[slot // width], rng) if sharded else [(r, 0, numel) for r in grid[slot // width]]
        for slot in range(slots)
    }
    before, after = rng.permutation(slots).tolist(), rng.permutation(slots).tolist()
    # memory[rank][slot]: what the rank holds; the value says whose element it is
    memory = {r: {} for row in grid for r in row}
    expert_in = {slot: expert for expert, slot in enumerate(before)}
    for slot, extents in holders.items():
        for rank, start, stop in extents:
            memory[rank][slot] = {i: (expert_in[slot], i) for i in range(start, stop)}
    limit = 2 * width * itemsize * room
    every = [r for cycle in cycles(before, after) for r in rounds(tensor, cycle, holders, limit)]
    for wave in waves(every, limit):
        staged = dict.fromkeys(memory, 0)
        read = []
        for t in wave:
            staged[t.source] += t.bytes
            staged[t.target] += t.bytes
            read.append([memory[t.source][t.source_slot][i] for i in range(t.start, t.stop)])
        assert max(staged.values()) <= limit
        for t, values in zip(wave, read, strict=True):
            for i, value in zip(range(t.start, t.stop), values, strict=True):
                assert i in memory[t.target][t.target_slot]
                memory[t.target][t.target_slot][i] = value
    expert_now = {slot: expert for expert, slot in enumerate(after)}
    for rank in memory:
        for slot, values in memory[rank].items():
            assert all(value == (expert_now[slot], i) for i, value in values.items())


def test_parts_must_make_up_the_whole():
    assert copies([(0, 0, 4), (1, 0, 4)], 4) == [((0, 0, 4),), ((1, 0, 4),)]
    assert copies([(1, 3, 4), (0, 0, 3), (2, 0, 0)], 4) == [((0, 0, 3), (1, 3, 4))]
    assert copies([(0, 0, 0)], 4) == []
    for wrong in ([(0, 0, 3)], [(0, 0, 3), (1, 2, 4)], [(0, 0, 1), (1, 2, 4)]):
        with pytest.raises(ValueError, match="without gap or overlap"):
            copies(wrong, 4)


def test_a_limit_below_an_element_is_refused():
    with pytest.raises(ValueError, match="limit_bytes >= 16"):
        list(rounds(Tensor(1, "w", "main", 4, 8), (0, 1), {0: [(0, 0, 4)], 1: [(1, 0, 4)]}, 15))
