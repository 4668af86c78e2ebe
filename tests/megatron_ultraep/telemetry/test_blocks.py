import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.telemetry.blocks import Block, Shape, join, pack, row, row_nbytes
from megatron_ultraep.telemetry.records import record
from tests.megatron_ultraep.telemetry.plans import key, make_plan


@st.composite
def layouts(draw):
    per_rank, node_size, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = node_size * nodes
    home_slot = tuple(draw(st.permutations(range(per_rank * ranks))))
    return ExpertLayout(per_rank * ranks, ranks, home_slot, node_size, draw(st.integers(0, 3)))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.integers(0, 1000))
def test_a_block_gives_back_what_the_plan_says(tmp_path_factory, layout, seed):
    plan = make_plan(layout, seed, tokens=300)
    path = tmp_path_factory.mktemp("block") / "x.npz"
    path.write_bytes(pack([row(key(3, 2), 7, plan)], Shape.of(layout), group="g", meta={"topk": 2}).to_bytes())

    block = Block.read(path)
    found = record(block, 0)

    assert (found.group, found.key, found.layer, found.layout) == ("g", key(3, 2), 7, layout)
    assert block.meta == {"topk": 2}
    np.testing.assert_array_equal(found.tokens, plan.loads.sum(axis=0))
    np.testing.assert_array_equal(found.source_tokens, plan.loads.sum(axis=1))
    np.testing.assert_array_equal(found.before.sum(axis=1), plan.before)
    np.testing.assert_array_equal(found.after.sum(axis=1), plan.after)
    np.testing.assert_array_equal(found.after.sum(axis=0), plan.loads.sum(axis=0))
    np.testing.assert_array_equal(block.rank_before()[0], plan.before)
    np.testing.assert_array_equal(block.rank_after()[0], plan.after)
    assert tuple((r.expert, r.rank, r.slot) for r in found.replicas) == plan.replicas
    width = layout.experts_per_rank + layout.slots
    for replica in found.replicas:
        place = replica.rank * width + layout.experts_per_rank + replica.slot
        assert replica.tokens == plan.physical_tokens[place]
        assert replica.home == layout.home_rank(replica.expert)
        assert found.after[replica.rank, replica.expert] >= replica.tokens
    assert found.decisions == plan.decisions


def test_join_and_select_keep_every_record():
    rng = np.random.default_rng(1)
    plans = [make_plan(ExpertLayout(12, 3, tuple(rng.permutation(12).tolist()), 3, 2), i) for i in range(6)]
    shape = Shape.of(plans[0].layout)
    rows = [row(key(i, model=f"m{i % 2}", pass_=("train", "eval")[i % 2]), i, p) for i, p in enumerate(plans)]
    joined = join([pack(rows[:1], shape), pack(rows[1:3], shape), pack(rows[3:], shape)])
    joined = joined.select(np.array([True, True, False, True, True, True]))

    assert len(joined.home_slot) == 5
    for index, original in enumerate([0, 1, 3, 4, 5]):
        found = record(joined, index)
        assert found.key == rows[original].key
        assert found.layout == plans[original].layout
        np.testing.assert_array_equal(found.after.sum(axis=1), plans[original].after)


def test_row_nbytes_is_what_a_record_takes():
    plan = make_plan(ExpertLayout(16, 4, node_size=2, slots=2))
    shape = Shape.of(plan.layout)
    one, two = (pack([row(key(i), 0, plan) for i in range(n)], shape).nbytes for n in (1, 2))
    assert abs(two - one - row_nbytes(shape)) <= 16


def test_a_plan_that_does_not_fit_its_layout_is_refused():
    plan = make_plan(ExpertLayout(16, 4, node_size=2, slots=1))
    object.__setattr__(plan, "decisions", plan.decisions[:1])
    with pytest.raises(ValueError, match=r"micro-batch 0, layer 5: expected .* 2 decisions, got .* 1"):
        row(key(), 5, plan)


def test_unreadable_files_say_which(tmp_path):
    plan = make_plan()
    good = pack([row(key(), 0, plan)], Shape.of(plan.layout)).to_bytes()
    damaged = bytearray(good)
    damaged[good.index(b"tokens.npy") + 60] ^= 255
    for content in (b"", b"text", good[: len(good) // 2], good[:-1], bytes(damaged)):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"x\.npz|No data"):
            Block.read(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"y\.npz: expected a chunk of load records"):
        Block.read(tmp_path / "y.npz")
