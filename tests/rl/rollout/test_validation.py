"""What must be refused is refused, with a reason that says where; what is sound passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.rollout.validation import check_logprobs, check_routes

shapes = st.tuples(st.integers(2, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 12))


def sound_routes(tokens: int, layers: int, topk: int, experts: int, seed: int) -> np.ndarray:
    """Random distinct experts per token, never all zero."""
    noise = np.random.default_rng(seed).random((tokens - 1, layers, experts))
    routes = np.argsort(noise, -1)[..., :topk].astype(np.uint8)
    routes[0, 0, 0] = experts - 1 if experts - 1 not in routes[0, 0] else routes[0, 0, 0]
    return routes


@given(shapes, st.integers(0, 2**32 - 1))
def test_sound_routes_pass(shape: tuple[int, int, int, int], seed: int) -> None:
    tokens, layers, topk, spare = shape
    experts = topk + 1 + spare
    assert check_routes(sound_routes(tokens, layers, topk, experts, seed), tokens, layers, experts, topk) is None


@given(shapes, st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=200)
def test_one_fault_anywhere_is_found(shape: tuple[int, int, int, int], seed: int, data: st.DataObject) -> None:
    tokens, layers, topk, spare = shape
    experts = topk + 1 + spare
    routes = sound_routes(tokens, layers, topk, experts, seed)
    row = data.draw(st.integers(0, tokens - 2))
    layer = data.draw(st.integers(0, layers - 1))
    fault = data.draw(st.sampled_from(["short", "long", "layer", "topk", "range", "zero"] + ["twice"] * (topk > 1)))
    if fault == "short":
        routes, words = routes[:-1], "expected routes of shape"
    elif fault == "long":
        routes, words = np.concatenate([routes, routes[:1]]), "expected routes of shape"
    elif fault == "layer":
        routes, words = np.concatenate([routes, routes[:, :1]], 1), "expected routes of shape"
    elif fault == "topk":
        routes, words = routes[..., :-1], "expected routes of shape"
    elif fault == "range":
        routes[row, layer, 0] = experts
        words = f"first at row {row}, MoE layer {layer}"
    elif fault == "zero":
        routes[:] = 0
        words = "all routes are zero" if topk > 1 or routes.size > 1 else None
    else:
        routes[row, layer, 1] = routes[row, layer, 0]
        words = f"first at row {row}, MoE layer {layer}"
    reason = check_routes(routes, tokens, layers, experts, topk)
    assert reason is None if words is None else words in reason


def test_missing_routes_are_named() -> None:
    assert "returned none" in check_routes(None, 10, 2, 8, 2)


def test_logprobs() -> None:
    good = np.array([-0.5, 0.0, -3.0], np.float32)
    assert check_logprobs(good, 3) is None
    assert check_logprobs(np.zeros(0, np.float32), 0) is None
    assert "each of 4 response tokens" in check_logprobs(good, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.25])
def test_bad_logprob_is_named_by_position(bad: float) -> None:
    logprobs = np.full(5, -1.0, np.float32)
    logprobs[3] = bad
    assert "at response token 3 (1 bad)" in check_logprobs(logprobs, 5)
