"""The compiled parts of the search: a list scheduler with limits, and annealing of orders.

Both work on :class:`megatron_ultraep.pipeline.tables.Tables` as a tuple of arrays (:meth:`Tables.arrays`). A schedule
is a *sequence*: ids of node 0 in order, then of node 1, and so on.

Annealing moves one task within its node's order, past tasks of other kinds only: micro-batches stay first-in-first-out.
Its energy is the makespan above the wanted one plus the activations above the cap, summed over positions, each in its
unit. Both are soft, so it can pass through what is too long or too full; at 0 the wanted makespan is reached within the
cap. Moves are drawn where they can help:

1. too long: from a critical path, a task and what runs right before it on the same node. No other adjacent swap can
   shorten a schedule.
2. too full: at a position above the cap, a forward goes back or the next backward comes forward.
3. any other, which is free where nothing gets worse.

Everything that is compiled is in this file: numba's cache looks at no other when it decides whether it is stale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])

DEADLOCK, TOO_LATE = -1.0, -2.0
_NEVER = 1e300
_SLACK = 1e-9  # of sums of activations and times in another order
LARGE_FIRST, LONGEST_TAIL_FIRST = 1, 2  # rules of the list scheduler, to be added


def _jit(function: F) -> F:
    return cast(F, numba.njit(function))


@_jit
def _random(state: Array) -> float:
    """In [0, 1); xorshift, ``state`` uint64 ``[1]``, not 0."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return float((x >> np.uint64(11)) / 9007199254740992.0)


@_jit
def _run(tables: Any, sequence: Array, start: Array, end: Array, work: Any, limit: float) -> float:
    """The makespan, and all starts and ends; DEADLOCK, or TOO_LATE as soon as it must exceed ``limit``."""
    first, node, _, before, after, lag, duration, _, _, tail = tables
    head, free, stack, listed = work
    nodes = len(first) - 1
    end[:] = -1.0
    for n in range(nodes):
        head[n], free[n], stack[n], listed[n] = first[n], 0.0, n, True
    top, done, makespan = nodes, 0, 0.0
    while top > 0:
        top -= 1
        n = stack[top]
        listed[n] = False
        p, clock = head[n], free[n]
        while p < first[n + 1]:
            operation = sequence[p]
            needed = before[operation]
            begin = clock
            if needed >= 0:
                arrives = end[needed]
                if arrives < 0:
                    break
                begin = max(begin, arrives + lag[operation])
            clock = begin + duration[operation]
            start[operation], end[operation] = begin, clock
            if clock + tail[operation] > limit:
                return TOO_LATE
            p += 1
            done += 1
            woken = after[operation]
            if woken >= 0:
                m = node[woken]
                if m != n and not listed[m] and head[m] < first[m + 1] and sequence[head[m]] == woken:
                    stack[top], listed[m] = m, True
                    top += 1
        head[n], free[n] = p, clock
        makespan = max(makespan, clock)
    return makespan if done == len(end) else DEADLOCK


