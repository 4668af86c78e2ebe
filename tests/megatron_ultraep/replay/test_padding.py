"""Routes of padding: distinct within a row, and even over the experts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ultraep.replay import histogram, padding_routes
from tests.megatron_ultraep.replay.routes import shapes


@given(shapes(), st.integers(0, 50), st.integers(0, 1000))
def test_distinct_and_spread(shape, layer, first):
    rows, _, experts, topk = shape
    routes = padding_routes(np.arange(first, first + rows), layer, experts, topk)
    assert routes.shape == (rows, topk)
    assert routes.dtype == np.int64
    assert all(len(set(row)) == topk for row in routes.tolist())
    counts = histogram(routes[:, None], experts)[0]
    assert counts.max() - counts.min() <= 1


@given(shapes(), st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(shape, first):
    rows, _, experts, topk = shape
    whole = padding_routes(np.arange(first, first + rows), 2, experts, topk)
    alone = [padding_routes([first + i], 2, experts, topk)[0] for i in range(rows)]
    assert np.array_equal(whole, alone)


def test_layers_start_at_different_experts():
    assert [padding_routes([0], layer, 8, 2)[0].tolist() for layer in range(5)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [0, 1],
    ]


def test_more_experts_per_token_than_experts_is_refused():
    with pytest.raises(ValueError, match="topk=3, experts=2"):
        padding_routes([0], 0, 2, 3)
