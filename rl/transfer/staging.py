"""Memory between a trainer rank and the engine on the same device: a ring of buckets, and counters beside it.

    staging = Staging(nbytes, device, generation=3, rank=0)     # trainer rank
    handles = staging.handles()                                 # small, travels through Ray
    opened = handles.open(device)                               # engine's process, the same device, once
    staging.publish(0, source, index, offset)                   # what was written may be read
    opened.written, opened.entry(0); opened.take(1)             # what was read may be overwritten

Counters lie in one page of anonymous shared memory, which has no name that could be left behind: a file descriptor of
the trainer rank, which the engine opens through ``/proc``. A signal is one aligned store of eight bytes and is seen in
microseconds. The ring is device memory that the engine opens by CUDA IPC, or, on CPUs, the rest of the same file.

Order: on x86-64, stores of one process are seen in their order, so a counter that is written last is also seen last.
On GPUs, whoever signals has waited for its stream before.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from rl.transfer.ipc import rebuilt
from rl.transfer.links import TransferError, source_name

ENTRIES = 64  # buckets that may be written and not taken
_PAGE = 4096
_WORDS = _PAGE // 8
# Words of the page; counters lie in cache lines of their own.
_WRITTEN, _TAKEN, _MARK, _FIRST_ENTRY, _ENTRY_WORDS = 0, 8, 16, 64, 4
_MAGIC = 0x756C747261657073


@dataclass(frozen=True)
class Entry:
    """What lies where: a bucket by source and index, and its offset in the ring, bytes."""

    source: int
    index: int
    offset: int


@dataclass(frozen=True)
class StagingHandles:
    """What an engine needs to open a trainer rank's staging memory.

    Attributes:
        pid, descriptor: of the trainer rank and its shared page.
        nbytes: of the ring.
        generation, rank: that it was made for, to notice when another file is opened, and for errors.
        ring: ``(function, arguments)`` of torch's own reduction of device memory; None: it lies behind the page.
    """

    pid: int
    descriptor: int
    nbytes: int
    generation: int
    rank: int
    ring: tuple[Any, tuple[Any, ...]] | None

    def open(self, device: torch.device) -> OpenedStaging:
        """In the engine's process, whose weights are on ``device``.

        Raises:
            TransferError: it cannot be opened: another host or GPU, or the trainer rank has gone.
        """
        who = f"the staging memory of {source_name(self.rank)}"
        path = f"/proc/{self.pid}/fd/{self.descriptor}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransferError(
                f"could not open {who}: engine and trainer rank must be processes of one host and user: {error}"
            ) from error
        try:
            mapped = mmap.mmap(descriptor, _PAGE if self.ring is not None else _PAGE + self.nbytes)
        except (OSError, ValueError) as error:
            raise TransferError(f"could not map {who}: is {path} of another process? {error}") from error
        finally:
            os.close(descriptor)
        words = np.frombuffer(mapped, np.int64, _WORDS)
        if tuple(words[_MARK : _MARK + 3].tolist()) != (_MAGIC, self.generation, self.rank):
            raise TransferError(f"could not open {who}: {path} is not what it made, so this is another host")
        if self.ring is None:
            return OpenedStaging(words, torch.frombuffer(mapped, dtype=torch.uint8, offset=_PAGE), self)
        try:
            ring = rebuilt(*self.ring, device)
        except RuntimeError as error:
            raise TransferError(f"could not open {who}: they must share a GPU: {error}") from error
        return OpenedStaging(words, ring, self)


class _Counters:
    """The shared page."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    @property
    def written(self) -> int:
        """Buckets that were published since the generation began."""
        return int(self._words[_WRITTEN])

    @property
    def taken(self) -> int:
        """Buckets that the engine has taken since then."""
        return int(self._words[_TAKEN])


class Staging(_Counters):
    """The trainer rank's side.

    Args:
        nbytes: of the ring.
        device: where it lies.
        generation: of the membership.
        rank: of the trainer.
        before: staging memory of the generation before: its ring on a GPU is used again if it is large enough. What an
            engine that died had opened would otherwise stay taken, as nobody says that it is free.
    """

    def __init__(
        self, nbytes: int, device: torch.device, generation: int, rank: int, before: Staging | None = None
    ) -> None:
        on_cpu = device.type == "cpu"
        self._pool: Any = None
        self._descriptor = os.memfd_create("transfer-staging", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, _PAGE + (nbytes if on_cpu else 0))
        mapped = mmap.mmap(self._descriptor, 0)
        super().__init__(np.frombuffer(mapped, np.int64, _WORDS))
        self._words[_MARK : _MARK + 3] = (_MAGIC, generation, rank)
        self.generation, self.rank = generation, rank
        if on_cpu:
            self.ring = torch.frombuffer(mapped, dtype=torch.uint8, offset=_PAGE)
        elif before is not None and before.nbytes >= nbytes:
            self.ring, self._pool = before.ring, before._pool
        else:
            with _plain_allocations() as self._pool:
                self.ring = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)

    @property
    def nbytes(self) -> int:
        return self.ring.numel()

    def handles(self) -> StagingHandles:
        ring = None if self.ring.device.type == "cpu" else reduce_tensor(self.ring)
        return StagingHandles(os.getpid(), self._descriptor, self.nbytes, self.generation, self.rank, ring)

    def publish(self, number: int, entry: Entry) -> None:
        """Say that the number-th bucket (of the generation) has been written, by a stream that was waited for."""
        at = _FIRST_ENTRY + number % ENTRIES * _ENTRY_WORDS
        self._words[at : at + 3] = (entry.source, entry.index, entry.offset)
        self._words[_WRITTEN] = number + 1

    def close(self) -> None:
        """Let go of what the engine opens by; memory is freed with this object, once the engine has closed it, too."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self.ring.device.type == "cuda":
            torch.cuda.ipc_collect()


class OpenedStaging(_Counters):
    """The engine's side; see :meth:`StagingHandles.open`."""

    def __init__(self, words: np.ndarray, ring: torch.Tensor, handles: StagingHandles) -> None:
        super().__init__(words)
        self.ring = ring
        self.rank = handles.rank

    def entry(self, number: int) -> Entry:
        """Of a bucket that is written and not taken."""
        at = _FIRST_ENTRY + number % ENTRIES * _ENTRY_WORDS
        return Entry(*self._words[at : at + 3].tolist())

    def take(self, number: int) -> None:
        """Say that so many buckets have been copied: their places may be overwritten."""
        self._words[_TAKEN] = number

    def close(self) -> None:
        del self.ring, self._words


@contextmanager
def _plain_allocations() -> Iterator[Any]:
    """Allocate by ``cudaMalloc``: not every release of torch can share segments that expand.

    Yields what must live as long as the allocation.
    """
    asked = ",".join(os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if "expandable_segments:true" not in asked.replace(" ", "").lower():
        yield None
        return
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        # A pool of its own, or a free piece of a segment that expands could be what we get.
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            yield pool
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