def _list_schedule(
    tables: Any,
    cap: Array,
    quota: Array,
    release: Array,
    bias: Array,
    rule: int,
    noise: float,
    state: Array,
    sequence: Array,
) -> float:
    """Of all tasks that can run take the earliest to start, and so on; fills ``sequence``, returns the makespan.

    Args:
        cap: float64 ``[nodes]``, most activations.
        quota: int64 ``[nodes, models]``, most micro-batches between forward and backward.
        release: float64 ``[operations]``, earliest start.
        bias: float64 ``[kinds]``, added to priorities; the lowest of those that start equally early wins.
        rule: LARGE_FIRST: a task of another model does not start if it would hold up one of the first that is ready.
            LONGEST_TAIL_FIRST: priority is what remains of the micro-batch's way; otherwise backwards go first.
        noise: of priorities, uniform.

    Returns:
        DEADLOCK where caps or quotas leave nothing that can run.
    """
    first, node, kind, before, after, lag, duration, room, change, tail = tables
    nodes, kinds = len(first) - 1, 2 * quota.shape[1]
    following = np.full((nodes, kinds), -1)
    last = np.full((nodes, kinds), -1)
    for operation in range(len(node)):
        n, k = node[operation], kind[operation]
        if following[n, k] < 0:
            following[n, k] = operation
        last[n, k] = operation
    end = np.full(len(node), -1.0)
    free, held, position = np.zeros(nodes), np.zeros(nodes), first[:-1].copy()
    flight = np.zeros(quota.shape, dtype=np.int64)
    best_kind, best_start, best_priority = np.full(nodes, -1), np.full(nodes, _NEVER), np.full(nodes, _NEVER)
    makespan, chosen, woken = 0.0, -1, -1
    for turn in range(len(node)):
        # Only the node that ran something and the one that waited for it have other candidates than before.
        for n in range(nodes):
            if turn and n != chosen and n != woken:
                continue
            best_kind[n], best_start[n], best_priority[n], large = -1, _NEVER, _NEVER, _NEVER
            for k in range(kinds):
                operation = following[n, k]
                if operation < 0:
                    continue
                begin = max(free[n], release[operation])
                needed = before[operation]
                if needed >= 0:
                    if end[needed] < 0:
                        continue
                    begin = max(begin, end[needed] + lag[operation])
                if k % 2 == 0 and (held[n] + room[operation] > cap[n] or flight[n, k // 2] >= quota[n, k // 2]):
                    continue
                if k < 2:
                    large = min(large, begin)
                elif rule & LARGE_FIRST and begin + duration[operation] > large:
                    continue
                if begin > best_start[n]:
                    continue
                if rule & LONGEST_TAIL_FIRST:
                    priority = bias[k] - tail[operation]
                else:
                    priority = bias[k] + 0.1 * k - (k % 2)
                if noise > 0:
                    priority += noise * _random(state)
                if begin < best_start[n] or priority < best_priority[n]:
                    best_kind[n], best_start[n], best_priority[n] = k, begin, priority
        chosen = -1
        for n in range(nodes):
            if best_kind[n] >= 0 and (
                chosen < 0
                or best_start[n] < best_start[chosen]
                or (best_start[n] == best_start[chosen] and best_priority[n] < best_priority[chosen])
            ):
                chosen = n
        if chosen < 0:
            return DEADLOCK
        k = best_kind[chosen]
        operation = following[chosen, k]
        following[chosen, k] = operation + 1 if operation < last[chosen, k] else -1
        end[operation] = best_start[chosen] + duration[operation]
        free[chosen] = end[operation]
        makespan = max(makespan, end[operation])
        held[chosen] += change[operation]
        if change[operation] != 0:
            flight[chosen, k // 2] += 1 - 2 * (k % 2)
        sequence[position[chosen]] = operation
        position[chosen] += 1
        woken = node[after[operation]] if after[operation] >= 0 else -1
    return makespan


@_jit
def _critical(
    tables: Any, sequence: Array, place: Array, start: Array, end: Array, makespan: float, state: Array, found: Array
) -> int:
    """Walk back along a random critical path: positions whose task may swap with the next (``found``), and how many."""
    first, node, kind, before, _, lag, _, _, _, _ = tables
    operation, seen, count = -1, 0, 0
    for n in range(len(first) - 1):
        if first[n + 1] > first[n] and end[sequence[first[n + 1] - 1]] == makespan:
            seen += 1
            if _random(state) * seen < 1.0:
                operation = sequence[first[n + 1] - 1]
    while operation >= 0:
        p = place[operation]
        previous = sequence[p - 1] if p > first[node[operation]] else -1
        needed = before[operation]
        by_node = previous >= 0 and end[previous] == start[operation]
        by_needed = needed >= 0 and end[needed] + lag[operation] == start[operation]
        if by_node and previous != needed and kind[previous] != kind[operation]:
            found[count] = p - 1
            count += 1
        if by_node and by_needed:
            by_node = _random(state) < 0.5
        operation = previous if by_node else needed if by_needed else -1
    return count


@_jit
def _too_full(tables: Any, sequence: Array, held: Array, cap: Array, state: Array) -> tuple[int, int]:
    """(from, distance) of a move at some position above its cap; (-1, 0) where there is none."""
    first, node, kind, _, _, _, _, room, _, _ = tables
    p = int(_random(state) * len(sequence))
    for _ in range(len(sequence)):
        if held[p] + room[sequence[p]] > cap[node[sequence[p]]]:
            break
        p = p + 1 if p + 1 < len(sequence) else 0
    n, distance = node[sequence[p]], 1 + int(_random(state) * 3)
    stop = first[n + 1] - 1
    if _random(state) < 0.5:
        while p < stop and kind[sequence[p + 1]] == kind[sequence[p]]:
            p += 1
        return p, distance
    while p < stop and kind[sequence[p]] % 2 == 0:
        p += 1
    return p, -distance


@_jit
def _target(tables: Any, sequence: Array, p: int, distance: int) -> int:
    """Where the task at ``p`` ends up when it moves by up to ``distance``: not past its kind, nor what it needs."""
    first, node, kind, before, _, _, _, _, _, _ = tables
    operation = sequence[p]
    n, step, q = node[operation], 1 if distance > 0 else -1, p
    while q != p + distance and first[n] <= q + step < first[n + 1]:
        other = sequence[q + step]
        if kind[other] == kind[operation]:
            break
        if (step > 0 and before[other] == operation) or (step < 0 and before[operation] == other):
            break
        q += step
    return q


@_jit
def _shift(sequence: Array, p: int, q: int) -> None:
    """Take what is at ``p`` to ``q``."""
    operation, step = sequence[p], 1 if q > p else -1
    while p != q:
        sequence[p] = sequence[p + step]
        p += step
    sequence[q] = operation


@_jit
def _excess(tables: Any, sequence: Array, low: int, high: int, held: float, cap: float) -> float:
    """Activations above the cap, summed over positions ``low`` to ``high`` of a node that holds ``held`` before."""
    room, change = tables[7], tables[8]
    total = 0.0
    for p in range(low, high + 1):
        total += max(0.0, held + room[sequence[p]] - cap)
        held += change[sequence[p]]
    return total


@_jit
def _refresh(tables: Any, sequence: Array, low: int, high: int, place: Array, held: Array) -> None:
    """Places, and what is held before each, of positions ``low`` to ``high``."""
    change = tables[8]
    before = held[low]
    for p in range(low, high + 1):
        place[sequence[p]] = p
        held[p] = before
        before += change[sequence[p]]


def _anneal(
    tables: Any,
    cap: Array,
    goal: float,
    units: tuple[float, float],
    temperatures: tuple[float, float],
    iterations: int,
    state: Array,
    sequence: Array,
    best: Array,
) -> float:
    """Cool from one temperature to the other; ``sequence`` and ``state`` go on in the next call.

    Args:
        cap: float64 ``[nodes]``. goal: wanted makespan.
        units: energy of one unit of time above ``goal``, of one unit of activations above ``cap`` at one position.
        best: filled with the sequence of the lowest energy.

    Returns:
        the lowest energy; stops at 0. Negative where ``sequence`` cannot run.
    """
    first, node = tables[0], tables[1]
    count, nodes = len(sequence), len(first) - 1
    start, end, start_new, end_new = np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count)
    place, held, found = np.zeros(count, np.int64), np.zeros(count), np.zeros(count, np.int64)
    work = (np.zeros(nodes, np.int64), np.zeros(nodes), np.zeros(nodes, np.int64), np.zeros(nodes, np.bool_))
    excess = 0.0
    for n in range(nodes):
        if first[n + 1] > first[n]:
            held[first[n]] = 0.0
            _refresh(tables, sequence, first[n], first[n + 1] - 1, place, held)
            excess += _excess(tables, sequence, first[n], first[n + 1] - 1, 0.0, cap[n])
    makespan = _run(tables, sequence, start, end, work, _NEVER)
    if makespan < 0:
        return makespan
    per_time, per_activation = units
    energy = per_time * max(0.0, makespan - goal) + per_activation * excess
    lowest = energy
    best[:] = sequence
    candidates = -1
    temperature = temperatures[0]
    cooling = (temperatures[1] / temperatures[0]) ** (1.0 / max(1, iterations))
    for _ in range(iterations):
        if lowest <= _SLACK:
            break
        temperature *= cooling
        p, distance = -1, 1
        choice = _random(state)
        if choice < 0.5 and makespan > goal + _SLACK:
            if candidates < 0:
                candidates = _critical(tables, sequence, place, start, end, makespan, state, found)
            if candidates:
                p = found[int(_random(state) * candidates)]
                if _random(state) < 0.3:
                    distance = 1 + int(_random(state) * 4)
        elif choice < 0.75 and excess > _SLACK:
            p, distance = _too_full(tables, sequence, held, cap, state)
        if p < 0:
            p = int(_random(state) * count)
            distance = 1 + int(_random(state) * 4) if _random(state) < 0.3 else 1
            if _random(state) < 0.5:
                distance = -distance
        q = _target(tables, sequence, p, distance)
        if q == p:
            continue
        n, low, high = node[sequence[p]], min(p, q), max(p, q)
        old = _excess(tables, sequence, low, high, held[low], cap[n])
        _shift(sequence, p, q)
        new_excess = max(0.0, excess + _excess(tables, sequence, low, high, held[low], cap[n]) - old)
        left = energy - temperature * np.log(1.0 - _random(state)) - per_activation * new_excess
        moved = TOO_LATE
        if left >= 0:
            moved = _run(tables, sequence, start_new, end_new, work, goal + left / per_time + _SLACK)
        if moved < 0:
            _shift(sequence, q, p)
            continue
        makespan, excess, candidates = moved, new_excess, -1
        start, start_new = start_new, start
        end, end_new = end_new, end
        _refresh(tables, sequence, low, high, place, held)
        energy = per_time * max(0.0, makespan - goal) + per_activation * excess
        if energy < lowest - _SLACK:
            lowest = energy
            best[:] = sequence
    return lowest


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return cast(Callable[..., Any], numba.njit(function, cache=True, nogil=True))
    except (OSError, RuntimeError):  # nowhere to write the cache: compiled in every process instead
        return cast(Callable[..., Any], numba.njit(function, nogil=True))


def list_schedule(*arguments: Any) -> float:
    """:func:`_list_schedule`, compiled on first use."""
    return cast(float, _compiled(_list_schedule)(*arguments))


def anneal(*arguments: Any) -> float:
    """:func:`_anneal`, compiled on first use."""
    return cast(float, _compiled(_anneal)(*arguments))
