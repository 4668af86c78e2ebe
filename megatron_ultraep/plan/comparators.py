"""Other ways to balance the same loads, with one return type, so that a benchmark can set them side by side.

All take exact loads (int64 ``[G, E]``) and an :class:`ExpertLayout`, and use at most its slots. They say how many
tokens each rank computes, not how tokens are rerouted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import eplb as eplb_algorithm
from megatron_ultraep.plan import ultraep as ultraep_rule
from megatron_ultraep.plan.quota import check_shape
from megatron_ultraep.plan.types import Array, Plan, imbalance


@dataclass(frozen=True, eq=False)
class Balance:
    """What a method made of the loads.

    Attributes:
        tokens: int64 ``[G]``: tokens that each rank computes.
        replicas: replicas made, over all ranks.
        min_replica_tokens: tokens of the smallest of them, 0 where there is none.
    """

    tokens: Array
    replicas: int
    min_replica_tokens: int

    @property
    def imbalance(self) -> float:
        """max / mean over ranks of tokens computed."""
        return imbalance(self.tokens)


def of_plan(plan: Plan) -> Balance:
    """The balance of one of our plans."""
    slots = plan.physical_tokens.reshape(plan.layout.ranks, -1)[:, plan.layout.experts_per_rank :]
    filled = slots[plan.replica_expert >= 0]
    return Balance(plan.after, len(filled), int(filled.min(initial=0) if not len(filled) else filled.min()))


def bound(loads: Array, layout: ExpertLayout) -> int:
    """Tokens of the busiest rank, below which no method goes that keeps tokens inside the home's node."""
    by_node = _home_tokens(loads, layout).reshape(layout.ranks // layout.node_size, -1).sum(axis=1)
    return -(-int(by_node.max()) // layout.node_size)


def none(loads: Array, layout: ExpertLayout) -> Balance:
    """No replicas."""
    return Balance(_home_tokens(loads, layout).reshape(layout.ranks, -1).sum(axis=1), 0, 0)


def ultraep(loads: Array, layout: ExpertLayout, min_tokens: int = 1024) -> Balance:
    """UltraEP's rule (:mod:`megatron_ultraep.plan.ultraep`), node by node."""
    home_tokens = _home_tokens(loads, layout).reshape(layout.ranks // layout.node_size, -1)
    after = none(loads, layout).tokens
    moved = []
    for node, tokens in enumerate(home_tokens):
        first = node * layout.node_size
        for place, rank, count in ultraep_rule.plan_node(tokens, layout.node_size, layout.slots, min_tokens):
            after[first + place // layout.experts_per_rank] -= count
            after[first + rank] += count
            moved.append(count)
    return Balance(after, len(moved), min(moved, default=0))


def eplb(loads: Array, layout: ExpertLayout) -> Balance:
    """EPLB given the exact loads as its forecast, filling all slots, experts free to move to any node and rank.

    Copies share an expert's tokens evenly. Every expert is a group of its own, which leaves EPLB the most freedom.
    """
    totals = _totals(loads, layout)
    physical, copies = eplb_algorithm.rebalance_experts(
        totals,
        layout.experts + layout.ranks * layout.slots,
        layout.experts,
        layout.ranks // layout.node_size,
        layout.ranks,
    )
    tokens = np.zeros(len(physical[0]), dtype=np.int64)
    for expert in range(layout.experts):
        places = np.nonzero(physical[0] == expert)[0]
        tokens[places] = totals[expert] // len(places)
        tokens[places[: totals[expert] % len(places)]] += 1
    copied = copies[0][physical[0]] > 1
    smallest = int(tokens[copied].min()) if copied.any() else 0
    return Balance(tokens.reshape(layout.ranks, -1).sum(axis=1), layout.ranks * layout.slots, smallest)


def lplb(loads: Array, layout: ExpertLayout) -> Balance:
    """A linear program over a fixed graph of replicas, as LPLB does; needs scipy.

    Slot s of a rank holds an expert of the rank ``2**s`` further in its node (a ring of growing steps): the hottest of
    that rank, given the exact loads, so that the graph suits them. The program splits each expert's tokens between its
    copies so that the busiest rank has the fewest; fractions are rounded down.
    """
    from scipy import optimize

    home_tokens = _home_tokens(loads, layout).reshape(layout.ranks, -1)
    load = home_tokens.sum(axis=1)
    edges = _fixed_graph(layout)
    if not edges:
        return Balance(load, 0, 0)
    giver, receiver = np.array(edges).T
    column = np.arange(len(edges))
    peak_rows = np.zeros((layout.ranks, len(edges) + 1))  # load - given + received - peak <= 0
    np.add.at(peak_rows, (giver, column), -1)
    np.add.at(peak_rows, (receiver, column), 1)
    peak_rows[:, -1] = -1
    given_rows = np.zeros((layout.ranks, len(edges) + 1))  # given <= tokens of the expert
    np.add.at(given_rows, (giver, column), 1)
    objective = np.zeros(len(edges) + 1)
    objective[-1] = 1
    result = optimize.linprog(
        objective,
        A_ub=np.concatenate([peak_rows, given_rows]),
        b_ub=np.concatenate([-load, home_tokens.max(axis=1)]),
        method="highs",
    )
    if result.status != 0:
        raise RuntimeError(f"expected an optimum of the linear program, HiGHS says: {result.message}")
    moved = np.floor(result.x[:-1] + 1e-6).astype(np.int64)
    np.add.at(load, giver, -moved)
    np.add.at(load, receiver, moved)
    return Balance(load, len(edges), int(moved.min()))


def _fixed_graph(layout: ExpertLayout) -> list[tuple[int, int]]:
    """Home rank and rank of the replica, for every slot that the graph fills."""
    edges = set()
    for rank in range(layout.ranks):
        first = rank // layout.node_size * layout.node_size
        for slot in range(layout.slots):
            home = first + (rank - first + 2**slot) % layout.node_size
            if home != rank:
                edges.add((home, rank))
    return sorted(edges)


def reordered(loads: Array, layout: ExpertLayout) -> ExpertLayout:
    """The layout after experts changed their homes: hottest first, to the node, then the rank, with the fewest tokens.

    Graham's LPT rule with room for equally many experts everywhere, ties to the lower id. Routes must be known
    beforehand, and weights and optimizer states must move: it is no competitor inside a micro-batch.
    """
    totals = _totals(loads, layout)
    nodes = layout.ranks // layout.node_size
    node_of = _longest_first(totals, nodes)
    home_slot = np.empty(layout.experts, dtype=np.int64)
    for node in range(nodes):
        experts = np.nonzero(node_of == node)[0]
        rank_of = _longest_first(totals[experts], layout.node_size)
        for rank in range(layout.node_size):
            homes = experts[rank_of == rank]
            first = (node * layout.node_size + rank) * layout.experts_per_rank
            home_slot[homes] = first + np.arange(len(homes))
    return ExpertLayout(layout.experts, layout.ranks, tuple(home_slot.tolist()), layout.node_size, layout.slots)


def _longest_first(tokens: Array, bins: int) -> Array:
    """int64: the bin of each item, equally many items in all."""
    room = np.full(bins, len(tokens) // bins)
    filled = np.zeros(bins, dtype=np.int64)
    chosen = np.empty(len(tokens), dtype=np.int64)
    for item in np.argsort(-tokens, kind="stable").tolist():
        target = int(np.argmin(np.where(room > 0, filled, np.iinfo(np.int64).max)))
        chosen[item] = target
        room[target] -= 1
        filled[target] += tokens[item]
    return chosen


def _totals(loads: Array, layout: ExpertLayout) -> Array:
    check_shape(loads, layout)
    totals: Array = loads.sum(axis=0)
    return totals


def _home_tokens(loads: Array, layout: ExpertLayout) -> Array:
    """int64 ``[E]``: tokens of the expert in each home slot."""
    tokens: Array = _totals(loads, layout)[np.asarray(layout.expert_at)]
    return tokens
