"""Exact loads in, the plan of one micro-batch of one layer out: quotas first, replicas as few as they take.

Each node is planned by itself: replicas never leave it. Targets and policies are tried in a fixed order
(:mod:`megatron_ultraep.plan.search`), and the best plan is kept:

- with a gate (``PlanSettings.costs``) the one of the shortest makespan, in integers::

      token_ps * tokens of the busiest rank
      + (fixed_ps + replica_ps * most replicas that one rank sends or receives, where there is a replica)

  and none at all where that is no longer than it is without replicas;
  and none either on a node that would wait for a busier node all the same;
- without a gate the one of the fewest replicas within the tolerance or, where none reaches it, the lowest found.

Invariants, whatever the loads:

1. Every token of (source rank, expert) goes to one copy of that expert: quotas conserve the loads exactly.
2. Every replica takes at least ``min_tokens`` tokens.
3. A replica lies in a slot of another rank of its home's node; no rank holds an expert twice.
4. No rank computes more tokens than the busiest rank of its node did without replicas.
5. The same arguments give the same bits, on any rank and any machine.

Source: the quota-driven planner of UltraEP, with a floor that always holds, a gate, and a search that needs fewer
replicas (docs/notes/planner.md).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import search
from megatron_ultraep.plan.types import Array, NodeDecision, Outcome, Plan, PlanSettings

OUTCOMES: dict[int, Outcome] = {
    search.BALANCED: "balanced",
    search.WITHIN_TOLERANCE: "within_tolerance",
    search.GAIN_BELOW_COST: "gain_below_cost",
    search.NO_REPLICA_POSSIBLE: "no_replica_possible",
    search.EMPTY: "empty",
}


def solve(loads: Array, layout: ExpertLayout, settings: PlanSettings | None = None) -> Plan:
    """The plan for exact loads.

    Args:
        loads: int64 ``[G, E]``: tokens that each source rank routes to each logical expert; kept unchanged.
        layout: homes, nodes and slots.
        settings: how to search; the defaults of :class:`PlanSettings` when None.

    Raises:
        ValueError: loads that are no int64 ``[G, E]`` array, are negative, or are too many for 64-bit arithmetic.
    """
    settings = settings or PlanSettings()
    check_shape(loads, layout)
    valid, replica_expert, quota, decisions = search.compiled()(
        np.ascontiguousarray(loads),
        expert_at_array(layout),
        layout.ranks,
        layout.node_size,
        layout.slots,
        settings.min_tokens,
        settings.tolerance_ppm,
        costs_array(settings),
    )
    if valid != search.VALID:
        raise ValueError(complaint(loads, valid))
    made = [NodeDecision(OUTCOMES[outcome], *numbers) for outcome, *numbers in decisions.tolist()]
    if settings.costs is not None:
        _spare_idle_nodes(loads, layout, replica_expert, quota, made)
    return Plan(layout, replica_expert, quota, tuple(made))


def _spare_idle_nodes(
    loads: Array, layout: ExpertLayout, replica_expert: Array, quota: Array, decisions: list[NodeDecision]
) -> None:
    """Take replicas back from nodes that would have waited for another node all the same; in place.

    The layer ends when the busiest rank of all nodes does. A node whose busiest rank has no more tokens without
    replicas than that one saves nothing by copying.
    """
    slowest = max(decision.after for decision in decisions)
    width = layout.experts_per_rank + layout.slots
    for node, decision in enumerate(decisions):
        if decision.outcome != "balanced" or decision.before > slowest:
            continue
        for rank in range(node * layout.node_size, (node + 1) * layout.node_size):
            replica_expert[rank] = -1
            quota[:, rank * width : (rank + 1) * width] = 0
            homes = list(layout.experts_of(rank))
            quota[:, rank * width : rank * width + len(homes)] = loads[:, homes]
        decisions[node] = NodeDecision("gain_below_cost", decision.before, decision.before, decision.bound)


def check_shape(loads: Array, layout: ExpertLayout) -> None:
    """Refuse what is no int64 ``[G, E]`` array."""
    if not isinstance(loads, np.ndarray):
        raise ValueError(f"expected loads as a numpy array, got {type(loads).__name__}: convert it on the CPU first")
    if loads.dtype != np.int64:
        raise ValueError(f"expected int64 loads, which are exact, got {loads.dtype}: convert with .astype(np.int64)")
    if loads.shape != (layout.ranks, layout.experts):
        raise ValueError(
            f"expected loads of shape [ranks, experts] = [{layout.ranks}, {layout.experts}], got {list(loads.shape)}: "
            "gather the loads of all expert-parallel ranks, in logical order, or pass the layout they were gathered for"
        )


def complaint(loads: Array, valid: int) -> str:
    """What is wrong with loads that the search found not valid."""
    if valid == search.NEGATIVE:
        source, expert = np.argwhere(loads < 0)[0]
        return (
            f"expected loads >= 0, got {loads[source, expert]} from source rank {source} for expert {expert}: "
            "count routed tokens"
        )
    return (
        f"expected at most {search.MOST_TOKENS} tokens over all ranks, got loads up to {loads.max()}: check that loads "
        "are tokens of one micro-batch of one layer"
    )


@lru_cache(maxsize=64)
def expert_at_array(layout: ExpertLayout) -> Array:
    """int64 ``[E]``: the logical expert in each home slot."""
    return np.asarray(layout.expert_at, dtype=np.int64)


def costs_array(settings: PlanSettings) -> Array:
    """int64 ``[4]``: the gate as the search takes it."""
    costs = settings.costs
    if costs is None:
        return np.zeros(4, dtype=np.int64)
    return np.array([1, costs.token_ps, costs.replica_ps, costs.fixed_ps], dtype=np.int64)
