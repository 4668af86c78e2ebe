"""Bad routes are refused with the reason and the place; valid ones pass."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ultraep.replay import check_routes, route_dtype
from tests.megatron_ultraep.replay.routes import shapes, valid_routes

SHAPE = {"rows": 5, "moe_layers": 3, "experts": 8, "topk": 2}


def routes():
    return valid_routes(5, 3, 8, 2, seed=1)


@given(shapes(), st.integers(0, 1000))
def test_valid_routes_pass(shape, seed):
    rows, moe_layers, experts, topk = shape
    found = valid_routes(rows, moe_layers, experts, topk, seed, dtype=route_dtype(experts))
    assert check_routes(found, rows=rows, moe_layers=moe_layers, experts=experts, topk=topk) is None


@given(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1), st.sampled_from([-1, 8, 255]))
def test_ids_out_of_range_are_found_anywhere(row, layer, k, value):
    bad = routes()
    bad[row, layer, k] = value
    reason = check_routes(bad, **SHAPE)
    assert "expected expert ids in 0..7" in reason
    assert f"first at row {row}, MoE layer {layer}" in reason


@given(st.integers(0, 4), st.integers(0, 2))
def test_duplicates_are_found_anywhere(row, layer):
    bad = routes()
    bad[row, layer] = 6
    reason = check_routes(bad, **SHAPE)
    assert "an expert occurs twice in one token's top-2 (1 times" in reason
    assert f"first at row {row}, MoE layer {layer}: [6, 6]" in reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (routes()[:-1], r"shape (5, 3, 2) [tokens-1, moe layers, topk], got (4, 3, 2)"),
        (routes()[:, :2], "got (5, 2, 2)"),
        (routes()[..., :1], "got (5, 3, 1)"),
        (routes()[0], "got (3, 2)"),
        (routes().astype(np.float32), "expected integer routes, got float32"),
        (np.zeros((5, 3, 2), np.uint8), "all routes are zero"),
    ],
)
def test_each_reason(bad, reason):
    assert reason in check_routes(bad, **SHAPE)


def test_zeros_are_suspicious_only_where_there_is_a_choice():
    zeros = np.zeros((4, 2, 1), np.uint8)
    assert "all routes are zero" in check_routes(zeros, rows=4, moe_layers=2, experts=8, topk=1)
    assert check_routes(zeros, rows=4, moe_layers=2, experts=1, topk=1) is None
    assert check_routes(zeros[:1, :1], rows=1, moe_layers=1, experts=8, topk=1) is None


def test_a_sample_of_one_token_has_no_rows():
    assert check_routes(np.zeros((0, 3, 2), np.uint8), **(SHAPE | {"rows": 0})) is None


def test_the_smallest_type_that_holds_every_id():
    assert [route_dtype(n) for n in (1, 256, 257, 65536)] == [np.uint8, np.uint8, np.uint16, np.uint16]
    with pytest.raises(ValueError, match="at most 65536 experts, got 65537"):
        route_dtype(65537)
