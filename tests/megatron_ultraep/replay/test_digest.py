"""Digests add up over any cut of the rows, and see every change but the order within a token."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ultraep.replay import layer_digests, row_hashes
from tests.megatron_ultraep.replay.routes import shapes, valid_routes


def total(hashes):
    with np.errstate(over="ignore"):
        return hashes.sum(dtype=np.uint64)


@given(shapes(), st.integers(0, 1000), st.data())
def test_any_split_of_the_rows_sums_to_the_whole(shape, seed, data):
    rows, moe_layers, experts, topk = shape
    routes = valid_routes(rows, moe_layers, experts, topk, seed, dtype=np.uint8)
    order = np.array(data.draw(st.permutations(range(rows))))
    cut = data.draw(st.integers(0, rows))
    digests = layer_digests(routes)
    assert digests.shape == (moe_layers,)
    assert digests.dtype == np.uint64
    for layer in range(moe_layers):
        parts = [row_hashes(routes[part, layer], part) for part in (order[:cut], order[cut:])]
        assert total(np.array([total(p) for p in parts], dtype=np.uint64)) == digests[layer]


@given(shapes(), st.integers(0, 1000))
def test_the_order_within_a_token_and_the_type_do_not_matter(shape, seed):
    routes = valid_routes(*shape, seed, dtype=np.uint8)
    assert np.array_equal(layer_digests(routes), layer_digests(routes[..., ::-1].astype(np.int64)))


@given(shapes(), st.integers(0, 1000), st.data())
def test_any_other_change_is_seen(shape, seed, data):
    rows, moe_layers, experts, topk = shape
    routes = valid_routes(*shape, seed)
    row, layer = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, moe_layers - 1))
    assume(topk < experts)
    changed = routes.copy()
    changed[row, layer, 0] = next(e for e in range(experts) if e not in routes[row, layer])
    differs = layer_digests(changed) != layer_digests(routes)
    assert differs.tolist() == [i == layer for i in range(moe_layers)]


@given(shapes(), st.integers(0, 1000), st.data())
def test_the_order_of_rows_matters(shape, seed, data):
    routes = valid_routes(*shape, seed)[:, 0]
    a, b = (data.draw(st.integers(0, len(routes) - 1)) for _ in range(2))
    assume(set(routes[a]) != set(routes[b]))
    swapped = routes.copy()
    swapped[[a, b]] = routes[[b, a]]
    assert total(row_hashes(swapped)) != total(row_hashes(routes))


def test_values_are_fixed():
    """They are kept in ledgers: a change here makes old runs unverifiable."""
    routes = np.array([[[0, 1]], [[3, 2]]], dtype=np.uint8)
    assert layer_digests(routes).tolist() == [18421392451918487315]


def test_no_rows_is_zero():
    assert layer_digests(np.zeros((0, 3, 2), np.uint8)).tolist() == [0, 0, 0]
