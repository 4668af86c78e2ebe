"""Waits with a limit, and errors that say which operation of which rank waited for whom.

On CPUs every wait for a neighbour takes a limit itself. On GPUs a wait only orders streams, and the host runs ahead: a
thread looks at the events of the operations, and when the oldest does not end in time it says so and aborts the
process' communicators, so that the host gets out of whatever call it is in.

A rank that fails says why in the store of the default group; the others put that into their own errors.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

log = logging.getLogger(__name__)


class ExecutionError(RuntimeError):
    """A schedule that did not run to its end: names rank, operation, and whom it waited for."""


class FailureBoard:
    """Where the ranks of one run write why they failed. Reading and writing never raise: the store may be gone too.

    Args:
        name: of the run, the same on every rank and different for each run.
    """

    def __init__(self, name: str) -> None:
        self._store = distributed_c10d.PrefixStore(f"fused/{name}", distributed_c10d._get_default_store())

    def report(self, text: str) -> None:
        """The first report of all ranks stays."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.compare_set("first", "", text)

    def first(self) -> str | None:
        """What the rank that failed first said."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            if self._store.check(["first"]):
                return str(self._store.get("first").decode())
        return None


def explain(error: BaseException, doing: str, waited: float, board: FailureBoard) -> ExecutionError:
    """The error of a rank, with what the first one to fail said; tells the others.

    Args:
        error: what was raised.
        doing: what this rank did, naming rank and operation.
        waited: seconds it took until then.
    """
    said = (str(error).strip() or "no message").splitlines()[0][:500]
    text = f"{doing}: {type(error).__name__} after {waited:.1f} s: {said}"
    if isinstance(error, ExecutionError):
        text = str(error)
    first = board.first()
    if first is None:
        board.report(text)
        return ExecutionError(text)
    return ExecutionError(text if first == text else f"{text}\nThe first rank that failed said: {first}")


@dataclass
class _Entry:
    describe: Callable[[bool], str]
    start: Any
    end: Any | None = None


class DeviceWatchdog:
    """Watches operations whose end is an event of a device.

    Args:
        timeout_s: longest time without an operation's end, in seconds, while some are not ended.
        abort: called once when that is over, after :attr:`failure` is set.

    Attributes:
        failure: what was stuck; None as long as nothing is.
    """

    def __init__(self, timeout_s: float, abort: Callable[[], None]) -> None:
        self.failure: str | None = None
        self._timeout = timeout_s
        self._abort = abort
        self._entries: deque[_Entry] = deque()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._device: int | None = None

    def __enter__(self) -> DeviceWatchdog:
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._watch, name="fused-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._timeout)

    def began(self, describe: Callable[[bool], str], start: Any) -> None:
        """An operation is handed to the device.

        Args:
            describe: from whether it has what it waits for, to what it is doing.
            start: event before its first kernel, after its wait.
        """
        with self._lock:
            self._entries.append(_Entry(describe, start))

    def ended(self, end: Any) -> None:
        """All kernels of the operation that began last are handed over; ``end`` is an event behind them."""
        with self._lock:
            self._entries[-1].end = end

    def _watch(self) -> None:
        if self._device is not None:  # a thread begins on the first device, and asking an event there makes a context
            torch.cuda.set_device(self._device)
        progress = time.monotonic()
        while not self._closed.wait(min(1.0, self._timeout / 20)):
            with self._lock:
                while self._entries and (end := self._entries[0].end) is not None and end.query():
                    self._entries.popleft()
                    progress = time.monotonic()
                stuck = self._entries[0] if self._entries else None
            if stuck is None:
                progress = time.monotonic()
            elif time.monotonic() - progress > self._timeout:
                self.failure = f"{stuck.describe(bool(stuck.start.query()))}: no end within {self._timeout:g} s"
                log.error("%s", self.failure)
                self._abort()
                return


def abort_communicators() -> None:
    """End whatever this process' communicators wait for. It can do no more communication afterwards."""
    abort = getattr(distributed_c10d, "_abort_process_group", None)
    if abort is not None:
        abort()
