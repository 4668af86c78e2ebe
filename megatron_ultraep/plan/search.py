"""The compiled part of :func:`megatron_ultraep.plan.quota.solve`: integers in, integers out.

A node's plan is the best of a fixed list of *attempts*. An attempt has a target (tokens that no rank of the node should
exceed) and a policy (in which order overloaded ranks export). It moves tokens from ranks above the target to ranks
below it.

1. Overloaded ranks export one after the other, from the hottest or from the coldest on (the policy), each from its
   expert with the most tokens left at home.
2. It goes to ranks below the target: as few as can hold what the rank must export and, of those, the ones with the
   least slack, looked for among neighbours in the order of slack. For one rank that is best fit.
3. Where no slot below the target is left, a rank that has exported before exports more and takes a replica in exchange.
4. A replica of fewer than ``min_tokens`` is never made: a smaller need is exceeded, a smaller slack is not used. One
   token of an expert stays at home.
5. An overloaded rank that can export no more is left as it is, and the others go on: every attempt is a legal plan.

Attempts do not depend on each other, nor on costs: a GPU may run them side by side. Among equals the earlier one wins,
and inside an attempt the lower id, so the order of the list is part of the result.

Everything that is compiled is in this file: numba's cache looks at no other when it decides whether it is stale.

Legend: ``D`` ranks of a node, ``L`` home experts of a rank, ``R`` slots of a rank, ``G`` ranks, ``E`` experts, ``P``
physical experts. A *place* is a home slot counted inside the node, ``0..D*L-1``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np

from megatron_ultraep.plan.types import Array

F = TypeVar("F", bound=Callable[..., Any])

MOST_TOKENS = 2**30
"""Tokens of all ranks together that fit the arithmetic (products of two counts stay in int64)."""

BALANCED, WITHIN_TOLERANCE, GAIN_BELOW_COST, NO_REPLICA_POSSIBLE, EMPTY = range(5)
VALID, NEGATIVE, TOO_MANY = range(3)

_HOT_FIRST, _COLD_FIRST = range(2)
_POLICIES = 2
_STEPS = 8  # targets of a ladder
_MILLION = 1_000_000


def _jit(function: F) -> F:
    return cast(F, numba.njit(function))


@_jit
def _largest_expert(rank: int, home_tokens: Array, expert_at: Array, experts_per_rank: int) -> int:
    """Place of the expert of a rank with the most tokens at home; ties to the lower logical id."""
    largest = rank * experts_per_rank
    for place in range(largest + 1, largest + experts_per_rank):
        if home_tokens[place] > home_tokens[largest] or (
            home_tokens[place] == home_tokens[largest] and expert_at[place] < expert_at[largest]
        ):
            largest = place
    return largest


@_jit
def _receiver(need: int, slack: Array, receivers: Array) -> int:
    """Where to begin in ``receivers`` (ranks by slack, descending): the tightest run of ranks that holds the need.

    As few ranks as can hold it, consecutive in the order, with the least slack in all. 0 where all do not suffice.
    """
    width = 0
    run = 0
    while run < need:
        if width == len(receivers):
            return 0
        run += slack[receivers[width]]
        width += 1
    best = 0
    best_run = run
    for first in range(1, len(receivers) - width + 1):
        run += slack[receivers[first + width - 1]] - slack[receivers[first - 1]]
        if run < need:
            break
        if run < best_run:
            best = first
            best_run = run
    return best


@_jit
def _reorder(position: int, count: int, usable: bool, slack: Array, receivers: Array) -> int:
    """Move the rank at a position back to where its slack, now smaller, belongs, or out; returns how many are left."""
    rank = receivers[position]
    while position + 1 < count and (
        not usable
        or slack[receivers[position + 1]] > slack[rank]
        or (slack[receivers[position + 1]] == slack[rank] and receivers[position + 1] < rank)
    ):
        receivers[position] = receivers[position + 1]
        position += 1
    receivers[position] = rank
    return count if usable else count - 1


@_jit
def _relay(
    place: int,
    tokens: int,
    replicas: Array,
    slack: Array,
    received: Array,
    slots: int,
    home_tokens: Array,
    min_tokens: int,
) -> int:
    """The replica that can grow the most, so that its home takes a replica of ``place`` in exchange; -1 for none.

    Slots below the target are used up, but slack is left in some of those ranks. A rank above the target that has
    exported to one of them has slots of its own: it exports more, and takes as much in.
    """
    experts_per_rank = len(home_tokens) // len(slack)
    best = -1
    best_tokens = min_tokens - 1
    for i in range(len(replicas)):
        home = replicas[i, 0] // experts_per_rank
        more = min(tokens, slack[replicas[i, 1]], home_tokens[replicas[i, 0]] - 1)
        if more <= best_tokens or received[home] == slots or home == place // experts_per_rank:
            continue
        if not np.any((replicas[:, 0] == place) & (replicas[:, 1] == home)):
            best = i
            best_tokens = more
    return best


@_jit
def _attempt(
    tokens: Array, expert_at: Array, load: Array, slots: int, target: int, min_tokens: int, policy: int, replicas: Array
) -> tuple[int, int, int]:
    """One plan of a node.

    Args:
        tokens: int64 ``[D * L]``, tokens of the expert at each place.
        expert_at: int64 ``[D * L]``, its logical id.
        load: int64 ``[D]``, tokens of each rank.
        slots, target, min_tokens, policy: see the module.
        replicas: int64 ``[D * R, 3]``, written: place, rank and tokens of each replica.

    Returns:
        Number of replicas, tokens of the busiest rank, and the most replicas that one rank sends or receives.
    """
    ranks = len(load)
    experts_per_rank = len(tokens) // ranks
    home_tokens = tokens.copy()
    slack = target - load
    givers = np.argsort(slack, kind="mergesort")[: np.sum(slack < 0)]
    if policy == _COLD_FIRST:
        givers = givers[::-1]
    room = int(np.sum(slack >= min_tokens)) if slots else 0
    receivers = np.argsort(-slack, kind="mergesort")[:room]
    received = np.zeros(ranks, dtype=np.int64)
    count = 0
    link = 0
    for giver in givers:
        sent = 0
        while slack[giver] < 0:
            place = _largest_expert(giver, home_tokens, expert_at, experts_per_rank)
            if home_tokens[place] <= min_tokens:
                break
            piece = min(max(-slack[giver], min_tokens), home_tokens[place] - 1)
            if room > 0:
                position = _receiver(max(-slack[giver], min_tokens), slack, receivers[:room])
                rank = receivers[position]
                piece = min(piece, slack[rank])
            else:
                relay = _relay(place, piece, replicas[:count], slack, received, slots, home_tokens, min_tokens)
                if relay < 0:
                    break
                position = -1
                rank = replicas[relay, 0] // experts_per_rank
                piece = min(piece, slack[replicas[relay, 1]], home_tokens[replicas[relay, 0]] - 1)
                replicas[relay, 2] += piece
                home_tokens[replicas[relay, 0]] -= piece
                slack[replicas[relay, 1]] -= piece
                slack[rank] += piece
            replicas[count, 0] = place
            replicas[count, 1] = rank
            replicas[count, 2] = piece
            count += 1
            sent += 1
            received[rank] += 1
            link = max(link, sent, received[rank])
            home_tokens[place] -= piece
            slack[giver] += piece
            slack[rank] -= piece
            if position >= 0:
                usable = bool(received[rank] < slots and slack[rank] >= min_tokens)
                room = _reorder(position, room, usable, slack, receivers)
    return count, target - slack.min(), link


@_jit
def _balance(
    tokens: Array,
    expert_at: Array,
    load: Array,
    slots: int,
    min_tokens: int,
    tolerance_ppm: int,
    costs: Array,
    decision: Array,
) -> Array:
    """The best plan of a node; see :func:`_attempt` for the shapes.

    Args:
        costs: int64 ``[4]``: 1 with a gate, else 0; ``token_ps``; ``replica_ps``; ``fixed_ps``.
        decision: int64 ``[6]``, written: outcome and the numbers of ``NodeDecision``.

    Returns:
        int64 ``[replicas, 3]``: place, rank and tokens of each.
    """
    ranks = len(load)
    gated, token_ps, replica_ps, fixed_ps = costs
    total = load.sum()
    before = load.max()
    bound = (total + ranks - 1) // ranks
    tolerated = bound * (_MILLION + tolerance_ppm) // _MILLION
    chosen = np.empty((ranks * slots, 3), dtype=np.int64)
    candidate = np.empty((ranks * slots, 3), dtype=np.int64)
    decision[0] = EMPTY if total == 0 else WITHIN_TOLERANCE
    decision[1] = before
    decision[2] = before
    decision[3] = bound
    decision[4] = 0
    decision[5] = 0
    if before <= tolerated:
        return chosen[:0]

    unbalanced = token_ps * before
    best_count = 0
    best_peak = before
    best_key = np.int64(0)
    lowest = before  # the lowest busiest rank of all attempts
    # First the tolerance, then a ladder of targets from there to no balancing at all (a gate may want less), then,
    # where the tolerance was not reached, a finer ladder up to the lowest peak found.
    for ladder in range(3):
        if ladder > 0 and lowest <= tolerated and (ladder == 2 or not gated):
            break
        top = lowest if ladder == 2 else before
        for step in range(_STEPS if ladder else 1):
            # The last step of the finer ladder is the lowest peak itself: a target that is reached takes fewer
            # replicas than a lower one that is missed.
            target = tolerated + (top - tolerated) * (step + 1) // _STEPS if ladder else tolerated
            for policy in range(_POLICIES):
                count, peak, link = _attempt(tokens, expert_at, load, slots, target, min_tokens, policy, candidate)
                lowest = min(lowest, peak)
                if peak >= before:
                    continue
                if gated:
                    key = token_ps * peak + replica_ps * link + fixed_ps
                else:
                    key = max(peak, tolerated)
                if (
                    best_count == 0
                    or key < best_key
                    or (key == best_key and (count < best_count or (count == best_count and peak < best_peak)))
                ):
                    best_key = key
                    best_count = count
                    best_peak = peak
                    chosen, candidate = candidate, chosen
    if best_count == 0:
        decision[0] = NO_REPLICA_POSSIBLE
        return chosen[:0]
    if gated:
        decision[4] = token_ps * (before - best_peak)
        decision[5] = best_key - token_ps * best_peak
        if best_key >= unbalanced:
            decision[0] = GAIN_BELOW_COST
            return chosen[:0]
    decision[0] = BALANCED
    decision[2] = best_peak
    return chosen[:best_count]


@_jit
def _apportion(weights: Array, total: int, quota: int, remainders: Array, share: Array) -> None:
    """Split ``quota`` tokens over sources in proportion to their weights: largest remainder, ties to the lower source.

    Args:
        weights: int64 ``[G]``, tokens each source has, ``total`` in all.
        quota: tokens to take, 0 to ``total``.
        remainders: int64 ``[G]``, scratch.
        share: int64 ``[G]``, written; at most the weights, ``quota`` in all.
    """
    over = quota
    for source in range(len(weights)):
        share[source] = weights[source] * quota // total
        remainders[source] = weights[source] * quota - share[source] * total
        over -= share[source]
    if over == 0:
        return
    # The `over`-th largest remainder, by bisection on its value: no sort, and the same on any machine.
    low = 1
    high = total
    while high - low > 1:
        middle = (low + high) // 2
        if np.sum(remainders >= middle) >= over:
            low = middle
        else:
            high = middle
    equal = over - np.sum(remainders > low)
    for source in range(len(weights)):
        if remainders[source] > low:
            share[source] += 1
        elif remainders[source] == low and equal > 0:
            share[source] += 1
            equal -= 1


@_jit
def _split_over_sources(
    quotas: Array, ranks: Array, rest: Array, remainders: Array, share: Array, split: Array
) -> None:
    """Which source sends how much to which copy of one expert: its own rank's copy first, the rest in proportion.

    Args:
        quotas: int64 ``[C]``, tokens of each copy; used up.
        ranks: int64 ``[C]``, the rank of each copy.
        rest: int64 ``[G]``, tokens of the expert on each source rank; used up.
        remainders, share: int64 ``[G]``, scratch.
        split: int64 ``[C, G]``, written: rows sum to the quotas, columns to the sources' tokens.
    """
    split[:] = 0
    total = 0
    for copy in range(len(quotas)):
        local = min(rest[ranks[copy]], quotas[copy])
        split[copy, ranks[copy]] = local
        rest[ranks[copy]] -= local
        quotas[copy] -= local
        total += quotas[copy]
    for copy in range(len(quotas)):
        if quotas[copy] == 0:
            continue
        _apportion(rest, total, quotas[copy], remainders, share)
        for source in range(len(rest)):
            split[copy, source] += share[source]
            rest[source] -= share[source]
        total -= quotas[copy]


@_jit
def _total_tokens(loads: Array, totals: Array) -> int:
    """Sums over source ranks into ``totals`` ``[E]``; returns whether the loads are valid."""
    totals[:] = 0
    lowest = 0
    highest = 0
    for source in range(loads.shape[0]):
        for expert in range(loads.shape[1]):
            lowest = min(lowest, loads[source, expert])
            highest = max(highest, loads[source, expert])
            totals[expert] += loads[source, expert]
    if lowest < 0:
        return NEGATIVE
    # Single loads first: sums of larger ones might have wrapped.
    return TOO_MANY if highest > MOST_TOKENS or totals.sum() > MOST_TOKENS else VALID


def plan_arrays(
    loads: Array,
    expert_at: Array,
    ranks: int,
    node_size: int,
    slots: int,
    min_tokens: int,
    tolerance_ppm: int,
    costs: Array,
) -> tuple[int, Array, Array, Array]:
    """Plan all nodes.

    Args:
        loads: int64 ``[G, E]``.
        expert_at: int64 ``[E]``, the logical expert in each home slot.
        ranks, node_size, slots: ``G``, ``D``, ``R``.
        min_tokens, tolerance_ppm, costs: see :func:`_balance`.

    Returns:
        Whether the loads are valid (where not, the rest is void); replicas, int64 ``[G, R]``; quota, int64 ``[G, P]``;
        decisions, int64 ``[nodes, 6]``.
    """
    experts = len(expert_at)
    homes = experts // ranks
    width = homes + slots
    replica_expert = np.full((ranks, slots), -1, dtype=np.int64)
    quota = np.zeros((ranks, ranks * width), dtype=np.int64)
    decisions = np.zeros((ranks // node_size, 6), dtype=np.int64)
    totals = np.empty(experts, dtype=np.int64)
    valid = _total_tokens(loads, totals)
    if valid != VALID:
        return valid, replica_expert, quota, decisions

    for source in range(ranks):
        place = 0
        for rank in range(ranks):
            for home in range(homes):
                quota[source, rank * width + home] = loads[source, expert_at[place]]
                place += 1

    places = node_size * homes
    tokens = np.empty(places, dtype=np.int64)
    load = np.empty(node_size, dtype=np.int64)
    rest = np.empty(ranks, dtype=np.int64)
    remainders = np.empty(ranks, dtype=np.int64)
    share = np.empty(ranks, dtype=np.int64)
    split = np.empty((node_size, ranks), dtype=np.int64)
    copy_tokens = np.empty(node_size, dtype=np.int64)
    copy_rank = np.empty(node_size, dtype=np.int64)
    column = np.empty(node_size, dtype=np.int64)
    for node in range(ranks // node_size):
        first_rank = node * node_size
        expert_here = expert_at[first_rank * homes : first_rank * homes + places]
        load[:] = 0
        for place in range(places):
            tokens[place] = totals[expert_here[place]]
            load[place // homes] += tokens[place]
        replicas = _balance(tokens, expert_here, load, slots, min_tokens, tolerance_ppm, costs, decisions[node])
        _fill_slots(replicas, expert_here, replica_expert[first_rank : first_rank + node_size])
        for place in range(places):
            copies = _copies(place, homes, tokens[place], replicas, copy_tokens, copy_rank)
            if copies == 1:
                continue
            expert = expert_here[place]
            for copy in range(copies):
                copy_rank[copy] += first_rank
                column[copy] = copy_rank[copy] * width + place % homes
                if copy > 0:
                    slot = 0
                    while replica_expert[copy_rank[copy], slot] != expert:
                        slot += 1
                    column[copy] = copy_rank[copy] * width + homes + slot
            for source in range(ranks):
                rest[source] = loads[source, expert]
            _split_over_sources(copy_tokens[:copies], copy_rank[:copies], rest, remainders, share, split[:copies])
            for source in range(ranks):
                for copy in range(copies):
                    quota[source, column[copy]] = split[copy, source]
    return valid, replica_expert, quota, decisions


@_jit
def _fill_slots(replicas: Array, expert_here: Array, replica_expert: Array) -> None:
    """Write the replicas of a node into the slots of its ranks, int64 ``[D, R]``, by logical expert."""
    for i in range(len(replicas)):
        expert = expert_here[replicas[i, 0]]
        rank = replicas[i, 1]
        slot = 0
        while replica_expert[rank, slot] >= 0 and replica_expert[rank, slot] < expert:
            slot += 1
        for later in range(replica_expert.shape[1] - 1, slot, -1):
            replica_expert[rank, later] = replica_expert[rank, later - 1]
        replica_expert[rank, slot] = expert


@_jit
def _copies(place: int, homes: int, tokens: int, replicas: Array, copy_tokens: Array, copy_rank: Array) -> int:
    """Tokens and rank (in the node) of each copy of a place's expert, home first, then by rank; returns how many."""
    copy_tokens[0] = tokens
    copy_rank[0] = place // homes
    copies = 1
    for i in range(len(replicas)):
        if replicas[i, 0] != place:
            continue
        at = copies
        while at > 1 and copy_rank[at - 1] > replicas[i, 1]:
            copy_rank[at] = copy_rank[at - 1]
            copy_tokens[at] = copy_tokens[at - 1]
            at -= 1
        copy_rank[at] = replicas[i, 1]
        copy_tokens[at] = replicas[i, 2]
        copy_tokens[0] -= replicas[i, 2]
        copies += 1
    return copies


@cache
def compiled() -> Callable[..., Any]:
    """:func:`plan_arrays`, compiled on first use, from the cache on disk where there is one.

    The signature is fixed, so no call compiles a second time; it takes arrays that are writeable or not.
    """
    matrix = numba.types.Array(numba.int64, 2, "C", readonly=True)
    vector = numba.types.Array(numba.int64, 1, "C", readonly=True)
    integer = numba.int64
    signature = (matrix, vector, integer, integer, integer, integer, integer, vector)
    try:
        return cast(Callable[..., Any], numba.njit([signature], cache=True, nogil=True)(plan_arrays))
    except (OSError, RuntimeError):  # nowhere to write the cache: compiled in every process instead
        return cast(Callable[..., Any], numba.njit([signature], nogil=True)(plan_arrays))
