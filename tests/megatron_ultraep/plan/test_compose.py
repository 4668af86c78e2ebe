"""Composed micro-batches hold the same samples, are never worse than packed ones, and balance where they can."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.layout import BatchLayout, ExpertLayout
from megatron_ultraep.plan import compose_search
from megatron_ultraep.plan.compose import Gain, Objective, compose, gain, objective


@st.composite
def batches(draw):
    """Samples with histograms, layouts and the arguments of ``compose``; every sample fits into a micro-batch."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    node_size, nodes, per_rank = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = node_size * nodes
    experts, layers, slots = ranks * per_rank, draw(st.integers(1, 3)), draw(st.integers(0, 2))
    layouts = [
        ExpertLayout(experts, ranks, tuple(rng.permutation(experts).tolist()), node_size, slots) for _ in range(layers)
    ]
    row_multiple = draw(st.sampled_from([1, 4]))
    budget = draw(st.integers(8, 100))
    sizes = st.integers(1, budget // row_multiple * row_multiple)
    rows = draw(st.lists(sizes, min_size=1, max_size=30))
    histograms = [
        np.stack([rng.multinomial(n, rng.dirichlet(np.full(experts, 0.3))) for _ in range(layers)]) for n in rows
    ]
    group_ranks = draw(st.sampled_from([1, 2]))
    return rows, histograms, layouts, {
        "data_parallel": group_ranks * draw(st.integers(1, 2)),
        "tokens_per_micro_batch": budget,
        "row_multiple": row_multiple,
        "micro_batch_multiple": draw(st.integers(1, 2)),
    }, group_ranks  # fmt: skip


def ids(rows):
    return [f"s{i}" for i in range(len(rows))]


def rows_computed(batch):
    return sum(m.rows for rank in batch.micro_batches for m in rank)


def counted_objective(batch, histograms, layouts, group_ranks):
    """The objective by its definition, expert by expert."""
    tokens = ideal = 0
    for micro_batch in range(batch.num_microbatches):
        for first in range(0, batch.data_parallel, group_ranks):
            group = [batch.micro_batches[rank][micro_batch] for rank in range(first, first + group_ranks)]
            members = [s.sample for m in group for s in m.segments]
            for layer, layout in enumerate(layouts):
                load = [sum(int(histograms[i][layer][e]) for i in members) for e in range(layout.experts)]
                nodes = layout.ranks // layout.node_size
                by_rank = [[load[e] for e in layout.experts_of(rank)] for rank in range(layout.ranks)]
                if not layout.slots:
                    parts = [sum(mine) for mine in by_rank]
                elif nodes > 1:
                    per_node = layout.node_size
                    parts = [sum(map(sum, by_rank[n * per_node : (n + 1) * per_node])) for n in range(nodes)]
                else:
                    parts = [sum(sorted(mine)[: max(0, len(mine) - layout.slots)]) for mine in by_rank]
                mean = -(-sum(load) // len(parts))
                tokens += max(*parts, mean)
                ideal += mean
    return Objective(tokens, ideal)


@settings(deadline=None, max_examples=60)
@given(batches())
def test_compose_keeps_its_promises(batch):
    rows, histograms, layouts, kwargs, group_ranks = batch
    packed = BatchLayout.pack(ids(rows), rows, **kwargs)
    found = compose(ids(rows), rows, histograms, layouts, **kwargs, group_ranks=group_ranks, work=300_000)
    assert (found.sample_ids, found.sample_rows) == (packed.sample_ids, packed.sample_rows)
    segments = [s for rank in range(found.data_parallel) for _, s in found.segments(rank)]
    assert sorted((s.sample, s.start, s.rows) for s in segments) == [(i, 0, n) for i, n in enumerate(rows)]
    assert found.num_microbatches == packed.num_microbatches
    assert rows_computed(found) <= rows_computed(packed)
    for micro_batch in (m for rank in found.micro_batches for m in rank):
        assert micro_batch.used <= micro_batch.rows <= kwargs["tokens_per_micro_batch"]
    both = gain(packed, found, histograms, layouts, group_ranks=group_ranks)
    assert both.before == counted_objective(packed, histograms, layouts, group_ranks)
    assert both.after == counted_objective(found, histograms, layouts, group_ranks)
    assert both.after.ideal <= both.after.tokens <= both.before.tokens
    assert found == compose(ids(rows), rows, histograms, layouts, **kwargs, group_ranks=group_ranks, work=300_000)


def one_hot(expert, rows, experts=4):
    histogram = np.zeros((1, experts), dtype=np.int32)
    histogram[0, expert] = rows
    return histogram


def test_like_samples_are_parted():
    # Two nodes of one rank; by length alone, both samples of expert 0 meet in the first micro-batch.
    layouts = [ExpertLayout(4, 2, node_size=1, slots=1)]
    rows, histograms = [10, 10, 10, 10], [one_hot(e, 10) for e in (0, 0, 3, 3)]
    kwargs = {"data_parallel": 2, "tokens_per_micro_batch": 10}
    packed = BatchLayout.pack(ids(rows), rows, **kwargs)
    found = compose(ids(rows), rows, histograms, layouts, **kwargs, work=100_000)
    both = gain(packed, found, histograms, layouts)
    assert both == Gain(Objective(40, 20), Objective(20, 20))
    assert both.fewer_tokens == 0.5
    assert (both.before.imbalance, both.after.imbalance) == (2.0, 1.0)


def test_no_gain_where_every_sample_is_alike():
    layouts = [ExpertLayout(4, 2, node_size=1, slots=1)]
    rows = [10, 9, 8, 7]
    histograms = [np.array([[4 * n, n, n, n]]) for n in rows]
    kwargs = {"data_parallel": 2, "tokens_per_micro_batch": 12}
    packed = BatchLayout.pack(ids(rows), rows, **kwargs)
    found = compose(ids(rows), rows, histograms, layouts, **kwargs, work=100_000)
    assert gain(packed, found, histograms, layouts).fewer_tokens == 0


def test_ranks_of_one_micro_batch_index_are_one_load():
    # A single micro-batch a rank: exchanging samples between ranks of one expert-parallel group changes nothing.
    layouts = [ExpertLayout(4, 2, node_size=1, slots=1)]
    rows, histograms = [10, 10], [one_hot(0, 10), one_hot(0, 10)]
    kwargs = {"data_parallel": 2, "tokens_per_micro_batch": 10}
    assert compose(ids(rows), rows, histograms, layouts, **kwargs) == BatchLayout.pack(ids(rows), rows, **kwargs)


def test_extra_rows_buy_balance():
    # Lengths differ, so whole micro-batches change places only where padding may grow.
    layouts = [ExpertLayout(4, 2, node_size=1, slots=1)]
    rows = [100, 99, 90, 89]
    histograms = [one_hot(e, n) for e, n in zip((0, 0, 3, 3), rows, strict=True)]
    kwargs = {"data_parallel": 2, "tokens_per_micro_batch": 100, "work": 100_000}
    strict = compose(ids(rows), rows, histograms, layouts, **kwargs)
    loose = compose(ids(rows), rows, histograms, layouts, **kwargs, extra_rows_ppm=60_000)
    assert rows_computed(strict) == 2 * 190
    assert rows_computed(strict) < rows_computed(loose) <= 2 * 190 * 1.06
    assert objective(loose, histograms, layouts).tokens < objective(strict, histograms, layouts).tokens


def test_compiled_search_is_the_python_search():
    rng = np.random.default_rng(3)
    rows = rng.integers(20, 30, 24)
    cells = rng.integers(0, 9, (24, 2, 6)).astype(np.int32)
    arguments = (
        cells, rows, np.arange(24) % 8, np.argsort(-rows, kind="stable"), 8, 2, 1, 3, 1, 4, 100, 0, 30_000, 7,
    )  # fmt: skip
    compiled, made = compose_search.compiled()(*arguments)
    plain, made_plain = compose_search.improve(*arguments)
    assert made == made_plain > 0
    np.testing.assert_array_equal(compiled, plain)


def test_no_work_is_pack():
    rows, histograms = [10] * 4, [one_hot(e, 10) for e in (0, 0, 3, 3)]
    layouts = [ExpertLayout(4, 2, node_size=1, slots=1)]
    kwargs = {"data_parallel": 2, "tokens_per_micro_batch": 10}
    packed = BatchLayout.pack(ids(rows), rows, **kwargs)
    assert compose(ids(rows), rows, histograms, layouts, **kwargs, work=0) == packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histograms": [one_hot(0, 10)]}, "one histogram per sample, got 1 for 2"),
        (
            {"histograms": [one_hot(0, 10, 8)] * 2},
            r"\[MoE layers, experts\] = \[1, 4\], got int32 \[1, 8\] for sample 0",
        ),
        ({"histograms": [one_hot(0, 10).astype(float)] * 2}, "expected integer histograms"),
        ({"layouts": []}, "got none"),
        ({"layouts": [ExpertLayout(4, 2), ExpertLayout(4, 2, slots=1)]}, "layouts of one shape"),
        ({"group_ranks": 3}, "divide the 2 data-parallel ranks, got 3"),
        ({"work": -1}, ">= 0"),
        ({"rows": [11, 10]}, "sample s0 has 11 rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"rows": [10, 10], "histograms": [one_hot(0, 10)] * 2, "layouts": [ExpertLayout(4, 2)]} | change
    rows, histograms, layouts = (arguments.pop(name) for name in ("rows", "histograms", "layouts"))
    with pytest.raises(ValueError, match=message):
        compose(
            ids(rows), rows, histograms, layouts, data_parallel=2, tokens_per_micro_batch=10, **arguments
        )  # fmt: skip
