"""Which transport a job gets: decided once, from what all ranks tell, so that all decide alike."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ultraep.kernels.build import BuildError, library_of
from megatron_ultraep.runtime.symmetric import SymmetricTransport
from megatron_ultraep.runtime.transport import CollectiveTransport, Transport


@dataclass(frozen=True)
class Means:
    """What one rank can do.

    Attributes:
        host: its name.
        obstacle: why it cannot have symmetric memory; empty if it can, or if nobody asked.
    """

    host: str
    obstacle: str


def device_of_rank() -> torch.device:
    """Where this rank's experts are: its GPU under a backend for GPUs, else the CPU."""
    if torch.cuda.is_available() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def means(transport: str) -> Means:
    """What this rank can do towards the transport that was asked for.

    Args:
        transport: ``auto``, ``collective`` or ``symmetric``; only where symmetric memory may be used are kernels
            compiled.
    """
    device = device_of_rank()
    obstacle = ""
    if transport == "symmetric" or (transport == "auto" and device.type == "cuda"):
        try:
            library_of(device)
        except BuildError as error:
            obstacle = str(error)
    elif transport == "auto":
        obstacle = "ranks are on CPUs"
    return Means(socket.gethostname(), obstacle)


def why_not_symmetric(groups: Sequence[Sequence[int]], node_size: int, told: Sequence[Means]) -> str:
    """Why symmetric memory cannot be used; empty if it can. The same on every rank.

    Args:
        groups: global ranks of every expert-parallel group.
        node_size: ranks of a node; 0: the whole group is one.
        told: what each rank of the world can do.
    """
    for rank, each in enumerate(told):
        if each.obstacle:
            return f"rank {rank}: {each.obstacle}"
    for group in groups:
        for node in _nodes(group, node_size):
            hosts = sorted({told[rank].host for rank in node})
            if len(hosts) > 1:
                return (
                    f"ranks {list(node)} are to be one node, but are on several hosts ({', '.join(hosts)}): set "
                    "node_size to the number of GPUs of a host"
                )
    return ""


def make_transport(
    groups: Sequence[tuple[int, ...]], mine: tuple[int, ...], node_size: int, *, symmetric: bool, timeout_s: float
) -> Transport | None:
    """The transport of this rank. Collective over the world, since every rank creates every group.

    Args:
        groups: global ranks of every expert-parallel group, in one order.
        mine: this rank's; empty for none.
        node_size: ranks of a node; 0: the whole group is one.
        symmetric: whether ranks of a node address each other's memory.
        timeout_s: limit of every wait (s).
    """
    transport: Transport | None = None
    limit = timedelta(seconds=timeout_s)
    for group in groups:
        if not symmetric:
            made = dist.new_group(list(group), timeout=limit)
            if group == mine:
                transport = CollectiveTransport(made)
            continue
        # Between hosts, for set-up: an NCCL communicator would take hundreds of MiB of each device.
        control = dist.new_group(list(group), timeout=limit, backend="gloo")
        nodes = _nodes(group, node_size)
        groups_of_nodes = [dist.new_group(list(node), timeout=limit, backend="gloo") for node in nodes]
        loads = dist.new_group(list(group), timeout=limit) if len(nodes) > 1 else None
        if group == mine:
            node = groups_of_nodes[next(i for i, each in enumerate(nodes) if dist.get_rank() in each)]
            transport = SymmetricTransport(control, node, loads, device_of_rank(), timeout_s)
    return transport


def _nodes(group: Sequence[int], node_size: int) -> list[tuple[int, ...]]:
    size = node_size or len(group)
    return [tuple(group[i : i + size]) for i in range(0, len(group), size)]
