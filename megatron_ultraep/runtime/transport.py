"""How loads, replica weights and replica gradients travel between the ranks of one expert-parallel group.

Every transport has its own process group and is called by all ranks of it, in the same order, with the same moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ultraep.plan.types import Plan
from megatron_ultraep.runtime.slots import Buffers


@dataclass(frozen=True)
class Move:
    """One replica: from its home to a slot, and its gradient back.

    Attributes:
        expert: logical expert.
        home, place: rank that owns it, and its index among that rank's experts.
        rank, slot: where the replica lives.
    """

    expert: int
    home: int
    place: int
    rank: int
    slot: int


def moves_of(plan: Plan) -> tuple[Move, ...]:
    """The moves of a plan, by expert, then rank: the order in which gradients are summed."""
    layout = plan.layout
    return tuple(
        Move(expert, layout.home_rank(expert), layout.home_slot[expert] % layout.experts_per_rank, rank, slot)
        for expert, rank, slot in plan.replicas
    )


Parameters = Sequence[torch.Tensor]


class Transport(Protocol):
    """What a balanced layer needs; ranks are those of the expert-parallel group."""

    rank: int
    size: int

    def gather_loads(self, loads: torch.Tensor) -> torch.Tensor:
        """From each rank's int64 ``[experts]`` to int64 ``[ranks, experts]``, the same everywhere."""
        ...

    def place(self, moves: Sequence[Move], home: Callable[[int], Parameters], slots: Buffers) -> None:
        """Copy weights into slots. ``home(place)`` gives the parameters of this rank's expert.

        When it returns, work that is queued afterwards on the current stream finds the weights in ``slots``.
        """
        ...

    def send_home(
        self, moves: Sequence[Move], slots: Buffers, staging: Buffers, add: Callable[[int, Parameters], None]
    ) -> None:
        """Send gradients home. ``add(place, gradients)`` is called on home ranks in the order of ``moves``."""
        ...

    def close(self) -> None:
        """Give the process group back."""
        ...


class CollectiveTransport:
    """Point-to-point operations of ``torch.distributed``, batched: gloo on CPUs, NCCL on GPUs. Nothing is staged on
    the sending side, so a hot expert with many replicas takes no extra memory on its home.

    Args:
        group: of this transport alone; its time-out bounds every wait.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank(group)
        self.size = len(self._ranks)

    def gather_loads(self, loads: torch.Tensor) -> torch.Tensor:
        out = loads.new_empty(self.size, loads.shape[0])
        dist.all_gather_into_tensor(out.view(-1), loads.contiguous(), group=self._group)
        return out

    def place(self, moves: Sequence[Move], home: Callable[[int], Parameters], slots: Buffers) -> None:
        sends, receives = [], []
        for move in moves:
            if move.home == self.rank:
                sends += [(tensor, move.rank) for tensor in home(move.place)]
            if move.rank == self.rank:
                receives += [(tensor, move.home) for tensor in slots[move.slot]]
        self._exchange(sends, receives)

    def send_home(
        self, moves: Sequence[Move], slots: Buffers, staging: Buffers, add: Callable[[int, Parameters], None]
    ) -> None:
        for wave in _waves(moves, len(staging)):
            sends, receives = [], []
            arrived: list[tuple[int, Parameters]] = []
            for move in wave:
                if move.rank == self.rank:
                    sends += [(tensor, move.home) for tensor in slots[move.slot]]
                if move.home == self.rank:
                    buffer = staging[len(arrived)]
                    arrived.append((move.place, buffer))
                    receives += [(tensor, move.rank) for tensor in buffer]
            self._exchange(sends, receives)
            for place, gradients in arrived:
                add(place, gradients)

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def _exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]
    ) -> None:
        operations = [dist.P2POp(dist.isend, t.detach(), self._ranks[peer], self._group) for t, peer in sends]
        operations += [dist.P2POp(dist.irecv, t, self._ranks[peer], self._group) for t, peer in receives]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def _waves(moves: Sequence[Move], width: int) -> list[list[Move]]:
    """Moves in order, so that in one wave no home receives more than ``width`` gradients."""
    received: dict[int, int] = {}
    waves: list[list[Move]] = []
    for move in moves:
        wave = received.get(move.home, 0) // width
        received[move.home] = received.get(move.home, 0) + 1
        while len(waves) <= wave:
            waves.append([])
        waves[wave].append(move)
    return waves
