"""Compiled for :func:`megatron_ultraep.plan.reorder.reorder`: ranks and home slots inside the parts of one layer.

A part is a node, or a rank where there are no slots (:mod:`megatron_ultraep.plan.reorder_search`).

1. An expert that stays in its part keeps its slot. Those that come take free slots, hottest first, on the rank with the
   fewest tokens.
2. Those that came exchange ranks where sums of squares of ranks' loads fall: fewer replicas, for no more moves.
3. A rank below its node's mean is predicted to take the largest excesses of other ranks, one into each slot; relays
   (``plan.search``) may do better. What it misses then is spread over the others, and excesses beyond the slots of all
   such ranks stay: the busiest rank is above the mean by the larger of the two. Where that makes the layer slower, two
   experts of the node exchange ranks, best squares first, as long as it pays.
4. Where the whole does not pay, nothing moves.

Numbers are integers held as float64, as there. Everything that is compiled is in this file: numba's cache looks at no
other when it decides whether it is stale.

Legend: ``E`` experts, ``M`` micro-batches, ``B`` parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from megatron_ultraep.plan.types import Array

F = TypeVar("F", bound=Callable[..., Any])
Floats = npt.NDArray[np.float64]

_ROUNDS = 2  # later ones find next to nothing
_EXCHANGES = 24  # most in a node

# Exact sums may be made in any order, and there is no NaN.
_FAST = {"reassoc", "nnan", "nsz", "contract"}


def _jit(function: F) -> F:
    return cast(F, numba.njit(fastmath=_FAST)(function))


@_jit
def _part_loads(tokens: Floats, part: Array, loads: Floats) -> None:
    """Sums of ``tokens`` ``[E, M]`` by part into ``loads`` ``[B, M]``."""
    loads[:] = 0
    for expert in range(tokens.shape[0]):
        for m in range(tokens.shape[1]):
            loads[part[expert], m] += tokens[expert, m]


@_jit
def _place(
    part: Array, totals: Floats, home_slot: Array, experts_per_rank: int, ranks_per_part: int, placed: Array
) -> None:
    """Home slots of an arrangement, into ``placed`` ``[E]``; see step 1 of the module."""
    experts = len(part)
    ranks = experts // experts_per_rank
    taken = np.zeros(experts, dtype=np.bool_)
    filled = np.zeros(ranks, dtype=np.float64)
    room = np.full(ranks, experts_per_rank, dtype=np.int64)
    placed[:] = -1
    for expert in range(experts):
        rank = home_slot[expert] // experts_per_rank
        if part[expert] == rank // ranks_per_part:
            placed[expert] = home_slot[expert]
            taken[home_slot[expert]] = True
            filled[rank] += totals[expert]
            room[rank] -= 1
    for expert in np.argsort(-totals, kind="mergesort"):
        if placed[expert] >= 0:
            continue
        target = -1
        for rank in range(part[expert] * ranks_per_part, (part[expert] + 1) * ranks_per_part):
            if room[rank] > 0 and (target < 0 or filled[rank] < filled[target]):
                target = rank
        slot = target * experts_per_rank
        while taken[slot]:
            slot += 1
        placed[expert] = slot
        taken[slot] = True
        filled[target] += totals[expert]
        room[target] -= 1


@_jit
def _even_ranks(tokens: Floats, home_slot: Array, experts_per_rank: int, ranks_per_part: int, placed: Array) -> None:
    """Exchange ranks among the experts that came into a part, so that its ranks need fewer replicas; in place.

    They move anyway, so it costs nothing: sums of squares of the ranks' loads fall over all micro-batches.
    """
    experts, microbatches = tokens.shape
    loads = np.zeros((experts // experts_per_rank, microbatches), dtype=np.float64)
    per_part = experts_per_rank * ranks_per_part
    _part_loads(tokens, placed // experts_per_rank, loads)
    came = np.empty(experts, dtype=np.int64)
    for base in range(0, experts, per_part):
        count = 0
        for expert in range(experts):
            if placed[expert] // per_part * per_part == base and home_slot[expert] // per_part * per_part != base:
                came[count] = expert
                count += 1
        for _ in range(_ROUNDS):
            for i in range(count):
                first = came[i]
                a = placed[first] // experts_per_rank
                best = 0.0
                partner = -1
                for second in came[:count]:
                    b = placed[second] // experts_per_rank
                    if a == b:
                        continue
                    change = 0.0
                    for m in range(microbatches):
                        more = tokens[second, m] - tokens[first, m]
                        change += more * (loads[a, m] - loads[b, m] + more)
                    if change < best:
                        best = change
                        partner = second
                if partner >= 0:
                    b = placed[partner] // experts_per_rank
                    for m in range(microbatches):
                        more = tokens[partner, m] - tokens[first, m]
                        loads[a, m] += more
                        loads[b, m] -= more
                    placed[first], placed[partner] = placed[partner], placed[first]


@_jit
def _need(rank_loads: Floats, node: int, node_size: int, slots: int, m: int) -> float:
    """Predicted tokens of a node, as if its busiest rank were its mean: see step 3 of the module."""
    first = node * node_size
    total = 0.0
    for rank in range(first, first + node_size):
        total += rank_loads[rank, m]
    if node_size == 1:
        return total
    mean = np.floor(total / node_size)
    cold = 0
    for rank in range(first, first + node_size):
        if rank_loads[rank, m] < mean:
            cold += 1
    served = slots * cold
    given = 0.0  # the largest excesses, one for each slot of a rank
    left = 0.0  # the largest excess that no slot is for
    used = 0
    limit = np.inf
    while used <= served:
        most = 0.0
        ties = 0
        for rank in range(first, first + node_size):
            excess = rank_loads[rank, m] - mean
            if excess < limit and excess > most:
                most = excess
                ties = 1
            elif excess == most and most > 0:
                ties += 1
        if ties == 0:
            break
        if used < slots:
            given += min(ties, slots - used) * most
        used += ties
        if used > served:
            left = most
        limit = most
    missing = 0.0
    for rank in range(first, first + node_size):
        missing += max(0.0, mean - rank_loads[rank, m] - given)
    spread: float = max(np.floor(missing / (node_size - 1)), left)
    return total + node_size * spread


@_jit
def _predicted(tokens: Floats, placed: Array, experts_per_rank: int, node_size: int, slots: int) -> float:
    """Sum over micro-batches of the predicted tokens of the busiest node."""
    ranks = tokens.shape[0] // experts_per_rank
    loads = np.zeros((ranks, tokens.shape[1]), dtype=np.float64)
    _part_loads(tokens, placed // experts_per_rank, loads)
    total = 0.0
    for m in range(tokens.shape[1]):
        most = 0.0
        for node in range(ranks // node_size):
            most = max(most, _need(loads, node, node_size, slots, m))
        total += most
    return total


@_jit
def _over(loads: Floats, node: int, node_size: int, slots: int, busiest: Floats) -> float:
    """By how much a node is predicted to exceed the mean of the busiest one, summed over micro-batches."""
    over = 0.0
    for m in range(len(busiest)):
        over += max(0.0, _need(loads, node, node_size, slots, m) - busiest[m])
    return over


@_jit
def _exchange(first: int, second: int, tokens: Floats, experts_per_rank: int, placed: Array, loads: Floats) -> None:
    a, b = placed[first] // experts_per_rank, placed[second] // experts_per_rank
    for m in range(tokens.shape[1]):
        more = tokens[second, m] - tokens[first, m]
        loads[a, m] += more
        loads[b, m] -= more
    placed[first], placed[second] = placed[second], placed[first]


@_jit
def _in_node_price(expert: int, home_slot: Array, placed: Array, experts_per_rank: int, node_size: int) -> int:
    """1 for an expert that changes its rank inside its node, else 0."""
    old, new = home_slot[expert] // experts_per_rank, placed[expert] // experts_per_rank
    return 1 if old != new and old // node_size == new // node_size else 0


@_jit
def _help_slots(
    tokens: Floats,
    home_slot: Array,
    experts_per_rank: int,
    node_size: int,
    slots: int,
    price: float,
    weight: float,
    placed: Array,
) -> None:
    """Exchanges inside nodes, where slots are predicted not to reach the mean and the moves pay; in place."""
    experts, microbatches = tokens.shape
    ranks = experts // experts_per_rank
    per_node = experts_per_rank * node_size
    loads = np.zeros((ranks, microbatches), dtype=np.float64)
    _part_loads(tokens, placed // experts_per_rank, loads)
    busiest = np.zeros(microbatches, dtype=np.float64)
    for m in range(microbatches):
        for node in range(ranks // node_size):
            busiest[m] = max(busiest[m], loads[node * node_size : (node + 1) * node_size, m].sum())
    here = np.empty(per_node, dtype=np.int64)
    for node in range(ranks // node_size):
        over = _over(loads, node, node_size, slots, busiest)
        if weight * over <= price:
            continue
        count = 0
        for expert in range(experts):
            if placed[expert] // per_node == node:
                here[count] = expert
                count += 1
        # A single exchange may change nothing yet: go on, and keep the best number of them.
        before = placed.copy()
        least = 0.0
        kept = placed.copy()
        for _ in range(_EXCHANGES):
            best = 0.0
            first, second = -1, -1
            for i in range(per_node):
                a = placed[here[i]] // experts_per_rank
                for j in range(i):
                    b = placed[here[j]] // experts_per_rank
                    if a == b:
                        continue
                    change = 0.0
                    for m in range(microbatches):
                        more = tokens[here[j], m] - tokens[here[i], m]
                        change += more * (loads[a, m] - loads[b, m] + more)
                    if change < best:
                        best = change
                        first, second = here[i], here[j]
            if first < 0:
                break
            _exchange(first, second, tokens, experts_per_rank, placed, loads)
            now = _over(loads, node, node_size, slots, busiest)
            moved = 0
            for i in range(per_node):
                expert = here[i]
                moved += _in_node_price(expert, home_slot, placed, experts_per_rank, node_size)
                moved -= _in_node_price(expert, home_slot, before, experts_per_rank, node_size)
            change = weight * (now - over) + price * moved
            if change < least:
                least = change
                kept[:] = placed
            if now == 0:
                break
        placed[:] = kept


def place(
    tokens: Floats,
    home_slot: Array,
    part: Array,
    experts_per_rank: int,
    ranks_per_part: int,
    slots: int,
    price: Floats,
    in_node: float,
    weight: float,
    shift: float,
) -> tuple[Array, float, float]:
    """The new home slots of a layer.

    Args:
        tokens: float64 ``[E, M]``: tokens of each expert in each micro-batch.
        home_slot: int64 ``[E]``: where experts are.
        part: int64 ``[E]``: the part that each goes to.
        experts_per_rank, ranks_per_part: the shape of the layout.
        slots: of a rank; where there are none, parts are ranks.
        price: float64 ``[B, B]``: of an expert moved from one part to another; 0 on the diagonal.
        in_node: price of an expert moved from rank to rank inside a part.
        weight: of a token of the busiest part.
        shift: tokens are divided by it (rounded down) for sums of squares, so that these stay exact.

    Returns:
        Home slots, int64 ``[E]``; sums over micro-batches of the busiest part's predicted tokens before and after.
    """
    experts, microbatches = tokens.shape
    per_part = experts_per_rank * ranks_per_part
    totals = np.zeros(experts, dtype=np.float64)
    scaled = np.empty((experts, microbatches), dtype=np.float64)
    for expert in range(experts):
        for m in range(microbatches):
            totals[expert] += tokens[expert, m]
            scaled[expert, m] = np.floor(tokens[expert, m] / shift)
    placed = np.empty(experts, dtype=np.int64)
    _place(part, totals, home_slot, experts_per_rank, ranks_per_part, placed)
    if slots > 0:
        _even_ranks(scaled, home_slot, experts_per_rank, ranks_per_part, placed)
        _help_slots(tokens, home_slot, experts_per_rank, ranks_per_part, slots, in_node, weight, placed)
    before = _predicted(tokens, home_slot, experts_per_rank, ranks_per_part, slots)
    after = _predicted(tokens, placed, experts_per_rank, ranks_per_part, slots)
    cost = 0.0
    for expert in range(experts):
        cost += price[home_slot[expert] // per_part, placed[expert] // per_part]
        cost += in_node * _in_node_price(expert, home_slot, placed, experts_per_rank, ranks_per_part)
    if weight * (before - after) <= cost:
        placed[:] = home_slot
        after = before
    return placed, before, after


@cache
def compiled() -> Callable[..., Any]:
    """:func:`place`, compiled on first use, from the cache on disk where there is one."""
    matrix = numba.types.Array(numba.float64, 2, "C", readonly=True)
    vector = numba.types.Array(numba.int64, 1, "C", readonly=True)
    integer, real = numba.int64, numba.float64
    signature = (matrix, vector, vector, integer, integer, integer, matrix, real, real, real)
    try:
        return cast(Callable[..., Any], numba.njit([signature], cache=True, nogil=True, fastmath=_FAST)(place))
    except (OSError, RuntimeError):  # nowhere to write the cache: compiled in every process instead
        return cast(Callable[..., Any], numba.njit([signature], nogil=True, fastmath=_FAST)(place))
