"""Records loads and plans while training goes on, off its critical path.

``record`` puts a reference to the plan into a queue and returns; a thread of its own takes the loads out of it,
packs and compresses them, and writes chunk files (``store``). What the queue cannot take is dropped and counted.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.plan.types import Plan
from megatron_ultraep.telemetry.blocks import Row, Shape, pack, row, row_nbytes
from megatron_ultraep.telemetry.store import ChunkStore

logger = logging.getLogger(__name__)

_MOST_QUEUED = 4096
_REMEMBERED = 1 << 16
_HELD_SECONDS = 0.5e-3


@dataclass(frozen=True)
class Counts:
    """What a recorder did with the plans it was given.

    Attributes:
        recorded: stored, or waiting to be.
        repeated: left out because the same key and layer was recorded before (recomputation).
        dropped: left out because the queue was full.
        thinned: stored, and removed again under the disk bound.
        failed: could not be packed or written; the log says why.
    """

    recorded: int = 0
    repeated: int = 0
    dropped: int = 0
    thinned: int = 0
    failed: int = 0


class _Mark:
    """Goes through the queue like a plan; set when all before it is on disk."""

    def __init__(self, last: bool):
        self.last = last
        self.reached = threading.Event()


class Recorder:
    """Writes load records of one process, one per expert-parallel group.

    Every public method may be called from any thread.

    Args:
        directory: for all recorders of a run; made if it does not exist.
        max_mib: most disk that this recorder's files take (MiB, >= 1); what goes when it is full: see ``store``.
        name: unique among the recorders of the directory, e.g. ``"ep0-pp0"``; letters, digits, ``-`` and ``_``. A name
            that was used before (a resumed run) is continued.
        meta: JSON values worth remembering, e.g. ``{"model": ..., "topk": 8}``; shown by the viewer.
        queue_mib: most memory of plans waiting to be recorded (MiB).
        write_seconds: write what is packed at least this often (s); a killed process loses no more.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: another recorder of the same name is open.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_mib: int,
        name: str,
        meta: Mapping[str, Any] | None = None,
        queue_mib: int = 256,
        write_seconds: float = 60.0,
    ):
        if max_mib < 1 or queue_mib < 1:
            raise ValueError(f"expected max_mib and queue_mib >= 1 MiB, got {max_mib} and {queue_mib}")
        try:
            self._meta = json.loads(json.dumps(dict(meta or {})))
        except TypeError as error:
            raise ValueError(f"expected meta of JSON values, got {meta!r}: {error}") from error
        self._store = ChunkStore(Path(directory), name, max_mib << 20)
        self._session = str(time.time_ns())
        self._queue_bytes = queue_mib << 20
        self._write_seconds = write_seconds
        self._queue: queue.SimpleQueue[tuple[MicroBatchKey, int, Plan] | _Mark] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._dropped = 0
        self._closed = False
        # All below belongs to the thread.
        self._rows: dict[Shape, list[Row]] = {}
        self._seen: dict[tuple[MicroBatchKey, int], None] = {}
        self._recorded = self._repeated = self._failed = 0
        self._written = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"load-recorder-{name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def record(self, key: MicroBatchKey, layer: int, plan: Plan) -> None:
        """Queue a plan; takes microseconds and never waits. A full queue drops it and counts it.

        Args:
            key: the micro-batch.
            layer: number of the layer in the whole model, the same on all pipeline stages.
            plan: what was decided for it; kept until it is written.

        Raises:
            RuntimeError: the recorder is closed.
        """
        if self._closed:
            raise RuntimeError(f"expected an open recorder, but it was closed before {key}, layer {layer}")
        waiting = self._queue.qsize()
        if waiting >= _MOST_QUEUED or waiting * plan.quota.nbytes > self._queue_bytes:
            with self._lock:
                self._dropped += 1
            return
        self._queue.put((key, layer, plan))

    def remember(self, **values: Any) -> None:
        """Add to ``meta`` of what is written from now on; JSON values.

        Raises:
            ValueError: other values.
        """
        try:
            added = json.loads(json.dumps(values))
        except TypeError as error:
            raise ValueError(f"expected meta of JSON values, got {values!r}: {error}") from error
        self._meta = self._meta | added

    @property
    def counts(self) -> Counts:
        """So far; exact after :meth:`flush`."""
        return Counts(self._recorded, self._repeated, self._dropped, self._store.thinned, self._failed)

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until all that was recorded before is on disk.

        Raises:
            TimeoutError: after ``timeout`` seconds; recording goes on.
        """
        if not self._closed:
            self._wait(_Mark(last=False), timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Flush and stop; closing twice is fine.

        Raises:
            TimeoutError: the disk did not take everything in ``timeout`` seconds.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._wait(_Mark(last=True), timeout)
        self._thread.join(timeout)
        self._store.close()
        counts = self.counts
        if counts.dropped or counts.failed:
            logger.warning("load records %s: %s", self._store.name, counts)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wait(self, mark: _Mark, timeout: float) -> None:
        self._queue.put(mark)
        if not mark.reached.wait(timeout):
            raise TimeoutError(
                f"load records {self._store.name}: not on disk after {timeout:g} s, {self._queue.qsize()} plans wait; "
                f"is {self._store.directory} slow or gone?"
            )

    def _run(self) -> None:
        woken = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=self._write_seconds)
            except queue.Empty:
                self._write()
                continue
            if isinstance(item, _Mark):
                self._write()
                item.reached.set()
                if item.last:
                    return
                continue
            self._take(*item)
            if time.monotonic() - self._written > self._write_seconds:
                self._write()
            if time.monotonic() - woken > _HELD_SECONDS:
                # Gives up the interpreter lock, which the training thread may wait for.
                time.sleep(0)
                woken = time.monotonic()

    def _take(self, key: MicroBatchKey, layer: int, plan: Plan) -> None:
        if (key, layer) in self._seen:
            self._repeated += 1
            return
        try:
            packed = row(key, layer, plan)
        except Exception as error:
            self._fail(1, error)
            return
        self._seen[key, layer] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        self._recorded += 1
        shape = Shape.of(plan.layout)
        rows = self._rows.setdefault(shape, [])
        rows.append(packed)
        if len(rows) * row_nbytes(shape) >= self._store.chunk_bytes:
            self._write_rows(shape)

    def _write(self) -> None:
        for shape in list(self._rows):
            self._write_rows(shape)
        self._written = time.monotonic()

    def _write_rows(self, shape: Shape) -> None:
        rows = self._rows.pop(shape)
        counts = {"dropped": self._dropped, "thinned": self._store.thinned, "failed": self._failed}
        try:
            self._store.write(
                pack(rows, shape, group=self._store.name, counts={self._session: counts}, meta=self._meta)
            )
        except Exception as error:
            self._recorded -= len(rows)
            self._fail(len(rows), error)

    def _fail(self, records: int, error: Exception) -> None:
        """Telemetry never ends a run: count, and say why, the first time and then rarely."""
        before, self._failed = self._failed, self._failed + records
        if before == 0 or before // 10_000 != self._failed // 10_000:
            logger.warning("%d load records of %s are lost: %s", self._failed, self._store.name, error, exc_info=error)
