"""The exact optimum of one small node, by mixed-integer programming. A comparator; needs scipy.

Variables: tokens ``q[e, d] >= 0`` of expert e that rank d computes in a replica, and ``x[e, d]``, 1 if there is one::

    tokens of rank r - sum of q[e, d] for e at home on r + sum of q[e, r] <= peak
    min_tokens * x[e, d] <= q[e, d] <= (tokens of e - 1) * x[e, d]
    sum over d of q[e, d] <= tokens of e - 1          (one token stays at home)
    sum over e of x[e, d] <= slots

First the peak is minimised, then, at that peak or the target if it is higher, the number of replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ultraep.plan.types import Array


@dataclass(frozen=True)
class Optimum:
    """What no plan can beat.

    Attributes:
        peak: lowest possible tokens of the busiest rank.
        replicas: fewest replicas with a busiest rank of at most ``max(peak, target)`` tokens.
    """

    peak: int
    replicas: int


def optimum(
    tokens: Array, ranks: int, slots: int, min_tokens: int, target: int = 0, time_limit_s: float = 60.0
) -> Optimum:
    """Solve one node exactly; meant for up to about 8 ranks and 64 experts.

    Args:
        tokens: int64 ``[D * L]``: tokens of each home expert, rank by rank.
        ranks: ``D``.
        slots: ``R``.
        min_tokens: fewest tokens of a replica.
        target: tokens of the busiest rank that are low enough; the fewest replicas are sought for it.
        time_limit_s: of each of the two programs (s).

    Raises:
        TimeoutError: when the solver proves no optimum within the time limit.
    """
    load = tokens.reshape(ranks, -1).sum(axis=1)
    experts_per_rank = len(tokens) // ranks
    moves = [
        (place, rank)
        for place in range(len(tokens))
        for rank in range(ranks)
        if rank != place // experts_per_rank and tokens[place] > min_tokens
    ]
    if not moves or not slots:
        return Optimum(int(load.max()), 0)
    peak = _solve(tokens, load, moves, slots, min_tokens, None, time_limit_s)
    limit = max(peak, target)
    if load.max() <= limit:
        return Optimum(peak, 0)
    return Optimum(peak, _solve(tokens, load, moves, slots, min_tokens, limit, time_limit_s))


def _solve(
    tokens: Array,
    load: Array,
    moves: list[tuple[int, int]],
    slots: int,
    min_tokens: int,
    limit: int | None,
    time_limit_s: float,
) -> int:
    """The lowest peak (``limit`` None), or the fewest replicas under a peak of ``limit``."""
    from scipy import optimize

    count = len(moves)
    place, rank = np.array(moves).T
    home = place // (len(tokens) // len(load))
    most = tokens[place] - 1
    each = np.arange(count)
    quota, exists, peak = each, count + each, 2 * count  # columns of q, x and the peak

    def rows(*entries: tuple[Any, Any, Any], number: int) -> Any:
        matrix = np.zeros((number, 2 * count + 1))
        for row, column, value in entries:
            np.add.at(matrix, (row, column), value)
        return matrix

    ranks, experts = len(load), len(tokens)
    constraints = [
        optimize.LinearConstraint(
            rows((rank, quota, 1), (home, quota, -1), (np.arange(ranks), peak, -1), number=ranks), ub=-load
        ),
        optimize.LinearConstraint(rows((each, quota, 1), (each, exists, -most), number=count), ub=0),
        optimize.LinearConstraint(rows((each, quota, 1), (each, exists, -min_tokens), number=count), lb=0),
        optimize.LinearConstraint(rows((place, quota, 1), number=experts), ub=np.maximum(tokens - 1, 0)),
        optimize.LinearConstraint(rows((rank, exists, 1), number=ranks), ub=slots),
    ]
    objective = np.zeros(2 * count + 1)
    objective[peak if limit is None else exists] = 1
    bounds = optimize.Bounds(0, np.concatenate([most, np.ones(count), [load.max() if limit is None else limit]]))
    result = optimize.milp(
        objective,
        integrality=np.ones(2 * count + 1),
        bounds=bounds,
        constraints=constraints,
        # HiGHS 1.12 (scipy 1.17) with presolve called 2 replicas optimal where 1 is feasible.
        options={"time_limit": time_limit_s, "mip_rel_gap": 0, "presolve": False},
    )
    if result.status != 0:
        raise TimeoutError(
            f"expected an optimum within {time_limit_s} s, HiGHS says: {result.message}; take fewer ranks or experts"
        )
    best: int = round(result.fun)
    return best
