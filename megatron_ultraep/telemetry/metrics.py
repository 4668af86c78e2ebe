"""Metrics of balancing, from plans: pure functions, and their accumulator over a step.

With ``G`` ranks, tokens of rank r before balancing ``b_r`` and after it ``a_r``, tokens of expert e ``t_e``::

    imbalance_before = max(b) / mean(b)      imbalance_after = max(a) / mean(a)      (1.0 is ideal, or an empty layer)
    max_vio          = max(t) / mean(t) - 1                                          (0.0 is ideal; Wang et al. 2024)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt

from megatron_ultraep.plan.types import Outcome, Plan, imbalance

IntArray = npt.NDArray[np.int64]

REASONS: tuple[str, ...] = tuple(name for name in get_args(Outcome) if name != "balanced")

METRICS = {
    "moe/max_vio": "max / mean - 1 of tokens per expert over the step, mean over layers; 0 is ideal.",
    "moe/max_vio/layer_<layer>": "The same of one layer.",
    "moe/imbalance_before/mean": "max / mean of tokens per rank without replicas, mean over layers and micro-batches.",
    "moe/imbalance_before/max": "The largest of these.",
    "moe/imbalance_after/mean": "max / mean of tokens per rank as computed, mean over layers and micro-batches.",
    "moe/imbalance_after/max": "The largest of these.",
    "moe/replicas/mean": "Replicas of one micro-batch of one layer, mean.",
    "moe/replicas/max": "The largest of these.",
    "moe/skipped/<reason>": "Share of (micro-batch, layer, node) left unbalanced for this reason, 0 to 1: "
    + ", ".join(REASONS)
    + ".",
}


def rank_tokens(plan: Plan) -> tuple[IntArray, IntArray, IntArray]:
    """Tokens of each rank before ``[G]`` and after ``[G]``, and of each logical expert ``[E]``; all int64.

    The plan's cached properties give the same, at several times the cost.
    """
    layout = plan.layout
    per_rank = layout.experts_per_rank
    physical = plan.quota.sum(axis=0).reshape(layout.ranks, per_rank + layout.slots)
    at_home = physical[:, :per_rank].reshape(-1).copy()
    after = physical.sum(axis=1)
    home_slot = np.asarray(layout.home_slot)
    filled = plan.replica_expert >= 0
    np.add.at(at_home, home_slot[plan.replica_expert[filled]], physical[:, per_rank:][filled])
    return at_home.reshape(layout.ranks, per_rank).sum(axis=1), after, at_home[home_slot]


def max_vio(expert_tokens: npt.ArrayLike) -> float:
    """max / mean - 1 over experts ``[E]``; 0.0 is ideal, and what no tokens have."""
    return imbalance(expert_tokens) - 1.0


class StepMetrics:
    """Adds up the plans of a step. Give it each (micro-batch, layer) once, not again in recomputation.

    Ranks of one expert-parallel group have the same plans, so nothing needs to be reduced over them. Over pipeline
    stages and groups: ``.../max`` by the largest, the others by the mean.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._tokens: dict[int, IntArray] = {}
        self._before: list[float] = []
        self._after: list[float] = []
        self._replicas: list[int] = []
        self._outcomes: dict[str, int] = {}

    def add(self, layer: int, plan: Plan) -> None:
        """Count one micro-batch of one layer (tens of microseconds)."""
        before, after, tokens = rank_tokens(plan)
        ranks, total = len(before), int(before.sum())
        self._before.append(int(before.max()) * ranks / total if total else 1.0)
        self._after.append(int(after.max()) * ranks / total if total else 1.0)
        self._replicas.append(int(np.count_nonzero(plan.replica_expert >= 0)))
        for decision in plan.decisions:
            self._outcomes[decision.outcome] = self._outcomes.get(decision.outcome, 0) + 1
        if layer in self._tokens:
            self._tokens[layer] += tokens
        else:
            self._tokens[layer] = tokens

    def finish(self) -> dict[str, float]:
        """Metrics of what was added, named as in ``METRICS``; empty when nothing was. Starts the next step."""
        if not self._before:
            return {}
        by_layer = {layer: max_vio(tokens) for layer, tokens in sorted(self._tokens.items())}
        out = {"moe/max_vio": float(np.mean(list(by_layer.values())))}
        out |= {f"moe/max_vio/layer_{layer}": value for layer, value in by_layer.items()}
        for name, values in (
            ("imbalance_before", self._before),
            ("imbalance_after", self._after),
            ("replicas", self._replicas),
        ):
            out[f"moe/{name}/mean"] = float(np.mean(values))
            out[f"moe/{name}/max"] = float(np.max(values))
        decisions = sum(self._outcomes.values())
        for reason in REASONS:
            out[f"moe/skipped/{reason}"] = self._outcomes.get(reason, 0) / decisions if decisions else 0.0
        self._reset()
        return out


def merge_groups(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several expert-parallel groups or pipeline stages as one: ``.../max`` by the largest, others by mean.

    Args:
        parts: what :meth:`StepMetrics.finish` gave on one rank of each group.
    """
    names = sorted({name for part in parts for name in part})
    out = {}
    for name in names:
        values = [part[name] for part in parts if name in part]
        out[name] = float(max(values) if name.endswith("/max") else np.mean(values))
    return out
