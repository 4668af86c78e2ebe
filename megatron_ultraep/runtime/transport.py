"""How loads, replica weights and replica gradients travel between the ranks of one expert-parallel group.

A transport is called by all ranks of its group in the same order, with the same plans. Weights and gradients travel in
two halves each, so that a transport that can work beside the computing stream has room to:

    place -> (reroute, permutation, dispatch) -> await_placed -> experts -> weights_sent
    before_gradients -> experts' backward -> send_home -> (router, attention backward) -> await_home
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ultraep.plan.types import Plan
from megatron_ultraep.runtime.planning import Planned
from megatron_ultraep.runtime.slots import ExpertShape, SlotPool


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


@dataclass
class Homes:
    """This rank's tensors, by place and parameter, that replicas are made of or added to.

    Attributes:
        tensors: ``[places][parameters of an expert]``.
        addresses: for transports that keep something about them from call to call.
    """

    tensors: Sequence[Parameters]
    addresses: dict[str, Any] = field(default_factory=dict)


class Transport(Protocol):
    """What a balanced layer needs; ranks are those of the expert-parallel group.

    "After it" below means: for work that is queued on the current stream after the call.
    """

    rank: int
    size: int
    overlaps: bool
    """Weights and gradients travel beside the computing stream."""

    def make_pool(self, shape: ExpertShape, slots: int) -> SlotPool:
        """Slots that this transport can reach. Collective."""
        ...

    def gather_loads(self, loads: torch.Tensor, pool: SlotPool) -> torch.Tensor:
        """From each rank's int64 ``[experts]`` to int64 ``[ranks, experts]``, the same everywhere.

        The next call that concerns the pool must be :meth:`place`.
        """
        ...

    def largest(self, values: torch.Tensor) -> list[int]:
        """Element-wise maximum over all ranks of int64 ``[n]``. The host waits for it."""
        ...

    def place(self, planned: Planned, pool: SlotPool, homes: Homes) -> None:
        """Begin to copy weights of homes into slots. What the slots held is not needed any more."""
        ...

    def await_placed(self, planned: Planned, pool: SlotPool) -> None:
        """After it, the weights of the last :meth:`place` are in this rank's slots."""
        ...

    def nothing_placed(self, pool: SlotPool) -> None:
        """The plan of the last :meth:`place` has no replica: neither :meth:`await_placed` nor the rest follows."""
        ...

    def weights_sent(self, pool: SlotPool) -> None:
        """After it, home weights of the last :meth:`place` may change."""
        ...

    def before_gradients(self, planned: Planned, pool: SlotPool, dtype: torch.dtype, *, accumulate: bool) -> None:
        """After it, gradient slots may be written; where ``accumulate``, filled ones hold zeros."""
        ...

    def send_home(
        self, planned: Planned, pool: SlotPool, homes: Homes, slots: Sequence[torch.Tensor | None] | None
    ) -> None:
        """Begin to add the gradients of replicas to ``homes``, in the order of their ranks.

        Args:
            planned: of this backward.
            pool: whose gradient slots are sent.
            homes: gradients of this rank's experts, changed in place; of one dtype.
            slots: gradients of the replicas on this rank, slot by slot, parameter by parameter, which are put into the
                gradient slots first; None: they are there already.
        """
        ...

    def await_home(self, pool: SlotPool) -> None:
        """After it, what :meth:`send_home` was given has its sums."""
        ...

    def check(self) -> None:
        """Raise what went wrong on the device, if anything did."""
        ...

    def close(self) -> None:
        """Give process groups and memory back."""
        ...


class CollectiveTransport:
    """Point-to-point operations of ``torch.distributed``, batched: gloo on CPUs, NCCL on GPUs.

    Every call is complete on the current stream when it returns: nothing overlaps. Nothing is staged on the sending
    side, so a hot expert with many replicas takes no extra memory on its home.

    Args:
        group: of this transport alone; its time-out bounds every wait.
    """

    overlaps = False

    def __init__(self, group: Any) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank(group)
        self.size = len(self._ranks)

    def make_pool(self, shape: ExpertShape, slots: int) -> SlotPool:
        return SlotPool(shape, slots, staging=slots)

    def gather_loads(self, loads: torch.Tensor, pool: SlotPool) -> torch.Tensor:
        return all_gather(loads, self._group)

    def largest(self, values: torch.Tensor) -> list[int]:
        return [int(v) for v in all_gather(values, self._group).amax(0).tolist()]

    def place(self, planned: Planned, pool: SlotPool, homes: Homes) -> None:
        sends, receives = [], []
        for move in moves_of(planned.plan):
            if move.home == self.rank:
                sends += [(tensor, move.rank) for tensor in homes.tensors[move.place]]
            if move.rank == self.rank:
                receives += [(tensor, move.home) for tensor in pool.weights[move.slot]]
        self._exchange(sends, receives)

    def await_placed(self, planned: Planned, pool: SlotPool) -> None:
        """Nothing to wait for."""

    def nothing_placed(self, pool: SlotPool) -> None:
        """Nothing to do."""

    def weights_sent(self, pool: SlotPool) -> None:
        """Nothing to wait for."""

    def before_gradients(self, planned: Planned, pool: SlotPool, dtype: torch.dtype, *, accumulate: bool) -> None:
        if accumulate:
            gradients = pool.gradients(dtype)
            for move in moves_of(planned.plan):
                if move.rank == self.rank:
                    torch._foreach_zero_(gradients[move.slot])

    def send_home(
        self, planned: Planned, pool: SlotPool, homes: Homes, slots: Sequence[torch.Tensor | None] | None
    ) -> None:
        moves = moves_of(planned.plan)
        if not moves:
            return
        dtype = homes.tensors[0][0].dtype
        gradients, staging = pool.gradients(dtype), pool.received(dtype)
        if slots is not None:
            width = len(pool.shape.names)
            for move in moves:
                if move.rank == self.rank:
                    for buffer, gradient in zip(gradients[move.slot], slots[move.slot * width :], strict=False):
                        buffer.zero_() if gradient is None else buffer.copy_(gradient)
        for wave in _waves(moves, len(staging)):
            sends, receives = [], []
            arrived: list[tuple[int, Parameters]] = []
            for move in wave:
                if move.rank == self.rank:
                    sends += [(tensor, move.home) for tensor in gradients[move.slot]]
                if move.home == self.rank:
                    buffers = staging[len(arrived)]
                    arrived.append((move.place, buffers))
                    receives += [(tensor, move.rank) for tensor in buffers]
            self._exchange(sends, receives)
            for place, received in arrived:
                for home, gradient in zip(homes.tensors[place], received, strict=True):
                    home.add_(gradient)

    def await_home(self, pool: SlotPool) -> None:
        """Nothing to wait for."""

    def check(self) -> None:
        """``torch.distributed`` raises by itself."""

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


def all_gather(values: torch.Tensor, group: Any) -> torch.Tensor:
    """From each rank's ``[n]`` to ``[ranks, n]``."""
    out = values.new_empty(dist.get_world_size(group), values.shape[0])
    dist.all_gather_into_tensor(out.view(-1), values.contiguous(), group=group)
    return out


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
