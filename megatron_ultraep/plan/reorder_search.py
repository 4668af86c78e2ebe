"""The compiled part of :func:`megatron_ultraep.plan.reorder.reorder`: the parts of one layer.

A *part* is what replicas cannot balance across: a node, or a rank where there are no slots. An arrangement puts equally
many experts into every part. It costs::

    weight * (sum over micro-batches of the tokens of the busiest part) + price of every expert that is not where it was

1. Two starts: the present arrangement, and LPT (hottest expert first, to the emptiest part with room), whose parts are
   relabelled so that most experts stay.
2. Swaps of two experts that lower the sum of squares of all parts' loads, for each place the best one, until none is
   left: squares show the way where the busiest part alone does not change. The price is not looked at yet.
3. The same with the cost itself. The present arrangement goes through this step without the one before too.
4. The cheapest of the three results, and more of step 3; where none is cheaper than staying, nothing moves.

Numbers are integers held as float64, below 2**53, so sums are exact in any order and results have the same bits on any
machine. Ties go to the lower expert.

Everything that is compiled is in this file: numba's cache looks at no other when it decides whether it is stale.

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

_SQUARE_ROUNDS, _TRIAL_ROUNDS = 2, 1  # later ones find next to nothing

# Exact sums may be made in any order, and there is no NaN.
_FAST = {"reassoc", "nnan", "ninf", "nsz", "contract"}


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
def _busiest(loads: Floats) -> float:
    """Sum over micro-batches of the busiest part's tokens."""
    total = 0.0
    for m in range(loads.shape[1]):
        most = 0.0
        for b in range(loads.shape[0]):
            most = max(most, loads[b, m])
        total += most
    return total


@_jit
def _sort_by_part(tokens: Floats, part: Array, columns: Floats, at: Array) -> None:
    """Experts part after part: their tokens into ``columns`` ``[M, E]``, their ids into ``at`` ``[E]``.

    A part's experts lie side by side, so a loop over them is one over neighbours in memory: it runs in vectors.
    """
    experts, microbatches = tokens.shape
    at[:] = np.argsort(part, kind="mergesort")
    for place in range(experts):
        for m in range(microbatches):
            columns[m, place] = tokens[at[place], m]


