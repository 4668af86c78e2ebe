"""UltraEP's published planning rule, as released: greedy, with a fast path that ignores the floor. A comparator.

Plain Python, so its run time says nothing about the original.
"""

from __future__ import annotations

import numpy as np

from megatron_ultraep.plan.types import Array

_TOLERANCE_PERCENT = 1
_RETRIES = 2

Export = tuple[int, int, int]
"""Place of the expert in the node, receiving rank of the node, tokens."""


def plan_node(tokens: Array, ranks: int, slots: int, min_tokens: int) -> list[Export]:
    """Exports of one node.

    Args:
        tokens: int64 ``[D * L]``: tokens of each home expert, rank by rank.
        ranks: ``D``.
        slots: ``R``.
        min_tokens: floor of an export, where the rule has one.
    """
    load = tokens.reshape(ranks, -1).sum(axis=1)
    lowest = -(-int(load.sum()) // ranks)
    highest = int(load.max())
    target = -(-lowest * (100 + _TOLERANCE_PERCENT) // 100)
    if target >= highest:
        return []
    for retry in range(1 + _RETRIES):
        exports = _try(tokens, ranks, slots, target + retry * (highest // 100), 1)
        if exports is not None:
            return exports
    best: list[Export] = []
    while lowest < highest:
        middle = (lowest + highest) // 2
        exports = _try(tokens, ranks, slots, middle, min_tokens)
        if exports is None:
            lowest = middle + 1
        else:
            highest = middle
            best = exports
    return best


def _try(tokens: Array, ranks: int, slots: int, target: int, min_tokens: int) -> list[Export] | None:
    """Exports after which no rank exceeds ``target``; None where the greedy rule finds none."""
    experts_per_rank = len(tokens) // ranks
    load = tokens.reshape(ranks, -1).sum(axis=1)
    slack = (target - load).tolist()
    free = [slots] * ranks
    exports: list[Export] = []
    for giver in np.argsort(-load, kind="stable").tolist():
        need = int(load[giver]) - target
        if need <= 0:
            break
        mine = np.arange(giver * experts_per_rank, (giver + 1) * experts_per_rank)
        for place in mine[np.argsort(-tokens[mine], kind="stable")].tolist():
            left = int(tokens[place]) - 1  # one token stays at home
            holders: set[int] = set()
            while need > 0:
                receivers = [r for r in range(ranks) if free[r] and slack[r] > 0 and r not in holders]
                if not receivers:
                    break
                rank = max(receivers, key=lambda r: (slack[r], -r))
                moved = min(need, slack[rank], left)
                if moved < min_tokens:
                    break
                exports.append((place, rank, moved))
                holders.add(rank)
                slack[rank] -= moved
                free[rank] -= 1
                left -= moved
                need -= moved
        if need > 0:
            return None
    return exports
