"""Colocated mode: what a trainer rank holds on its device makes room for the engines, and comes back bit for bit.

    report = offloader.offload()                  # weights, gradients, optimizer: storages freed
    offloader.onload(["weights"])                 # enough to export weights or to take log-probs
    offloader.onload()                            # all: training goes on

| part | what | how |
|---|---|---|
| weights | parameters of all models: of those that learn in DDP's buffers with the distributed optimizer | copied |
| gradients | DDP's gradient buffers | dropped: between steps nobody reads them; zeros afterwards |
| optimizer | main parameters that are copies, Adam's moments | copied |

Storages are emptied and filled again, not replaced (``resize_``), so every view stays valid: parameters and
``main_grad`` in DDP's buffers, shards of the distributed optimizer, and whatever Transformer Engine refers to.
Addresses change; kernels of ours look them up at every call.

Slots of replicas stay: they are few and shared by all layers, and those in symmetric memory are mapped by other ranks.

On GPUs the copies lie in one pinned block of host memory per part, kept for the next time; on CPUs in other storages.
"""

from __future__ import annotations

import resource
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.optimizer import held_by

if TYPE_CHECKING:
    from rl.training.worker import TrainWorker

Part = Literal["weights", "gradients", "optimizer"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimizer")

_ALIGNMENT = 256  # bytes


class Offloaded(RuntimeError):
    """Something was asked that needs what is offloaded; says what to bring back."""


@dataclass(frozen=True)
class OffloadReport:
    """What was moved.

    Attributes:
        bytes: by part, of device memory freed or taken again.
        seconds: of the slowest rank.
    """

    bytes: Mapping[Part, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one rank (bytes).

    Attributes:
        device_used: of the GPU, by all its processes; of a rank on a CPU, resident memory of its process.
        device_peak: most that this rank's torch reserved since the last report; on a CPU, most that was resident ever.
        torch_allocated: by this rank's tensors on the GPU; on a CPU, weights, gradients and optimizer that are not
            offloaded.
        device_total: of the GPU; None of a rank on a CPU.
        torch_free: what this rank could still allocate on it: free there, or held by its torch without a tensor in it;
            None likewise.
    """

    device_used: int
    device_peak: int
    torch_allocated: int
    device_total: int | None = None
    torch_free: int | None = None

    @property
    def most_used(self) -> int:
        """Of the GPU, by all its processes, when this rank's torch held most since the last report; on a CPU, now.

        What others hold now is taken to be what they held then.
        """
        if self.device_total is None or self.torch_free is None:
            return self.device_used
        others = self.device_total - self.torch_free - self.torch_allocated
        return others + self.device_peak


def merge_reports(reports: Sequence[OffloadReport]) -> OffloadReport:
    """Reports of all ranks as one."""
    total: dict[Part, int] = {}
    for report in reports:
        for part, size in report.bytes.items():
            total[part] = total.get(part, 0) + size
    return OffloadReport(total, max(report.seconds for report in reports))


class Offloader:
    """Moves what one rank holds, between steps.

    Args:
        worker: the rank.
    """

    def __init__(self, worker: TrainWorker) -> None:
        self._worker = worker
        self._away: dict[Part, _Away] = {}
        self._blocks: dict[Part, torch.Tensor] = {}  # pinned, kept

    def offload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Free device memory; what is offloaded already stays so.

        Args:
            what: parts; all by default.

        Raises:
            ValueError: an unknown part.
        """
        started = time.perf_counter()
        worker, sizes = self._worker, dict.fromkeys(_parts(what), 0)
        if any(part not in self._away for part in sizes):
            for trained in worker.trained.values():
                compat.synchronize_parameters(trained.model.wrapped)  # gathered in the background with overlap
                if "gradients" not in self._away:
                    trained.empty_gradients()  # the optimizer may hold copies of its own
            _wait_for_device(worker.actor.device)
        known = self._storages()
        for part in sizes:
            if part not in self._away:
                self._away[part] = self._put_away(part, known[part])
                sizes[part] = self._away[part].bytes
        _wait_for_device(worker.actor.device)
        if worker.actor.device.type == "cuda":
            torch.cuda.empty_cache()
        return OffloadReport(sizes, time.perf_counter() - started)

    def onload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Bring parts back; what is on the device already stays so. Arguments and errors as for :meth:`offload`."""
        started = time.perf_counter()
        sizes = dict.fromkeys(_parts(what), 0)
        for part in sizes:
            away = self._away.get(part)
            if away is not None:
                away.bring_back()
                del self._away[part]
                sizes[part] = away.bytes
        _wait_for_device(self._worker.actor.device)
        return OffloadReport(sizes, time.perf_counter() - started)

    @contextmanager
    def borrowed(self, *parts: Part) -> Iterator[None]:
        """Parts on the device for a while; those that were offloaded are offloaded again."""
        away = [part for part in parts if part in self._away]
        self.onload(away)
        try:
            yield
        finally:
            if away:
                self.offload(away)

    def require(self, what: str, *parts: Part) -> None:
        """See that parts are on the device.

        Args:
            what: needs them, for the error.
            parts: what it needs.

        Raises:
            Offloaded: when one is not.
        """
        away = [part for part in parts if part in self._away]
        if away:
            raise Offloaded(
                f"{what}: needs the trainer's {', '.join(parts)} on the device, but {', '.join(away)} "
                f"{'is' if away == ['optimizer'] else 'are'} offloaded: onload() first"
            )

    def memory(self) -> MemoryReport:
        """What this rank takes now."""
        if self._worker.actor.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            peak = torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
            room = free + torch.cuda.memory_reserved() - allocated
            return MemoryReport(total - free, peak, allocated, total, room)
        used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        held = sum(storage.nbytes() for storages in self._storages().values() for storage in storages)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return MemoryReport(used, max(used, peak), held)  # the kernel brings the peak up to date now and then

    def _storages(self) -> dict[Part, list[torch.UntypedStorage]]:
        """Of each part, in a fixed order, each once; those that are empty are left out."""
        found: dict[Part, list[torch.UntypedStorage]] = {}
        seen: set[int] = set()
        for part in PARTS:
            mine = found.setdefault(part, [])
            for tensor in self._tensors(part):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    mine.append(storage)
        return found

    def _tensors(self, part: Part) -> Iterator[torch.Tensor]:
        worker = self._worker
        if part == "weights":
            for model in [*(trained.model for trained in worker.trained.values()), *worker.frozen.values()]:
                for chunk in model.chunks:
                    yield from chunk.parameters()
            return
        for trained in worker.trained.values():
            if part == "gradients":
                yield from compat.gradient_buffers(trained.model.wrapped)
                continue
            for held in held_by(trained.optimizer).values():
                for tensor in held.tensors().values():
                    if tensor.device == worker.actor.device:
                        yield tensor

    def _put_away(self, part: Part, storages: list[torch.UntypedStorage]) -> _Away:
        if part == "gradients":
            return _Away(storages, None)
        size = sum(map(_padded, storages))
        block = self._blocks.get(part)
        if block is None or len(block) != size:
            self._blocks.pop(part, None)
            block = torch.empty(size, dtype=torch.uint8)
            if self._worker.actor.device.type == "cuda":
                self._blocks[part] = _pinned(block)
        return _Away(storages, block)


class _Away:
    """Storages of one part that were emptied.

    Args:
        storages: of the device.
        block: uint8, host memory to copy them to; None drops what is in them.
    """

    def __init__(self, storages: Sequence[torch.UntypedStorage], block: torch.Tensor | None) -> None:
        self._storages, self._block = storages, block
        self._sizes = [storage.nbytes() for storage in storages]
        self.bytes = sum(self._sizes)
        for storage, copy in self._copies():
            if copy is not None:
                copy.copy_(_bytes_of(storage), non_blocking=True)
        _wait_for_device(*{storage.device for storage in storages})
        for storage in storages:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Take the memory again and fill it; returns before copies are there."""
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        for storage, copy in self._copies():
            if copy is None:
                _bytes_of(storage).zero_()
            else:
                _bytes_of(storage).copy_(copy, non_blocking=True)

    def _copies(self) -> Iterator[tuple[torch.UntypedStorage, torch.Tensor | None]]:
        start = 0
        for storage, size in zip(self._storages, self._sizes, strict=True):
            yield storage, None if self._block is None else self._block[start : start + size]
            start += -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 ``[bytes]`` over the whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _padded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT


def _pinned(block: torch.Tensor) -> torch.Tensor:
    """The same block, page-locked until it is freed.

    torch's own pinned memory is rounded up to powers of two, which doubles what large models take. Where the system
    does not allow to lock so much, copies are slower, and that is all.
    """
    if block.numel():
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(block.data_ptr(), block.numel(), 0)) == 0:
            # Not at exit, when the driver may be gone already.
            weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr()).atexit = False
    return block


def _wait_for_device(*devices: torch.device) -> None:
    if any(device.type == "cuda" for device in devices):
        torch.cuda.synchronize()


def _parts(what: Iterable[Part] | None) -> tuple[Part, ...]:
    parts = PARTS if what is None else tuple(what)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(unknown)}")
    return parts
