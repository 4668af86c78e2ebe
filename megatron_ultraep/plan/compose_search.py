"""The compiled part of :func:`megatron_ultraep.plan.compose.compose`: a local search over packings, in integers.

A *bin* is one micro-batch of one data-parallel rank; its number is ``micro-batch * data_parallel + rank``. A *column*
is what exchanges tokens at one time: the bins of one micro-batch index whose ranks are of one expert-parallel group.

Each proposal changes two bins of different columns: two samples change places, one sample moves, or the bins change
places whole. It is taken when it fits (no bin above the budget, no more rows in all than allowed) and the sum of both
columns' values falls. Proposals are drawn by a generator of its own (Lehmer's, modulus ``2**31 - 1``), so that the same
arguments give the same packing on every machine. The work is bounded by numbers looked at, not by a clock.

Everything that is compiled is in this file: numba's cache looks at no other when it decides whether it is stale.

Legend: ``S`` samples, ``N`` MoE layers, ``C`` cells of a layer (``P`` parts of ``C / P`` cells each), ``B`` bins, ``Q``
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np

from megatron_ultraep.plan.types import Array

F = TypeVar("F", bound=Callable[..., Any])

_PATIENCE = 8  # the search ends after this part of its work without a change
_LEHMER_FACTOR, _LEHMER_MODULUS = 48271, 2**31 - 1


def _jit(function: F) -> F:
    return cast(F, numba.njit(function))


@_jit
def _part_value(load: Array, first: int, width: int, drop: int, largest: Array) -> int:
    """Tokens of ``load[first : first + width]`` less the ``drop`` largest cells; ``largest`` is scratch ``[drop]``."""
    total = 0
    for slot in range(drop):
        largest[slot] = 0
    for cell in range(first, first + width):
        tokens = load[cell]
        total += tokens
        if drop > 0 and tokens > largest[drop - 1]:
            at = drop - 1
            while at > 0 and largest[at - 1] < tokens:
                largest[at] = largest[at - 1]
                at -= 1
            largest[at] = tokens
    for slot in range(drop):
        total -= largest[slot]
    return total


@_jit
def layer_value(load: Array, parts: int, drop: int, largest: Array) -> int:
    """What a layer's busiest part keeps, at least the mean of all parts (rounded up); ``load`` is int64 ``[C]``.

    A part keeps its tokens without the ``drop`` largest cells; 0 where a part has one cell.
    """
    width = len(load) // parts
    total = 0
    if width == 1:  # the largest cell, which is no less than the mean
        for cell in range(parts):
            total = max(total, load[cell])
        return total
    for cell in range(len(load)):
        total += load[cell]
    value = -(-total // parts)
    for part in range(parts):
        value = max(value, _part_value(load, part * width, width, drop, largest))
    return value


@_jit
def _changed_value(load: Array, change: Array, sign: int, parts: int, drop: int, row: Array, largest: Array) -> int:
    """Value of a column (``[N, C]``) after ``sign * change`` is added to its loads; ``row`` is scratch ``[C]``."""
    value = 0
    for layer in range(load.shape[0]):
        for cell in range(load.shape[1]):
            row[cell] = load[layer, cell] + sign * change[layer, cell]
        value += layer_value(row, parts, drop, largest)
    return value


@_jit
def _padded(bin_rows: Array, micro_batch: int, ranks: int, multiple: int, one: int, other: int, by: int) -> int:
    """Rows of a micro-batch index when bin ``one`` has ``by`` more and bin ``other`` has ``by`` fewer."""
    longest = 1
    for item in range(micro_batch * ranks, (micro_batch + 1) * ranks):
        rows = bin_rows[item]
        if item == one:
            rows += by
        if item == other:
            rows -= by
        longest = max(longest, rows)
    return -(-longest // multiple) * multiple


@_jit
def _fits(bin_rows: Array, ranks: int, multiple: int, budget: int, spare: int, one: int, other: int, by: int) -> int:
    """Spare rows (per rank) that are left when bin ``one`` gets ``by`` rows of ``other``; -1 where they do not fit."""
    if bin_rows[one] + by > budget or bin_rows[other] - by > budget:
        return -1
    if by == 0:
        return spare
    first, second = one // ranks, other // ranks
    left = spare
    left += _padded(bin_rows, first, ranks, multiple, one, other, 0)
    left -= _padded(bin_rows, first, ranks, multiple, one, other, by)
    if first != second:
        left += _padded(bin_rows, second, ranks, multiple, one, other, 0)
        left -= _padded(bin_rows, second, ranks, multiple, one, other, by)
    return max(left, -1)


@_jit
def _next(state: Array, below: int) -> int:
    """The next number of the generator, in ``0..below-1``."""
    state[0] = state[0] * _LEHMER_FACTOR % _LEHMER_MODULUS
    drawn: int = state[0] % below
    return drawn


@_jit
def _place_of(order: Array, sample: Array, state: Array) -> int:
    """A sample near another in length: ``sample[0]`` is a place in ``order`` (by length), the result another one."""
    doublings = 1
    while (1 << doublings) < len(order):
        doublings += 1
    far = min(1 << _next(state, doublings + 1), len(order) - 1)
    offset = 1 + _next(state, far)
    place = sample[0] + offset if _next(state, 2) == 0 else sample[0] - offset
    near: int = place % len(order)
    return near


def improve(
    cells: Array,
    sample_rows: Array,
    bin_of: Array,
    order: Array,
    bins: int,
    ranks: int,
    group_ranks: int,
    parts: int,
    drop: int,
    multiple: int,
    budget: int,
    spare: int,
    work: int,
    seed: int,
) -> tuple[Array, int]:
    """Improve a packing.

    Args:
        cells: int32 ``[S, N, C]``: tokens of each sample.
        sample_rows: int64 ``[S]``.
        bin_of: int64 ``[S]``: bin of each sample; kept unchanged.
        order: int64 ``[S]``: samples by length.
        bins: number of bins B, a multiple of ``ranks``.
        ranks: data-parallel ranks.
        group_ranks: data-parallel ranks of one expert-parallel group; divides ``ranks``.
        parts, drop: of :func:`layer_value`.
        multiple: bins are padded to a multiple of this.
        budget: most rows of a bin.
        spare: rows (per rank, over all micro-batches) that padding may add to what the packing has now.
        work: numbers to look at; it ends early after an eighth of them without a change.
        seed: of the generator, ``1..2**31 - 2``.

    Returns:
        int64 ``[S]``: bin of each sample; and the number of changes made.
    """
    samples, layers, width = cells.shape
    groups = ranks // group_ranks
    bin_of = bin_of.copy()
    bin_rows = np.zeros(bins, dtype=np.int64)
    loads = np.zeros((bins // ranks * groups, layers, width), dtype=np.int64)
    for sample in range(samples):
        item = bin_of[sample]
        bin_rows[item] += sample_rows[sample]
        column = item // ranks * groups + item % ranks // group_ranks
        for layer in range(layers):
            for cell in range(width):
                loads[column, layer, cell] += cells[sample, layer, cell]
    change = np.zeros((layers, width), dtype=np.int64)
    row = np.zeros(width, dtype=np.int64)
    largest = np.zeros(drop + 1, dtype=np.int64)
    values = np.zeros(len(loads), dtype=np.int64)
    for column in range(len(loads)):
        values[column] = _changed_value(loads[column], change, 0, parts, drop, row, largest)
    state = np.array([seed], dtype=np.int64)
    place = np.zeros(1, dtype=np.int64)
    made = 0
    patience = work // _PATIENCE
    give_up = work - patience  # the work left at which nothing has been found for too long
    while work > max(0, give_up):
        work -= 16 + 4 * ranks  # to draw it, and to see whether it fits
        kind = _next(state, 8)  # 0: bins change places; 1: a sample moves; else: samples change places
        place[0] = _next(state, samples)
        mine = order[place[0]]
        one = bin_of[mine]
        theirs = order[_place_of(order, place, state)] if kind > 1 and samples > 1 else -1
        other = bin_of[theirs] if theirs >= 0 else _next(state, bins)
        left = one // ranks * groups + one % ranks // group_ranks
        right = other // ranks * groups + other % ranks // group_ranks
        if left == right:
            continue
        if kind == 0:
            gained = bin_rows[other] - bin_rows[one]
        else:
            gained = (sample_rows[theirs] if theirs >= 0 else 0) - sample_rows[mine]
        spare_after = _fits(bin_rows, ranks, multiple, budget, spare, one, other, gained)
        if spare_after < 0:
            continue
        work -= 4 * layers * width
        if kind == 0:
            work -= samples
            change[:] = 0
            for sample in range(samples):
                if bin_of[sample] == one:
                    change -= cells[sample]
                elif bin_of[sample] == other:
                    change += cells[sample]
        elif theirs >= 0:
            for layer in range(layers):
                for cell in range(width):
                    change[layer, cell] = np.int64(cells[theirs, layer, cell]) - np.int64(cells[mine, layer, cell])
        else:
            for layer in range(layers):
                for cell in range(width):
                    change[layer, cell] = -np.int64(cells[mine, layer, cell])
        value_left = _changed_value(loads[left], change, 1, parts, drop, row, largest)
        if value_left >= values[left] + values[right]:
            continue
        value_right = _changed_value(loads[right], change, -1, parts, drop, row, largest)
        if value_left + value_right >= values[left] + values[right]:
            continue
        made += 1
        give_up = work - patience
        spare = spare_after
        loads[left] += change
        loads[right] -= change
        values[left] = value_left
        values[right] = value_right
        bin_rows[one] += gained
        bin_rows[other] -= gained
        if kind == 0:
            for sample in range(samples):
                if bin_of[sample] == one:
                    bin_of[sample] = other
                elif bin_of[sample] == other:
                    bin_of[sample] = one
        else:
            bin_of[mine] = other
            if theirs >= 0:
                bin_of[theirs] = one
    return bin_of, made


@cache
def compiled() -> Callable[..., Any]:
    """:func:`improve`, compiled on first use, from the cache on disk where there is one."""
    cells = numba.types.Array(numba.int32, 3, "C", readonly=True)
    vector = numba.types.Array(numba.int64, 1, "C", readonly=True)
    signature = (cells, vector, vector, vector, *[numba.int64] * 10)
    try:
        return cast(Callable[..., Any], numba.njit([signature], cache=True, nogil=True)(improve))
    except (OSError, RuntimeError):  # nowhere to write the cache: compiled in every process instead
        return cast(Callable[..., Any], numba.njit([signature], nogil=True)(improve))