@_jit
def _swap(first: int, second: int, columns: Floats, at: Array, loads: Floats) -> None:
    """Exchange the experts of two places."""
    per_part = len(at) // loads.shape[0]
    for m in range(columns.shape[0]):
        more = columns[m, second] - columns[m, first]
        loads[first // per_part, m] += more
        loads[second // per_part, m] -= more
        columns[m, first], columns[m, second] = columns[m, second], columns[m, first]
    at[first], at[second] = at[second], at[first]


@_jit
def _best(change: Floats, base: int, at: Array, best: float, partner: int) -> tuple[float, int]:
    """The lowest change below 0 of a part's places and of the best one so far; ties to the lower expert."""
    for j in range(len(change)):
        if change[j] < best or (change[j] == best and partner >= 0 and at[base + j] < at[partner]):
            best = change[j]
            partner = base + j
    return best, partner


@_jit
def _lower_squares(tokens: Floats, part: Array, loads: Floats, rounds: int) -> None:
    """Swaps while the sum of squares of ``loads`` falls; in place."""
    experts, microbatches = tokens.shape
    parts = loads.shape[0]
    per_part = experts // parts
    columns = np.empty((microbatches, experts), dtype=np.float64)
    at = np.empty(experts, dtype=np.int64)
    _sort_by_part(tokens, part, columns, at)
    change = np.empty(per_part, dtype=np.float64)
    for _ in range(rounds):
        swapped = False
        for first in range(experts):
            a = first // per_part
            best = 0.0
            partner = -1
            for b in range(parts):
                if b == a:
                    continue
                change[:] = 0.0
                base = b * per_part
                for m in range(microbatches):
                    mine = columns[m, first]
                    apart = loads[a, m] - loads[b, m] - mine
                    row = columns[m, base : base + per_part]
                    for j in range(per_part):
                        change[j] += (row[j] - mine) * (row[j] + apart)
                best, partner = _best(change, base, at, best, partner)
            if partner >= 0:
                _swap(first, partner, columns, at, loads)
                swapped = True
        if not swapped:
            break
    for place in range(experts):
        part[at[place]] = place // per_part


@_jit
def _lower_cost(
    tokens: Floats, part: Array, origin: Array, price: Floats, weight: float, loads: Floats, rounds: int
) -> None:
    """Swaps while the cost falls; in place. ``price`` ``[B, B]``: of an expert moved from one part to another."""
    experts, microbatches = tokens.shape
    parts = loads.shape[0]
    per_part = experts // parts
    columns = np.empty((microbatches, experts), dtype=np.float64)
    at = np.empty(experts, dtype=np.int64)
    _sort_by_part(tokens, part, columns, at)
    change = np.empty(per_part, dtype=np.float64)
    most = np.empty(microbatches, dtype=np.float64)  # tokens of the busiest part beside a swap's first,
    second_most = np.empty(microbatches, dtype=np.float64)  # of the next one,
    where = np.empty(microbatches, dtype=np.int64)  # and which part is the busiest
    for _ in range(rounds):
        swapped = False
        for first in range(experts):
            a = first // per_part
            now = 0.0
            for m in range(microbatches):
                most[m] = 0.0
                second_most[m] = 0.0
                where[m] = -1
                for b in range(parts):
                    if b == a:
                        continue
                    if loads[b, m] > most[m]:
                        second_most[m] = most[m]
                        most[m] = loads[b, m]
                        where[m] = b
                    elif loads[b, m] > second_most[m]:
                        second_most[m] = loads[b, m]
                now += max(most[m], loads[a, m])
            best = 0.0
            partner = -1
            for b in range(parts):
                if b == a:
                    continue
                change[:] = 0.0
                base = b * per_part
                for m in range(microbatches):
                    mine = columns[m, first]
                    others = second_most[m] if where[m] == b else most[m]
                    left = loads[a, m] - mine
                    right = loads[b, m] + mine
                    row = columns[m, base : base + per_part]
                    for j in range(per_part):
                        change[j] += max(others, max(left + row[j], right - row[j]))
                leave = price[origin[at[first]], b] - price[origin[at[first]], a]
                for j in range(per_part):
                    home = origin[at[base + j]]
                    change[j] = weight * (change[j] - now) + leave + price[home, a] - price[home, b]
                best, partner = _best(change, base, at, best, partner)
            if partner >= 0:
                _swap(first, partner, columns, at, loads)
                swapped = True
        if not swapped:
            break
    for place in range(experts):
        part[at[place]] = place // per_part


@_jit
def _longest_first(totals: Floats, parts: int, part: Array) -> None:
    """LPT with equally many experts in every part, into ``part``; ties to the lower id."""
    room = np.full(parts, len(totals) // parts, dtype=np.int64)
    filled = np.zeros(parts, dtype=np.float64)
    for expert in np.argsort(-totals, kind="mergesort"):
        target = -1
        for b in range(parts):
            if room[b] > 0 and (target < 0 or filled[b] < filled[target]):
                target = b
        part[expert] = target
        room[target] -= 1
        filled[target] += totals[expert]


@_jit
def _relabel(part: Array, origin: Array, parts: int) -> None:
    """Number parts so that many experts stay: largest overlap first, then exchanges of two numbers; in place."""
    overlap = np.zeros((parts, parts), dtype=np.int64)
    for expert in range(len(part)):
        overlap[part[expert], origin[expert]] += 1
    name = np.full(parts, -1, dtype=np.int64)
    taken = np.zeros(parts, dtype=np.bool_)
    for _ in range(parts):
        best = -1
        new, old = 0, 0
        for b in range(parts):
            if name[b] >= 0:
                continue
            for o in range(parts):
                if not taken[o] and overlap[b, o] > best:
                    best = overlap[b, o]
                    new, old = b, o
        name[new] = old
        taken[old] = True
    better = True
    while better:
        better = False
        for b in range(parts):
            for c in range(b):
                if overlap[b, name[c]] + overlap[c, name[b]] > overlap[b, name[b]] + overlap[c, name[c]]:
                    name[b], name[c] = name[c], name[b]
                    better = True
    for expert in range(len(part)):
        part[expert] = name[part[expert]]


@_jit
def _cost(part: Array, origin: Array, price: Floats, weight: float, loads: Floats) -> float:
    cost = weight * _busiest(loads)
    for expert in range(len(part)):
        cost += price[origin[expert], part[expert]]
    return cost


def arrange(
    tokens: Floats,
    home_slot: Array,
    experts_per_rank: int,
    ranks_per_part: int,
    price: Floats,
    weight: float,
    shift: float,
    rounds: int,
) -> Array:
    """The new part of each expert of a layer.

    Args:
        tokens: float64 ``[E, M]``: tokens of each expert in each micro-batch.
        home_slot: int64 ``[E]``: where experts are.
        experts_per_rank, ranks_per_part: the shape of the layout.
        price: float64 ``[B, B]``: of an expert moved from one part to another; 0 on the diagonal.
        weight: of a token of the busiest part.
        shift: tokens are divided by it (rounded down) for sums of squares, so that these stay exact.
        rounds: most times that every place looks for a swap in step 4 (fewer before).

    Returns:
        int64 ``[E]``.
    """
    experts, microbatches = tokens.shape
    parts = experts // (experts_per_rank * ranks_per_part)
    origin = home_slot // (experts_per_rank * ranks_per_part)
    totals = np.zeros(experts, dtype=np.float64)
    scaled = np.empty((experts, microbatches), dtype=np.float64)
    for expert in range(experts):
        for m in range(microbatches):
            totals[expert] += tokens[expert, m]
            scaled[expert, m] = np.floor(tokens[expert, m] / shift)
    loads = np.empty((parts, microbatches), dtype=np.float64)
    _part_loads(tokens, origin, loads)
    best = origin.copy()
    stay = weight * _busiest(loads)
    best_cost = stay
    part = np.empty(experts, dtype=np.int64)
    if parts > 1:
        for start in range(3):
            part[:] = origin
            if start == 2:
                _longest_first(totals, parts, part)
                _relabel(part, origin, parts)
            if start > 0:
                _part_loads(scaled, part, loads)
                _lower_squares(scaled, part, loads, min(rounds, _SQUARE_ROUNDS))
            _part_loads(tokens, part, loads)
            _lower_cost(tokens, part, origin, price, weight, loads, min(rounds, _TRIAL_ROUNDS))
            cost = _cost(part, origin, price, weight, loads)
            if cost < best_cost:
                best_cost = cost
                best[:] = part
        if best_cost < stay:
            _part_loads(tokens, best, loads)
            _lower_cost(tokens, best, origin, price, weight, loads, rounds)
    return best


@cache
def compiled() -> Callable[..., Any]:
    """:func:`arrange`, compiled on first use, from the cache on disk where there is one."""
    matrix = numba.types.Array(numba.float64, 2, "C", readonly=True)
    vector = numba.types.Array(numba.int64, 1, "C", readonly=True)
    integer, real = numba.int64, numba.float64
    signature = (matrix, vector, integer, integer, matrix, real, real, integer)
    try:
        return cast(Callable[..., Any], numba.njit([signature], cache=True, nogil=True, fastmath=_FAST)(arrange))
    except (OSError, RuntimeError):  # nowhere to write the cache: compiled in every process instead
        return cast(Callable[..., Any], numba.njit([signature], nogil=True, fastmath=_FAST)(arrange))
