"""Micro-batches hold every row once, under the budget and evenly; expert layouts are permutations."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ultraep.layout import BatchLayout, ExpertLayout, MicroBatch, MicroBatchKey, Segment


@st.composite
def batches(draw):
    """Row counts, and the arguments of ``pack``; every sample fits into a micro-batch."""
    row_multiple = draw(st.sampled_from([1, 2, 4, 8]))
    budget = draw(st.integers(row_multiple, 200))
    rows = draw(st.lists(st.integers(1, budget // row_multiple * row_multiple), min_size=1, max_size=40))
    return rows, {
        "data_parallel": draw(st.integers(1, 5)),
        "tokens_per_micro_batch": budget,
        "row_multiple": row_multiple,
        "micro_batch_multiple": draw(st.integers(1, 4)),
    }


def pack(rows, **kwargs):
    return BatchLayout.pack([f"s{i}" for i in range(len(rows))], rows, **kwargs)


@given(batches())
def test_pack_keeps_its_promises(batch):
    rows, kwargs = batch
    layout = pack(rows, **kwargs)
    placed = np.concatenate(
        [
            [(s.sample, s.start + i) for i in range(s.rows)]
            for rank in range(layout.data_parallel)
            for _, s in layout.segments(rank)
        ]
    )
    assert sorted(map(tuple, placed)) == [(i, row) for i, n in enumerate(rows) for row in range(n)]
    assert layout.data_parallel == kwargs["data_parallel"]
    assert {len(micro_batches) for micro_batches in layout.micro_batches} == {layout.num_microbatches}
    assert layout.num_microbatches % kwargs["micro_batch_multiple"] == 0
    for same_index in zip(*layout.micro_batches, strict=True):
        assert len({m.rows for m in same_index}) == 1
        assert max(m.used for m in same_index) > same_index[0].rows - kwargs["row_multiple"] or not any(
            m.used for m in same_index
        )
    for micro_batch in (m for rank in layout.micro_batches for m in rank):
        assert 1 <= micro_batch.rows <= kwargs["tokens_per_micro_batch"]
        assert micro_batch.rows % kwargs["row_multiple"] == 0
        assert micro_batch.used <= micro_batch.rows
        ends = [0, *(s.offset + s.rows for s in micro_batch.segments)]
        assert [s.offset for s in micro_batch.segments] == ends[:-1]
    assert layout == pack(rows, **kwargs)
    computed = sum(m.rows for rank in layout.micro_batches for m in rank)
    assert layout.padding_fraction() == pytest.approx(1 - sum(rows) / computed)


@given(batches())
def test_positions_count_from_the_start_of_each_sequence(batch):
    rows, kwargs = batch
    for micro_batch in (m for rank in pack(rows, **kwargs).micro_batches for m in rank):
        lengths = [s.rows for s in micro_batch.segments]
        if micro_batch.rows > micro_batch.used:
            lengths.append(micro_batch.rows - micro_batch.used)
        assert micro_batch.cu_seqlens().tolist() == [0, *np.cumsum(lengths)]
        assert micro_batch.positions().tolist() == [i for n in lengths for i in range(n)]


def test_of_contents_places_what_it_is_told():
    layout = BatchLayout.of_contents(["a", "b", "c"], [3, 4, 2], [[[2, 0], []], [[], [1]]], row_multiple=4)
    assert [[m.rows for m in rank] for rank in layout.micro_batches] == [[8, 4], [8, 4]]
    assert layout.micro_batches[0][0].segments == (Segment(2, 0, 2, 0), Segment(0, 0, 3, 2))
    assert [m.used for rank in layout.micro_batches for m in rank] == [5, 0, 0, 4]


def test_of_contents_refuses_what_is_no_packing():
    with pytest.raises(ValueError, match=r"same number of micro-batches on every rank, got \[1, 2\]"):
        BatchLayout.of_contents(["a", "b"], [3, 4], [[[0]], [[1], []]])
    for contents in ([[[0]]], [[[0, 1, 1]]], [[[0, 2]]]):
        with pytest.raises(ValueError, match="each of 2 samples in one micro-batch"):
            BatchLayout.of_contents(["a", "b"], [3, 4], contents)


def test_pack_by_hand():
    # Two micro-batches of 10 rows suffice; the longest go first, each to the emptiest.
    layout = pack([4, 7, 2, 6], data_parallel=2, tokens_per_micro_batch=10)
    assert [[[s.sample for s in m.segments] for m in rank] for rank in layout.micro_batches] == [[[0, 3]], [[1, 2]]]
    assert [[m.rows for m in rank] for rank in layout.micro_batches] == [[10], [10]]
    assert layout.padding_fraction() == pytest.approx(1 / 20)


def test_the_balanced_filling_overflows_where_first_fit_does_not():
    # First fit finds 5+5 and 4+3+3; filling two evenly ends in 5+4 and 5+3+3, so a third is opened.
    layout = pack([5, 5, 4, 3, 3], data_parallel=1, tokens_per_micro_batch=10)
    assert layout.num_microbatches == 3
    assert max(m.used for m in layout.micro_batches[0]) <= 10


def test_fewer_samples_than_micro_batches_leaves_some_to_padding():
    layout = pack([5], data_parallel=2, tokens_per_micro_batch=8, row_multiple=2, micro_batch_multiple=2)
    assert [[m.used for m in rank] for rank in layout.micro_batches] == [[5, 0], [0, 0]]
    assert [[m.rows for m in rank] for rank in layout.micro_batches] == [[6, 2], [6, 2]]
    empty = layout.micro_batches[1][0]
    assert empty.cu_seqlens().tolist() == [0, 6]
    assert empty.positions().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("ids", "rows", "change", "message"),
    [
        ([], [], {}, "one row count per sample, got 0 ids"),
        (["a"], [1, 2], {}, "got 1 ids, 2 counts"),
        (["a", "b"], [4, 9], {}, r"sample b has 9 rows .* raise tokens_per_micro_batch \(8\)"),
        (["a"], [8], {"tokens_per_micro_batch": 9, "row_multiple": 5}, r"sample a has 8 rows \(tokens - 1\), expected"),
        (["a"], [0], {}, "sample a has 0 rows"),
        (["a", "b", "a"], [1, 1, 1], {}, "distinct sample ids, got 'a' more than once"),
        (["a"], [1], {"data_parallel": 0}, "data_parallel >= 1, got 0"),
        (["a"], [1], {"row_multiple": 0}, "row_multiple >= 1, got 0"),
        (["a"], [1], {"micro_batch_multiple": -1}, "micro_batch_multiple >= 1, got -1"),
    ],
)
def test_pack_refuses(ids, rows, change, message):
    with pytest.raises(ValueError, match=message):
        BatchLayout.pack(ids, rows, **({"data_parallel": 1, "tokens_per_micro_batch": 8} | change))


def test_segments_come_in_execution_order():
    micro_batch = MicroBatch((Segment(2, 0, 3, 0), Segment(0, 0, 1, 3)), rows=4)
    layout = BatchLayout(("a", "b", "c"), (1, 2, 3), ((micro_batch, MicroBatch((Segment(1, 0, 2, 0),), rows=4)),))
    assert [(i, s.sample) for i, s in layout.segments(0)] == [(0, 2), (0, 0), (1, 1)]


def test_keys_are_values():
    key = MicroBatchKey("actor", "train", 3, 1)
    assert pickle.loads(pickle.dumps(key)) == key
    assert len({key, MicroBatchKey("actor", "train", 3, 1), MicroBatchKey("actor", "eval", 3, 1)}) == 2
    assert str(key) == "actor/train/step 3/micro-batch 1"


@given(st.data())
def test_an_expert_layout_is_a_permutation(data):
    ranks = data.draw(st.integers(1, 8))
    experts = ranks * data.draw(st.integers(1, 6))
    layout = ExpertLayout(experts, ranks, tuple(data.draw(st.permutations(range(experts)))))
    assert [layout.expert_at[layout.home_slot[e]] for e in range(experts)] == list(range(experts))
    homes = [layout.experts_of(rank) for rank in range(ranks)]
    assert {len(experts_of_one) for experts_of_one in homes} == {layout.experts_per_rank}
    assert sorted(e for experts_of_one in homes for e in experts_of_one) == list(range(experts))
    assert all(layout.home_rank(e) == rank for rank in range(ranks) for e in homes[rank])
    assert sum(homes, ()) == layout.expert_at


def test_an_expert_layout_is_the_identity_at_first():
    layout = ExpertLayout(8, 4)
    assert layout.home_slot == tuple(range(8))
    assert [layout.experts_of(rank) for rank in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert (layout.node_size, layout.slots) == (4, 0)
    moved = ExpertLayout(4, 2, home_slot=(2, 0, 3, 1))
    assert [moved.experts_of(rank) for rank in range(2)] == [(1, 3), (0, 2)]
    assert [moved.home_rank(e) for e in range(4)] == [1, 0, 1, 0]
    assert hash(moved) == hash(ExpertLayout(4, 2, (2, 0, 3, 1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 6, "ranks": 4}, "choose an expert-parallel size that divides 6"),
        ({"experts": 0, "ranks": 1}, "got 0 experts"),
        ({"experts": 2, "ranks": 0}, "on 0 ranks"),
        ({"experts": 4, "ranks": 2, "home_slot": (0, 1, 2, 2)}, r"permutation of 0..3, got \(0, 1, 2, 2\)"),
        ({"experts": 4, "ranks": 2, "home_slot": (0, 1)}, "permutation"),
        ({"experts": 8, "ranks": 4, "node_size": 3}, "node_size 3 must divide the 4"),
        ({"experts": 8, "ranks": 4, "slots": -1}, "slots must be >= 0"),
    ],
)
def test_an_expert_layout_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertLayout(**fields)
