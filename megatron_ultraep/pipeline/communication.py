"""Connections between neighbouring stages: one for every (model, direction, pair of ranks), made once.

On one connection everything travels one way and in order, so two ranks that send to each other at once never wait for
each other. With NCCL a connection is a group of two ranks, brought up by a first message when it is made; with gloo it
is a tag in one group.

Shapes are known ahead on both sides: nothing but tensors travels.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron.groups import new_group
from megatron_ultraep.pipeline.problem import PipelineModel

_created = itertools.count()
_NEVER_SENT = 2**20  # a tag


@dataclass(frozen=True)
class Connection:
    """One way from a rank to its neighbour, for one model and direction.

    Attributes:
        model: index in the problem.
        backward: direction.
        source, target: global ranks.
    """

    model: int
    backward: bool
    source: int
    target: int


@dataclass
class Transfer:
    """A send or a receive under way; holds its tensor until it is done.

    Attributes:
        peer: global rank at the other end.
    """

    work: Any
    tensor: torch.Tensor
    peer: int

    def wait(self, timeout_s: float) -> torch.Tensor:
        """On CPUs until it is done; on GPUs the current stream waits, not the host.

        Raises:
            RuntimeError: not done in time, or the peer is gone.
        """
        if self.tensor.is_cuda:
            self.work.wait()
        else:
            self.work.wait(timedelta(seconds=timeout_s))
        return self.tensor

    def is_done(self) -> bool:
        """Whether the tensor may be freed; gloo never says so before it is waited for."""
        return bool(self.work.is_completed())


def pipelines_of(nodes: Sequence[Sequence[int]], node_size: int) -> list[tuple[int, ...]]:
    """The pipelines of one model as global ranks by stage: for each replica, one for each place inside a node.

    Args:
        nodes: ``[replica][stage]``, node.
        node_size: consecutive ranks of a node.
    """
    return [tuple(node * node_size + i for node in replica) for replica in nodes for i in range(node_size)]


def _begun(work: Any) -> Any:
    """torch gives None to ranks outside a group; none of ours asks as one."""
    assert work is not None
    return work


class Links:
    """Connections of all models on this rank, and a group for agreeing; collective over the world.

    Args:
        placements: of each model, ``[replica][stage]``, node (``PipelineModel.nodes``).
        nodes: of the problem; each is ``world / nodes`` consecutive ranks.
        timeout_s: limit of every wait, in seconds.
        device: where tensors are, the current CUDA device by default where there is one; then connections are NCCL's.

    Raises:
        ValueError: ranks that the nodes do not divide.

    Attributes:
        control: group of all ranks, of gloo, for agreeing.
        name: the same on every rank, another one for every ``Links``.
    """

    def __init__(
        self,
        placements: Sequence[Sequence[Sequence[int]]],
        nodes: int,
        *,
        timeout_s: float = 600.0,
        device: torch.device | None = None,
    ) -> None:
        world = dist.get_world_size()
        if world % nodes:
            raise ValueError(f"expected {nodes} nodes to divide the {world} ranks: use as many ranks for each stage")
        self.rank = dist.get_rank()
        self.nodes = nodes
        self.node_size = world // nodes
        self.node = self.rank // self.node_size
        self.timeout_s = timeout_s
        if device is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device or torch.device("cpu")
        self.placements = tuple(tuple(tuple(replica) for replica in placement) for placement in placements)
        self.name = f"links{next(_created)}"
        self.control = new_group(range(world), timeout_s=timeout_s, backend="gloo")
        self.broken: str | None = None
        self._runs = itertools.count()
        self._groups: dict[Connection, Any] = {}
        self._common = None
        connections = list(self._connections())
        if self.device.type == "cuda":
            for connection in connections:
                # Twice the limit: NCCL ends the process when it is over, and our watchdog shall have said why before.
                self._groups[connection] = new_group(
                    sorted((connection.source, connection.target)), timeout_s=2 * timeout_s, backend="nccl"
                )
            self._bring_up(connections)
        else:
            self._common = new_group(range(world), timeout_s=timeout_s, backend="gloo")

    @classmethod
    def of_models(cls, models: Sequence[PipelineModel], nodes: int, **kwargs: Any) -> Links:
        return cls([model.nodes for model in models], nodes, **kwargs)

    def _connections(self) -> list[Connection]:
        """All of the world, in one order on every rank."""
        found = []
        for model, placement in enumerate(self.placements):
            for pipeline in pipelines_of(placement, self.node_size):
                for a, b in itertools.pairwise(pipeline):
                    found += [Connection(model, False, a, b), Connection(model, True, b, a)]
        return found

    def _bring_up(self, connections: Sequence[Connection]) -> None:
        """One message on each, in one order: NCCL connects at the first, which would otherwise wait inside a run."""
        for connection in connections:
            if self.rank in (connection.source, connection.target):
                token = torch.zeros(1, device=self.device)
                is_source = self.rank == connection.source
                peer = connection.target if is_source else connection.source
                start = dist.isend if is_source else dist.irecv
                _begun(start(token, peer, group=self._groups[connection])).wait()
                torch.cuda.synchronize(self.device)

    def next_run(self) -> int:
        """A number for each run, the same on every rank."""
        return next(self._runs)

    def peer(self, node: int) -> int:
        """The rank at this rank's place in another node."""
        return node * self.node_size + self.rank % self.node_size

    def send(self, tensor: torch.Tensor, model: int, backward: bool, node: int) -> Transfer:
        """Begin to send to the neighbour in ``node``; the tensor must stay as it is until the transfer is done."""
        peer = self.peer(node)
        group, tag = self._way(Connection(model, backward, self.rank, peer))
        return Transfer(dist.isend(tensor, peer, group=group, tag=tag), tensor, peer)

    def receive(self, into: torch.Tensor, model: int, backward: bool, node: int) -> Transfer:
        """Begin to receive from the neighbour in ``node``."""
        peer = self.peer(node)
        group, tag = self._way(Connection(model, backward, peer, self.rank))
        return Transfer(dist.irecv(into, peer, group=group, tag=tag), into, peer)

    def _way(self, connection: Connection) -> tuple[Any, int]:
        if self._common is not None:
            return self._common, 2 * connection.model + connection.backward
        return self._groups[connection], 0

    def drop(self, why: str) -> None:
        """After a failure: close the connections to neighbours, so that they need not wait for their time limit.

        Gloo closes one when a wait on it takes too long, and has no other way. NCCL's are aborted by the watchdog.
        These links can run nothing more.
        """
        self.broken = why
        if self._common is None:
            return
        mine = [c for c in self._connections() if self.rank in (c.source, c.target)]
        for peer in sorted({c.target if c.source == self.rank else c.source for c in mine}):
            with contextlib.suppress(RuntimeError):
                nothing = _begun(dist.irecv(torch.empty(1), peer, group=self._common, tag=_NEVER_SENT))
                nothing.wait(timedelta(milliseconds=1))
