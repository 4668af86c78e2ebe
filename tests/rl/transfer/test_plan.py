"""Plans: every tensor once, in order, in buckets of the size asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.transfer.plan import ALIGNMENT, Holding, TensorSpec, choose_leaders, make_plan, plan_transfer


def spec(name, elements, dtype="bfloat16"):
    return TensorSpec(name, (elements,), dtype)


shares = st.lists(
    st.lists(st.tuples(st.integers(0, 4000), st.sampled_from(["float32", "bfloat16"])), max_size=20),
    min_size=1,
    max_size=4,
).filter(any)


@settings(max_examples=60, deadline=None)
@given(shares, st.integers(1, 20000))
def test_every_tensor_is_in_one_place_of_one_bucket(sizes, bucket_bytes):
    given_shares = {
        3 * rank: [spec(f"t{rank}.{i}", n, dtype) for i, (n, dtype) in enumerate(entries)]
        for rank, entries in enumerate(sizes)
    }
    plan = make_plan(given_shares, bucket_bytes)
    assert list(plan.ranks) == [rank for rank, specs in given_shares.items() if specs]
    assert [plan.names(s) for s in range(len(plan.ranks))] == [
        tuple(t.name for t in specs) for specs in given_shares.values() if specs
    ]
    for source in plan.buckets:
        for bucket in source:
            ends = [p.offset + p.tensor.nbytes for p in bucket.pieces]
            starts = [p.offset for p in bucket.pieces]
            assert all(offset % ALIGNMENT == 0 for offset in starts)
            assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
            assert bucket.nbytes == ends[-1]
            assert bucket.nbytes <= bucket_bytes or len(bucket.pieces) == 1
    assert plan.nbytes == sum(t.nbytes for specs in given_shares.values() for t in specs)
    assert plan.manifest == {t.name: t.shape for specs in given_shares.values() for t in specs}
    assert plan.digest == make_plan(given_shares, bucket_bytes).digest


def test_plans_that_differ_have_other_digests():
    digests = {
        make_plan({0: [spec("a", 8), spec("b", 8)]}, 10_000).digest,
        make_plan({0: [spec("b", 8), spec("a", 8)]}, 10_000).digest,
        make_plan({0: [spec("a", 8), spec("b", 8)]}, 1).digest,
        make_plan({0: [spec("a", 8)], 1: [spec("b", 8)]}, 10_000).digest,
        make_plan({0: [spec("a", 8, "float16"), spec("b", 8)]}, 10_000).digest,
    }
    assert len(digests) == 5


def announced(replicas=2, parameters=6):
    """Each parameter on every replica; parameter i has i + 1 elements; ranks 2r and 2r+1 are tensor-parallel peers."""
    return [
        [Holding((0, i, 0), (spec(f"p{i}", i + 1),), 2 * (rank // 2)) for i in range(parameters)]
        for rank in range(2 * replicas)
    ]


def test_replicas_share_the_work_or_the_first_does_all():
    assert set(choose_leaders(announced(), spread=False).values()) == {0}
    chosen = choose_leaders(announced())
    loads = {leader: sum(2 * (key[1] + 1) for key, who in chosen.items() if who == leader) for leader in (0, 2)}
    assert loads == {0: 22, 2: 20}
    plan = plan_transfer(announced(), 1 << 20)
    assert plan.ranks == (0, 2)
    assert sorted(plan.names(0) + plan.names(1)) == [f"p{i}" for i in range(6)]
    assert plan_transfer(announced(), 1 << 20, spread=False).names(0) == tuple(f"p{i}" for i in range(6))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="these have several: a"):
        make_plan({0: [spec("a", 1)], 1: [spec("a", 1)]}, 10)
    with pytest.raises(ValueError, match="got none"):
        make_plan({0: []}, 10)
    with pytest.raises(ValueError, match="bucket_bytes must be >= 1"):
        make_plan({0: [spec("a", 1)]}, 0)
    with pytest.raises(ValueError, match="int8"):
        make_plan({0: [spec("a", 1, "int8")]}, 10)
    other = [Holding((0, 0, 0), (spec("p0", 9),), 0)]
    with pytest.raises(ValueError, match="the same model with the same dtype"):
        choose_leaders([announced()[0], other])
