"""Orders and places of buckets: the invariants of ``rl.transfer.turns``."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.transfer.plan import ALIGNMENT, TensorSpec, make_plan
from rl.transfer.turns import Turn, places, staging_bytes, turns_of


def plan_of(owners, sizes, bucket_bytes):
    """Tensor i, ``sizes[i]`` floats of parameter (i // 2, 0, 0), belongs to source ``owners[i]``."""
    shares = {}
    for i, (owner, size) in enumerate(zip(owners, sizes, strict=True)):
        shares.setdefault(owner, []).append(TensorSpec(f"t{i}", (size,), "float32"))
    keys = {f"t{i}": (i // 2, 0, 0) for i in range(len(owners))}
    return make_plan(shares, bucket_bytes), keys


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), min_size=1, max_size=60), st.integers(1, 4000))
def test_every_bucket_has_a_turn_and_nobody_waits_for_a_later_one(tensors, bucket_bytes):
    plan, keys = plan_of([owner for owner, _ in tensors], [size for _, size in tensors], bucket_bytes)
    turns = turns_of(plan, keys)
    assert sorted((t.source, t.index) for t in turns) == [(s, b.index) for s, bs in enumerate(plan.buckets) for b in bs]
    handed = [0] * len(plan.ranks)
    for turn in turns:
        assert turn.index == handed[turn.source]
        handed[turn.source] += 1
        for source, buckets in enumerate(plan.buckets):
            # What is exported before this turn, of buckets whose turn has not come: one of them is not full yet.
            begun = {
                bucket.index
                for bucket in buckets[handed[source] :]
                if any(keys[p.tensor.name] <= turn.after for p in bucket.pieces)
            }
            complete = [
                i for i in begun if all(keys[p.tensor.name] < turn.after for p in plan.buckets[source][i].pieces)
            ]
            assert not complete
    assert turns_of(plan, keys) == turns


def test_turns_follow_layers_not_sources():
    plan, keys = plan_of([0, 0, 1, 1, 0, 0], [100] * 6, 1000)
    assert [(t.source, t.index) for t in turns_of(plan, keys)] == [(0, 0), (1, 0), (0, 1)]
    assert turns_of(plan, keys)[1] == Turn(1, 0, (1, 0, 0))


def test_tensors_without_a_key_or_out_of_order_are_refused():
    plan, keys = plan_of([0, 0, 0], [10] * 3, 1 << 20)
    with pytest.raises(ValueError, match="t2"):
        turns_of(plan, {name: key for name, key in keys.items() if name != "t2"})
    with pytest.raises(ValueError, match="layer order"):
        turns_of(plan, keys | {"t0": (9, 0, 0)})


@given(st.lists(st.integers(1, 3000), max_size=80), st.integers(3000, 9000), st.integers(1, 8))
def test_places_of_buckets_that_are_not_taken_never_overlap(sizes, capacity, most):
    found = places(sizes, capacity, most)
    assert [p.taken_before for p in found] == sorted(p.taken_before for p in found)
    for number, place in enumerate(found):
        assert place.offset % ALIGNMENT == 0
        assert place.offset + sizes[number] <= capacity
        assert place.taken_before <= number
        assert number - place.taken_before < most
        for other in range(place.taken_before, number):
            begin, end = found[other].offset, found[other].offset + sizes[other]
            assert end <= place.offset or place.offset + sizes[number] <= begin


def test_equal_buckets_go_round_in_as_many_places_as_there_is_room_for():
    found = places([1000] * 7, 3 * 1024, 64)
    assert [p.offset for p in found] == [0, 1024, 2048, 0, 1024, 2048, 0]
    assert [p.taken_before for p in found] == [0, 0, 0, 1, 2, 3, 4]


def test_a_bucket_larger_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="bucket 1 has 5000 bytes"):
        places([10, 5000], 4096, 8)


def test_room_is_for_three_buckets_or_the_largest_tensor():
    usual, _ = plan_of([0] * 8, [256] * 8, 1024)
    assert staging_bytes(usual) == 3 * 1024
    one_large, _ = plan_of([0] * 3, [256, 4096, 256], 1024)
    assert staging_bytes(one_large) == 4096 * 4
    small, _ = plan_of([0], [64], 1 << 30)
    assert staging_bytes(small) == 3 * 256
