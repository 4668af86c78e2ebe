"""What the operations of a schedule take of a rank's memory.

    reading = device_memory(device)                      # allocated now, and most since the last reading
    counted = OperationsMemory(reading)
    counted.begin(); ...; counted.end(operation, received=bytes, kept=True)
    counted.found, counted.peak

1. The caching allocator counts a tensor from the host's call that makes it to the one that drops it. Readings are taken
   where the host issues an operation, and nothing waits for the device.
2. What a forward *holds*: allocated after it less before, and its input, which was received earlier. What it hands on
   is part of it until it is sent.
3. What *passes* in an operation: the most that was allocated within it, less what was allocated before the run and less
   what the micro-batches in flight hold, its own included. So buffers of messages under way are part of it.

Hence a schedule takes at most what its micro-batches hold at once, as ``simulate`` counts it, and what passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ultraep.pipeline.problem import Operation


@dataclass(frozen=True)
class MemoryReading:
    """Of a rank, in bytes.

    Attributes:
        allocated: by tensors, now.
        peak: the most at once since the reading before.
    """

    allocated: int
    peak: int


Memory = Callable[[], MemoryReading]


@dataclass(frozen=True)
class OperationMemory:
    """Of one operation, in bytes; see the module.

    Attributes:
        held: by a forward until its backward, of a model that only runs forward until its end; 0 of a backward.
        passing: beside what micro-batches hold, at its fullest.
    """

    held: int
    passing: int


def device_memory(device: torch.device) -> Memory:
    """Readings of torch's allocator on a CUDA device; each sets its peak back."""

    def read() -> MemoryReading:
        counted = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        torch.cuda.reset_peak_memory_stats(device)
        return MemoryReading(counted["current"], counted["peak"])

    return read


class OperationsMemory:
    """Counts the operations of one run on this rank.

    Args:
        read: readings of this rank.
        before: bytes allocated before the run; what was allocated since passes. By default what is allocated now.

    Attributes:
        found: of every operation, in order.
        peak: most bytes at once above ``before``, so far.
    """

    def __init__(self, read: Memory, before: int | None = None) -> None:
        self._read = read
        now = read().allocated
        self._base = now if before is None else before
        self._begun = now
        self._held: dict[tuple[int, int], int] = {}  # (model, micro-batch) in flight -> bytes
        self.found: list[OperationMemory] = []
        self.peak = max(0, now - self._base)

    def begin(self) -> None:
        """An operation is about to be issued."""
        reading = self._read()
        self._begun = reading.allocated
        self._raise(reading)

    def end(self, operation: Operation, *, received: int, kept: bool) -> None:
        """The operation was issued.

        Args:
            operation: that began last.
            received: bytes of its input.
            kept: what a forward holds stays for a backward.
        """
        reading = self._read()
        self._raise(reading)
        key = operation.model, operation.microbatch
        held = 0 if operation.backward else max(0, reading.allocated - self._begun + received)
        passing = reading.peak - self._base - sum(self._held.values()) - held
        self.found.append(OperationMemory(held, max(0, passing)))
        if operation.backward:
            del self._held[key]
        elif kept:
            self._held[key] = held

    def _raise(self, reading: MemoryReading) -> None:
        self.peak = max(self.peak, reading.peak - self._base)
