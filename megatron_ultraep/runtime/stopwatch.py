"""How long parts of a balanced layer hold up the stream that computes: what balancing exposes.

The same parts are ranges of profilers, see :mod:`megatron_ultraep.runtime.ranges`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from megatron_ultraep.runtime import ranges

_NOTHING = nullcontext()


class Stopwatch:
    """Times named parts on the current stream, when it is on; costs nothing when it is off.

    A part that only waits takes what it waits; a part whose kernels run takes their time. What runs on other streams
    meanwhile is not counted: that is hidden.

    Args:
        device: whose stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def __call__(self, part: str) -> AbstractContextManager[None]:
        """Time the block as one span of ``part``."""
        if ranges.on():
            return self._timed_and_named(part) if self.on else ranges.span(f"balance: {part}")
        return self._timed(part) if self.on else _NOTHING

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans[part].append((start, self._now()))

    @contextmanager
    def _timed_and_named(self, part: str) -> Iterator[None]:
        with ranges.span(f"balance: {part}"), self._timed(part):
            yield

    def read(self) -> dict[str, float]:
        """Mean time of a span by part since the last call (us); waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        means = {part: sum(map(self._between, spans)) / len(spans) for part, spans in self._spans.items()}
        self._spans.clear()
        return means

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return float(start.elapsed_time(end)) * 1e3 if self._cuda else (end - start) * 1e6
