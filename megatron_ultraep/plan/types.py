"""What planners take and give: costs, settings, and the plan of one micro-batch of one layer.

Legend: ``G`` expert-parallel ranks, ``E`` logical experts, ``L = E / G`` homes on a rank, ``R`` slots on a rank,
``P = G * (L + R)`` physical experts. Physical id = ``rank * (L + R) + place``; places ``0..L-1`` are homes in the order
of ``ExpertLayout.experts_of(rank)``, places ``L..L+R-1`` are slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import ExpertLayout

Array = npt.NDArray[np.int64]
Outcome = Literal["balanced", "within_tolerance", "gain_below_cost", "no_replica_possible", "empty"]


@dataclass(frozen=True)
class Costs:
    """Integer costs of the gate; the same on every rank (measured once, max-reduced).

    Attributes:
        token_ps: time one more token costs the busiest rank, forward and backward (ps).
        copy_ps_per_kib: time to move 1 KiB from rank to rank inside a node (ps).
        replica_bytes: bytes that one replica moves: weights in forward, weights again in backward, gradients home.
        fixed_ps: time that a layer pays once when it has any replica at all (launches, synchronisation; ps).
    """

    token_ps: int
    copy_ps_per_kib: int
    replica_bytes: int
    fixed_ps: int = 0

    @property
    def replica_ps(self) -> int:
        """Time that a rank's link is busy for one replica (ps), rounded up."""
        return -(-self.replica_bytes * self.copy_ps_per_kib // 1024)


@dataclass(frozen=True)
class PlanSettings:
    """How planners search.

    Attributes:
        min_tokens: fewest tokens of a replica, >= 1; holds for every replica of every plan.
        tolerance_ppm: how far above the mean of its node the busiest rank may stay (parts per million).
        costs: the gate; None balances always.
    """

    min_tokens: int = 1024
    tolerance_ppm: int = 10_000
    costs: Costs | None = None


@dataclass(frozen=True)
class NodeDecision:
    """What was decided for one node, and why.

    Attributes:
        outcome: ``balanced``: replicas were made. ``within_tolerance``: nothing to do. ``gain_below_cost``: the gate
            kept it unbalanced. ``no_replica_possible``: no slot, or no replica would reach the floor. ``empty``: no tokens.
        before, after: tokens of the busiest rank of the node.
        bound: ``ceil(tokens of the node / ranks of the node)``, below which no plan can go.
        saved_ps, cost_ps: time saved and time paid as the gate saw them (0 without costs).
    """

    outcome: Outcome
    before: int
    after: int
    bound: int
    saved_ps: int = 0
    cost_ps: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """Which replicas exist and how many tokens each physical expert takes from each source rank. Immutable.

    Attributes:
        layout: homes, nodes and slots that the plan was made for.
        replica_expert: int64 ``[G, R]``: the logical expert in each slot, -1 for an empty one.
        quota: int64 ``[G, P]``: tokens that each source rank sends to each physical expert.
        decisions: one per node.
    """

    layout: ExpertLayout
    replica_expert: Array
    quota: Array
    decisions: tuple[NodeDecision, ...]

    def __post_init__(self) -> None:
        self.replica_expert.setflags(write=False)
        self.quota.setflags(write=False)

    @cached_property
    def expert_of(self) -> Array:
        """int64 ``[P]``: the logical expert of each physical one, -1 for an empty slot."""
        layout = self.layout
        homes = np.asarray(layout.expert_at, dtype=np.int64).reshape(layout.ranks, layout.experts_per_rank)
        return np.concatenate([homes, self.replica_expert], axis=1).ravel()

    @cached_property
    def copies(self) -> Array:
        """int64 ``[E, C]``: physical ids of each expert's copies, home first, then by rank; padded with -1."""
        layout = self.layout
        width = layout.experts_per_rank + layout.slots
        found: list[list[int]] = [[] for _ in range(layout.experts)]
        for expert in range(layout.experts):
            place = layout.home_slot[expert] % layout.experts_per_rank
            found[expert].append(layout.home_rank(expert) * width + place)
        for rank, slot in zip(*np.nonzero(self.replica_expert >= 0), strict=True):
            physical = int(rank) * width + layout.experts_per_rank + int(slot)
            found[int(self.replica_expert[rank, slot])].append(physical)
        out = np.full((layout.experts, max(map(len, found))), -1, dtype=np.int64)
        for expert, ids in enumerate(found):
            out[expert, : len(ids)] = ids
        return out

    def until(self, source: int) -> Array:
        """int64 ``[E, C]``: sums of a source rank's quotas over :attr:`copies`, by which it reroutes.

        Token ordinal ``i`` of the source's tokens of expert ``e`` goes to the first copy ``c`` with
        ``i < until[e, c]``; the last column is the source's load of the expert.
        """
        quota = np.where(self.copies >= 0, self.quota[source][self.copies], 0)
        return np.cumsum(quota, axis=1)

    @cached_property
    def loads(self) -> Array:
        """int64 ``[G, E]``: the loads that the plan was made from."""
        filled = np.nonzero(self.expert_of >= 0)[0]
        out = np.zeros((self.layout.ranks, self.layout.experts), dtype=np.int64)
        np.add.at(out.T, self.expert_of[filled], self.quota[:, filled].T)
        return out

    @cached_property
    def physical_tokens(self) -> Array:
        """int64 ``[P]``: tokens that each physical expert computes."""
        return self.quota.sum(axis=0)

    @cached_property
    def before(self) -> Array:
        """int64 ``[G]``: tokens that each rank would compute without replicas."""
        total = self.loads.sum(axis=0)
        return total[np.asarray(self.layout.expert_at)].reshape(self.layout.ranks, -1).sum(axis=1)

    @cached_property
    def after(self) -> Array:
        """int64 ``[G]``: tokens that each rank computes."""
        return self.physical_tokens.reshape(self.layout.ranks, -1).sum(axis=1)

    @cached_property
    def replicas(self) -> tuple[tuple[int, int, int], ...]:
        """``(expert, rank, slot)`` of every replica, ordered by expert, then rank."""
        found = [
            (int(self.replica_expert[r, s]), int(r), int(s))
            for r, s in zip(*np.nonzero(self.replica_expert >= 0), strict=True)
        ]
        return tuple(sorted(found))

    def same_bits(self, other: Plan) -> bool:
        """Whether two plans are equal in every bit."""
        return (
            self.layout == other.layout
            and np.array_equal(self.replica_expert, other.replica_expert)
            and np.array_equal(self.quota, other.quota)
            and self.decisions == other.decisions
        )


def imbalance(tokens: npt.ArrayLike) -> float:
    """max / mean over ranks of tokens computed; 1.0 is ideal, and what an empty micro-batch has."""
    values = np.asarray(tokens, dtype=np.float64)
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0
