"""Memory that every rank of a node can address: symmetric memory over NVLink, or shared memory between processes.

The second kind is for CPUs: with it the kernels of :mod:`megatron_ultraep.kernels`, compiled for the host, run the same
exchange between processes that they run between GPUs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Region:
    """As many bytes on every rank.

    Attributes:
        local: uint8, this rank's.
        addresses: int64 ``[ranks]`` on the device: where each rank's bytes are for this process.
        keep: what keeps them there.
    """

    local: torch.Tensor
    addresses: torch.Tensor
    keep: Any


class SymmetricMemory:
    """Allocates regions. Every call is collective over the group, in one order, and waits for all ranks.

    Args:
        group: the ranks of one node.
        device: GPU of this rank, or the CPU.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def allocate(self, size: int) -> Region:
        """Zeros.

        Args:
            size: bytes, the same on every rank.

        Raises:
            RuntimeError: ranks that cannot address each other's memory.
        """
        region = self._on_gpu(size) if self.device.type == "cuda" else self._on_cpu(size)
        # Nobody writes to a region that its owner has not zeroed yet.
        dist.barrier(group=self.group)
        return region

    def _on_gpu(self, size: int) -> Region:
        import torch.distributed._symmetric_memory as symmetric_memory

        # Nothing here uses multicast, whose objects are few on a host.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        local = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        handle = symmetric_memory.rendezvous(local, self.group)
        local.zero_()
        torch.cuda.synchronize(self.device)
        addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=self.device)
        return Region(local, addresses, handle)

    def _on_cpu(self, size: int) -> Region:
        directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        descriptor, path = tempfile.mkstemp(prefix="ultraep-", dir=directory)
        os.ftruncate(descriptor, max(size, 1))
        os.close(descriptor)
        paths: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(paths, path, group=self.group)
            maps = [_mapped(Path(each), max(size, 1)) for each in paths]
            dist.barrier(group=self.group)
        finally:
            os.unlink(path)  # the memory lives as long as somebody has mapped it
        views = [torch.frombuffer(each, dtype=torch.uint8) for each in maps]
        return Region(views[self.rank][:size], torch.tensor([view.data_ptr() for view in views]), views)


def _mapped(path: Path, size: int) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size)


class AddressTable:
    """Addresses of tensors, on their device; sent there again only when one has changed."""

    def __init__(self) -> None:
        self._known: tuple[int, ...] = ()
        self._table: torch.Tensor | None = None

    def of(self, tensors: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
        """int64 ``[tensors]``; 0 for None.

        Raises:
            ValueError: a tensor that is not contiguous.
        """
        addresses = tuple([0 if t is None else t.data_ptr() for t in tensors])
        if self._table is None or addresses != self._known:
            if any(t is not None and not t.is_contiguous() for t in tensors):
                raise ValueError("expected contiguous tensors: kernels copy them as they lie in memory")
            table = torch.tensor(addresses, dtype=torch.int64)
            if device.type == "cuda":
                table = table.pin_memory().to(device, non_blocking=True)
            self._known, self._table = addresses, table
        return self._table
