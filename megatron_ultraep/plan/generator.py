"""Simulated routes of a chosen imbalance: what benchmarks and tests feed to planners.

The weight of local expert ``j`` on rank ``i`` (both from 1) is ``i**-a * j**-4`` (``i**-a`` with one expert on a rank):
some ranks are hot, and on each of them one expert is. ``a`` is found by bisection, so that max/mean over ranks of the
expected tokens is the imbalance asked for. A token draws ``topk`` distinct experts, one after the other, each with
probability proportional to its weight among those left.

Legend: ``G`` ranks, ``E`` experts, ``T`` tokens of a rank, ``K`` experts of a token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LOCAL_EXPONENT = 4.0
_BISECTIONS = 60
_LARGEST_EXPONENT = 64.0
_CHUNK = 2**21  # random numbers drawn at a time: they stay in the cache


def inclusion_probabilities(weights: Floats, topk: int) -> Floats:
    """float64 ``[E]``: how likely it is that a token's ``topk`` draws without replacement include each expert.

    The approximation ``1 - exp(-h * weight)``, with ``h`` such that the sum is ``topk``; good to 1% where experts are
    many and ``topk`` is not 1.
    """
    if topk >= len(weights):
        return np.ones_like(weights)
    low, high = 0.0, 1.0
    while (1 - np.exp(-high * weights)).sum() < topk:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (1 - np.exp(-middle * weights)).sum() < topk:
            low = middle
        else:
            high = middle
    return 1 - np.exp(-high * weights)


def expected_imbalance(weights: Floats, ranks: int, topk: int) -> float:
    """max / mean over ranks of the tokens that ``weights`` (``[E]``, rank by rank) are expected to give."""
    tokens = inclusion_probabilities(weights, topk).reshape(ranks, -1).sum(axis=1)
    return float(tokens.max() / tokens.mean())


def expert_weights(ranks: int, experts: int, topk: int, target_imbalance: float) -> Floats:
    """float64 ``[E]``, rank by rank: weights whose expected imbalance is ``target_imbalance``.

    Raises:
        ValueError: shapes that do not fit, or an imbalance that this family of weights cannot reach.
    """
    if ranks < 1 or experts % ranks or not 1 <= topk <= experts:
        raise ValueError(
            f"expected ranks that divide the experts and 1 <= topk <= experts, got {ranks} ranks, {experts} experts, "
            f"topk {topk}"
        )
    local = np.arange(1, experts // ranks + 1, dtype=np.float64)
    local = local**-_LOCAL_EXPONENT

    def weights(exponent: float) -> Floats:
        # Weights as small as 1e-100 are lost among the others and would only stall the search for h.
        over_ranks = np.maximum(np.arange(1, ranks + 1, dtype=np.float64) ** -exponent, 1e-30)
        return np.outer(over_ranks, local).ravel()

    low, high = 0.0, _LARGEST_EXPONENT
    reachable = expected_imbalance(weights(high), ranks, topk)
    if not 1.0 <= target_imbalance <= reachable:
        raise ValueError(
            f"expected an imbalance from 1 to {reachable:.3f}, the most that {experts} experts on {ranks} ranks with "
            f"top-{topk} reach, got {target_imbalance}"
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if expected_imbalance(weights(middle), ranks, topk) < target_imbalance:
            low = middle
        else:
            high = middle
    return weights(high if target_imbalance > 1 else 0.0)


def draw_routes(weights: Floats, tokens: int, topk: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """int32 ``[T, K]``: distinct experts of each token, drawn one after the other in proportion to ``weights``.

    An exponential race gives that distribution in one go: expert e arrives at an exponential time of rate
    ``weights[e]``, and the first ``topk`` to arrive are the draw (Efraimidis and Spirakis, 2006).
    """
    experts = len(weights)
    inverse = (1.0 / weights).astype(np.float32)
    routes = np.empty((tokens, topk), dtype=np.int32)
    step = max(1, _CHUNK // experts)
    for first in range(0, tokens, step):
        rows = min(step, tokens - first)
        arrival = rng.standard_exponential((rows, experts), dtype=np.float32)
        arrival *= inverse
        drawn = np.argpartition(arrival, topk - 1, axis=1)[:, :topk] if topk < experts else np.arange(experts)
        routes[first : first + rows] = drawn
    return routes


def simulate(
    *, ranks: int, experts: int, tokens: int, topk: int, target_imbalance: float, seed: int
) -> tuple[list[npt.NDArray[np.int32]], Ints]:
    """Routes and loads of one micro-batch of one layer; a function of its arguments only.

    Args:
        ranks: number of expert-parallel ranks G.
        experts: number of logical experts E; rank r is home to ``r*E/G .. (r+1)*E/G - 1``.
        tokens: tokens of each rank.
        topk: experts of each token.
        target_imbalance: expected max / mean over ranks of tokens computed, >= 1.
        seed: of the draw.

    Returns:
        Routes, int32 ``[T, K]`` for each rank, and loads, int64 ``[G, E]``.

    Raises:
        ValueError: see :func:`expert_weights`.
    """
    weights = expert_weights(ranks, experts, topk, target_imbalance)
    routes = [draw_routes(weights, tokens, topk, np.random.default_rng([seed, rank])) for rank in range(ranks)]
    loads = np.stack([np.bincount(r.ravel(), minlength=experts) for r in routes]).astype(np.int64)
    return routes, loads
