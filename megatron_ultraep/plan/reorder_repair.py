"""Homes inside nodes, checked with the planner itself: a part of :func:`megatron_ultraep.plan.reorder.reorder`.

Where more ranks of a node are above its mean than the slots of those below can serve, say seven slightly hot ranks and
a cold one with two slots, balance takes chains of replicas longer than the planner's. The cure costs next to nothing:
two hot experts on one rank leave another rank cold, with slots of its own, and the doubly hot rank exports to it.

1. A node is in doubt in a micro-batch when it has more ranks above what is allowed (the mean of the busiest node and
   the planner's tolerance) than ranks with room for a replica have slots.
2. The compiled planner plans the nodes in doubt, with the settings that plan the step. Those that come within what is
   allowed stay.
3. For the others, exchanges of the hottest expert of a rank with a lesser expert of another are tried, hottest ranks
   first, each with the planner on all micro-batches, until one leaves nothing above what is allowed or a fixed number
   has been tried. The best is made, where what it saves pays for its moves, and another is looked for.

Integers, fixed orders, ties to the earlier exchange: the same bits everywhere.

Source: our own.

Legend: ``E`` experts, ``G`` ranks, ``M`` micro-batches, ``B`` nodes, ``D`` ranks of a node, ``L`` homes of a rank. A
*place* is a home slot counted inside its node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import quota, search
from megatron_ultraep.plan.types import Array, PlanSettings

_TRIALS = 24  # exchanges tried in a node; the first one does nearly always
_ROUNDS = 2  # exchanges made
_MILLION = 1_000_000


@dataclass(frozen=True, eq=False)
class Repaired:
    """An arrangement, and what the planner makes of a layer before and after.

    Attributes:
        home_slot: int64 ``[E]``; only the ranks count, slots are as they came.
        before, after: tokens of the busiest rank, summed over micro-batches, as given and as repaired; nodes that are
            not in doubt are taken to reach their mean.
    """

    home_slot: Array
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class _Node:
    """One node to be repaired.

    Attributes:
        experts: int64 ``[D * L]``, logical ids, ascending.
        tokens: int64 ``[M, D * L]``, of these.
        allowed: int64 ``[M]``, tokens of a rank that nothing is gained below.
    """

    experts: Array
    tokens: Array
    allowed: Array


def repair(
    tokens: npt.NDArray[np.float64],
    origin: Array,
    placed: Array,
    layout: ExpertLayout,
    plans: PlanSettings,
    token_ps: int,
    move_ps: int,
) -> Repaired | None:
    """Exchange homes inside the nodes that the planner cannot balance as they are.

    Args:
        tokens: float64 ``[E, M]``, integers: tokens of each expert in each micro-batch.
        origin: int64 ``[E]``: home slots before the step.
        placed: int64 ``[E]``: home slots chosen so far.
        layout: the shape; at least one slot a rank.
        plans: settings of the plans of the step.
        token_ps: what a token of the busiest rank costs in the whole horizon (ps).
        move_ps: what an expert costs that changes its rank inside its node (ps).

    Returns:
        What came of it; None where nothing is exchanged.
    """
    ranks, homes, size = layout.ranks, layout.experts_per_rank, layout.node_size
    expert_at = np.empty(len(placed), dtype=np.int64)
    expert_at[placed] = np.arange(len(placed))
    # [B, D, M]
    load = tokens[expert_at].reshape(ranks, homes, -1).sum(axis=1).astype(np.int64).reshape(ranks // size, size, -1)
    bound = (-(-load.sum(axis=1) // size)).max(axis=0)
    allowed = bound * (_MILLION + plans.tolerance_ppm) // _MILLION
    hot = (load > allowed).sum(axis=1)
    doubtful = hot > layout.slots * (load <= allowed - plans.min_tokens).sum(axis=1)
    if not doubtful.any():
        return None

    before, after, changed = bound.copy(), bound.copy(), False
    for b in np.nonzero(doubtful.any(axis=1))[0].tolist():
        place_of = np.arange(b * size * homes, (b + 1) * size * homes)
        here = expert_at[place_of]
        experts = np.sort(here)
        node = _Node(experts, np.ascontiguousarray(tokens[experts].T).astype(np.int64), allowed)
        arranged = np.searchsorted(experts, here)
        peaks = _peaks(node, arranged, layout, plans, doubtful[b])
        if (peaks <= allowed).all():
            continue
        peaks = _peaks(node, arranged, layout, plans)
        before = np.maximum(before, peaks)
        old_rank = origin[experts] // homes - b * size  # in the node: 0..D-1
        exchanged, peaks = _exchanged(node, arranged, peaks, old_rank, layout, plans, token_ps, move_ps)
        after = np.maximum(after, peaks)
        expert_at[place_of] = experts[exchanged]
        changed |= exchanged is not arranged
    if not changed:
        return None
    home_slot = np.empty_like(placed)
    home_slot[expert_at] = np.arange(len(placed))
    return Repaired(home_slot, int(before.sum()), int(after.sum()))


def _peaks(
    node: _Node, arranged: Array, layout: ExpertLayout, plans: PlanSettings, some: npt.NDArray[np.bool_] | None = None
) -> Array:
    """int64 ``[M]``: tokens of the busiest rank of a node in its plans; 0 in micro-batches that are not among some."""
    size, planner, costs = layout.node_size, search.compiled(), quota.costs_array(plans)
    loads = np.zeros((size, len(arranged)), dtype=np.int64)
    found = np.zeros(len(node.tokens), dtype=np.int64)
    for m, of_microbatch in enumerate(node.tokens):
        if some is None or some[m]:
            loads[0] = of_microbatch  # which rank tokens come from does not matter to peaks
            decisions = planner(
                loads, arranged, size, size, layout.slots, plans.min_tokens, plans.tolerance_ppm, costs
            )[3]
            found[m] = decisions[0, 2]
    return found


def _exchanged(
    node: _Node,
    arranged: Array,
    peaks: Array,
    old_rank: Array,
    layout: ExpertLayout,
    plans: PlanSettings,
    token_ps: int,
    move_ps: int,
) -> tuple[Array, Array]:
    """The arrangement of a node (index into its experts, ``[D * L]`` by place) after step 3, and its peaks ``[M]``."""
    totals, homes, size = node.tokens.sum(axis=0), layout.experts_per_rank, layout.node_size

    def cost(arranged: Array, peaks: Array) -> tuple[int, int]:
        """Time (ps) and tokens above what is allowed."""
        over = int(np.maximum(0, peaks - node.allowed).sum())
        rank = np.arange(len(arranged)) // homes
        was = old_rank[arranged]
        moved = int(((was != rank) & (was >= 0) & (was < size)).sum())  # those from other nodes move anyway
        return token_ps * over + move_ps * moved, over

    least, over = cost(arranged, peaks)
    for _ in range(_ROUNDS):
        if over == 0:
            break
        best = None
        for _, (first, second) in zip(range(_TRIALS), _exchanges(totals[arranged], homes), strict=False):
            tried = arranged.copy()
            tried[[first, second]] = arranged[[second, first]]
            reached = _peaks(node, tried, layout, plans)
            now, left = cost(tried, reached)
            if now < least:
                least, over, best = now, left, (tried, reached)
                if over == 0:
                    break
        if best is None:
            break
        arranged, peaks = best
    return arranged, peaks


def _exchanges(totals: Array, homes: int) -> Iterator[tuple[int, int]]:
    """Pairs of places: the hottest expert of a rank and a lesser one of a rank whose hottest is next in order.

    Args:
        totals: int64 ``[D * L]``: tokens of the expert at each place.
        homes: experts of a rank.
    """
    by_rank = totals.reshape(-1, homes)
    within = np.argsort(-by_rank, axis=1, kind="stable")
    hottest_first = np.argsort(-by_rank.max(axis=1), kind="stable").tolist()
    for i, a in enumerate(hottest_first):
        for b in hottest_first[i + 1 :]:
            for k in range(1, homes):
                yield a * homes + int(within[a, 0]), b * homes + int(within[b, k])
