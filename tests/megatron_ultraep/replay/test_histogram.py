"""Histograms count what a loop counts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_ultraep.replay import histogram
from tests.megatron_ultraep.replay.routes import shapes, valid_routes


@given(shapes(), st.integers(0, 1000))
def test_counts(shape, seed):
    rows, moe_layers, experts, topk = shape
    routes = valid_routes(rows, moe_layers, experts, topk, seed, dtype=np.uint8)
    expected = np.zeros((moe_layers, experts), dtype=np.int32)
    for _, layer, k in np.ndindex(routes.shape):
        expected[layer, routes[_, layer, k]] += 1
    counts = histogram(routes, experts)
    assert counts.dtype == np.int32
    assert np.array_equal(counts, expected)
    assert (counts.sum(1) == rows * topk).all()


def test_no_rows():
    assert np.array_equal(histogram(np.zeros((0, 2, 3), np.uint8), 4), np.zeros((2, 4)))
