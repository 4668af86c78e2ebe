"""Loads foreseen are those that routers of the assembled routes have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.plan.foresight import needed_counts, step_loads
from megatron_ultraep.replay.histogram import histogram
from megatron_ultraep.replay.slicing import assemble, overlap, router_rows


def batch_of(rng, samples, experts, layers, topk, data_parallel, tp_size):
    rows = rng.integers(1, 40, samples).tolist()
    ids = [f"s{i}" for i in range(samples)]
    batch = BatchLayout.pack(
        ids,
        rows,
        data_parallel=data_parallel,
        tokens_per_micro_batch=64,
        row_multiple=tp_size * int(rng.integers(1, 5)),
    )
    routes = {
        name: np.argsort(rng.random((n, layers, experts)), axis=2)[:, :, :topk].astype(np.uint8)
        for name, n in zip(ids, rows, strict=True)
    }
    return batch, routes


def assembled_loads(batch, routes, sources, tp_size, layers, experts, topk):
    out = np.zeros((batch.num_microbatches, layers, len(sources), experts), dtype=np.int64)
    for g, (data_rank, tensor_rank) in enumerate(sources):
        for m, content in enumerate(batch.micro_batches[data_rank]):
            window = router_rows(content.rows, tp_rank=tensor_rank, tp_size=tp_size)
            parts = []
            for segment in content.segments:
                place = overlap(segment, window)
                name = batch.sample_ids[segment.sample]
                parts.append(None if place is None else routes[name][place[0] : place[0] + place[1]])
            seen = assemble(content, window, parts, first_moe_layer=0, moe_layers=layers, experts=experts, topk=topk)
            for layer in range(layers):
                out[m, layer, g] = np.bincount(seen[layer].ravel(), minlength=experts)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_loads_are_those_of_the_assembled_routes(seed, data_parallel, tp_size):
    rng = np.random.default_rng(seed)
    experts, layers = int(rng.choice([4, 6, 16])), int(rng.integers(1, 4))
    topk = int(rng.integers(1, 4))
    batch, routes = batch_of(rng, int(rng.integers(data_parallel, 12)), experts, layers, topk, data_parallel, tp_size)
    sources = [(d, t) for d in range(data_parallel) for t in range(tp_size)]
    histograms = {name: histogram(r, experts) for name, r in routes.items()}
    counted = {
        (name, first, rows): histogram(routes[name][first : first + rows], experts)
        for name, first, rows in needed_counts(batch, sources, tp_size)
    }
    loads = step_loads(batch, histograms, sources, topk=topk, tp_size=tp_size, counted=counted)
    assert loads.dtype == np.int64
    assert np.array_equal(loads, assembled_loads(batch, routes, sources, tp_size, layers, experts, topk))


def test_whole_samples_need_no_counts():
    batch = BatchLayout.pack(["a", "b"], [5, 7], data_parallel=2, tokens_per_micro_batch=16)
    assert needed_counts(batch, [(0, 0), (1, 0)], 1) == []


def test_rows_cut_by_sequence_parallelism_are_named():
    batch = BatchLayout.pack(["a"], [8], data_parallel=1, tokens_per_micro_batch=8, row_multiple=2)
    sources = [(0, 0), (0, 1)]
    assert needed_counts(batch, sources, 2) == [("a", 0, 4), ("a", 4, 4)]
    whole = np.full((1, 4), 2)
    with pytest.raises(ValueError, match=r"rows 0\.\.3 of sample a.*rank 0 of data-parallel rank 0.*got none"):
        step_loads(batch, {"a": whole}, sources, topk=1, tp_size=2)
    half = {("a", 0, 4): np.full((1, 4), 1), ("a", 4, 4): np.full((2, 4), 1)}
    with pytest.raises(ValueError, match=r"\[1, 4\], got int64 \[2, 4\] of rows 4\.\.7 of sample a"):
        step_loads(batch, {"a": whole}, sources, topk=1, tp_size=2, counted=half)


def test_histograms_that_do_not_fit():
    batch = BatchLayout.pack(["a", "b"], [5, 7], data_parallel=1, tokens_per_micro_batch=16)
    right = np.ones((2, 4), dtype=np.int32)
    with pytest.raises(ValueError, match="none of sample b"):
        step_loads(batch, {"a": right}, [(0, 0)], topk=2)
    with pytest.raises(ValueError, match=r"got float64 \[2, 4\] of sample b"):
        step_loads(batch, {"a": right, "b": right * 1.0}, [(0, 0)], topk=2)
    with pytest.raises(ValueError, match=r"got \(1, 0\) for expert-parallel rank 1"):
        step_loads(batch, {"a": right, "b": right}, [(0, 0), (1, 0)], topk=2)
    with pytest.raises(ValueError, match="got none"):
        step_loads(batch, {}, [(0, 0)], topk=2)
