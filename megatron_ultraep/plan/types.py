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

# Times are added and multiplied by tokens in int64; these limits (4 ms a token, a minute a replica) leave room.
_MOST_TOKEN_PS = 4 * 10**9
_MOST_REPLICA_PS = 60 * 10**12
_MOST_FIXED_PS = 60 * 10**12

Outcome = Literal["balanced", "within_tolerance", "gain_below_cost", "no_replica_possible", "empty"]


@dataclass(frozen=True)
class Costs:
    """Integer costs of the gate; the same on every rank (measured once, max-reduced).

    Attributes:
        token_ps: time one more token costs the busiest rank, forward and backward (ps).
        copy_ps_per_kib: time that moving 1 KiB from rank to rank inside a node holds computing up (ps).
        replica_bytes: bytes that one replica moves: weights in forward, weights again in backward, gradients home.
        fixed_ps: time that a layer pays once when it has any replica at all (launches, synchronisation; ps).

    Raises:
        ValueError: costs that are no integers, are negative, or are too large for 64-bit arithmetic.
    """

    token_ps: int
    copy_ps_per_kib: int
    replica_bytes: int
    fixed_ps: int = 0

    def __post_init__(self) -> None:
        for name in ("token_ps", "copy_ps_per_kib", "replica_bytes", "fixed_ps"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
                raise ValueError(f"Costs.{name} must be an integer >= 0, got {value!r}: round times to whole ps")
            object.__setattr__(self, name, int(value))
        for name, value, most in (
            ("token_ps", self.token_ps, _MOST_TOKEN_PS),
            ("replica_ps", self.replica_ps, _MOST_REPLICA_PS),
            ("fixed_ps", self.fixed_ps, _MOST_FIXED_PS),
        ):
            if value > most:
                raise ValueError(f"Costs.{name} must be at most {most} ps, got {value}: check the unit")

    @property
    def replica_ps(self) -> int:
        """Time that one replica of a rank holds computing up (ps), rounded up."""
        return -(-self.replica_bytes * self.copy_ps_per_kib // 1024)


@dataclass(frozen=True)
class PlanSettings:
    """How planners search.

    Attributes:
        min_tokens: fewest tokens of a replica, >= 1; holds for every replica of every plan.
        tolerance_ppm: how far above the mean of its node the busiest rank may stay (parts per million).
        costs: the gate; None balances always.

    Raises:
        ValueError: when a field is out of range.
    """

    min_tokens: int = 1024
    tolerance_ppm: int = 10_000
    costs: Costs | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens < 2**31:
            raise ValueError(f"min_tokens must be 1 to 2**31 - 1 tokens, got {self.min_tokens}")
        if not 0 <= self.tolerance_ppm <= 1_000_000:
            raise ValueError(f"tolerance_ppm must be 0 to 1000000 parts per million, got {self.tolerance_ppm}")


@dataclass(frozen=True)
class NodeDecision:
    """What was decided for one node, and why.

    Attributes:
        outcome: ``balanced``: replicas were made. ``within_tolerance``: nothing to do. ``gain_below_cost``: the gate
            kept it unbalanced. ``no_replica_possible``: no slot, or no replica of the floor that would help.
            ``empty``: no tokens.
        before, after: tokens of the busiest rank of the node.
        bound: ``ceil(tokens of the node / ranks of the node)``, below which no plan can go.
        saved_ps, cost_ps: time saved and time paid as the gate saw them, of the best replicas it could have had
            (0 without costs).
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
        experts: Array = np.concatenate([homes, self.replica_expert], axis=1).ravel()
        return experts

    @cached_property
    def copies(self) -> Array:
        """int64 ``[E, C]``: physical ids of each expert's copies, home first, then by rank; padded with -1."""
        layout = self.layout
        width = layout.experts_per_rank + layout.slots
        home_slot = np.asarray(layout.home_slot, dtype=np.int64)
        home = home_slot // layout.experts_per_rank * width + home_slot % layout.experts_per_rank
        rank, slot = np.nonzero(self.replica_expert >= 0)
        expert = self.replica_expert[rank, slot]
        order = np.argsort(expert, kind="stable")  # by expert; ranks ascend already
        expert, physical = expert[order], (rank * width + layout.experts_per_rank + slot)[order]
        column: Array = np.arange(len(expert)) - np.searchsorted(expert, expert) + 1
        out: Array = np.full((layout.experts, 1 + int(column.max(initial=0))), -1, dtype=np.int64)
        out[:, 0] = home
        out[expert, column] = physical
        return out

    def until(self, source: int) -> Array:
        """int64 ``[E, C]``: sums of a source rank's quotas over :attr:`copies`, by which it reroutes.

        Token ordinal ``i`` of the source's tokens of expert ``e`` goes to the first copy ``c`` with
        ``i < until[e, c]``; the last column is the source's load of the expert.
        """
        quota = np.where(self.copies >= 0, self.quota[source][self.copies], 0)
        sums: Array = np.cumsum(quota, axis=1)
        return sums

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
        tokens: Array = self.quota.sum(axis=0)
        return tokens

    @cached_property
    def before(self) -> Array:
        """int64 ``[G]``: tokens that each rank would compute without replicas."""
        total = self.loads.sum(axis=0)
        tokens: Array = total[np.asarray(self.layout.expert_at)].reshape(self.layout.ranks, -1).sum(axis=1)
        return tokens

    @cached_property
    def after(self) -> Array:
        """int64 ``[G]``: tokens that each rank computes."""
        tokens: Array = self.physical_tokens.reshape(self.layout.ranks, -1).sum(axis=1)
        return tokens

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


def stride(count: Array) -> Array:
    """By how much the ordinals of an expert's tokens are multiplied, so that neighbours spread over copies.

    For each count of tokens the least integer from ``floor(0.618 * count)`` on that is coprime to it.
    """
    found: Array = np.maximum(1, count * 618 // 1000)
    safe = np.maximum(1, count)
    while True:
        shared = np.gcd(found, safe) != 1
        if not shared.any():
            return found
        found = found + shared
