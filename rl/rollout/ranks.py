"""An engine of several tensor-parallel ranks: calls to all of them, and what happens when one ends.

With one rank, vLLM computes in the engine's own process. With more, each rank is a child of it, which vLLM starts, and
which this module makes safe to lose:

1. A call answers with values or errors (:func:`answered`), never by raising. vLLM stops reading answers at the first
   rank that raised; those of the others would be taken for the answers of the next call.
2. A rank that ends takes the others with it, and the engine fails with its name (:class:`RankWatch`): the others would
   wait for it in a collective, which has no limit of its own.
3. A rank ends with the engine's process, however that ends (:func:`end_with_engine`): vLLM closes a pipe, which a rank
   in a collective does not look at.
4. No file is left in shared memory (:func:`forget_shared_memory`).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

from rl.rollout import compat

_SHARED_MEMORY = Path("/dev/shm")
# Of Python's segments and locks, which vLLM's queues use, and of its collectives on CPUs. NCCL sees to its own.
_SHARED_NAMES = tuple(f"{_SHARED_MEMORY}/{begin}" for begin in ("psm_", "sem.mp-", "vllm_dist_"))
_PR_SET_PDEATHSIG = 1
_NOTICE_S = 10.0  # from a rank's end until the thread that watches says so


@dataclass(frozen=True)
class Answer:
    """What a rank answers: the method's value, or what it raised."""

    value: Any = None
    error: Exception | None = None


def answered(method: Callable[..., Any]) -> Callable[..., Answer]:
    """Make a worker's method answer with what it raises; to be called with :func:`call_ranks`."""

    @functools.wraps(method)
    def answering(*args: Any, **kwargs: Any) -> Answer:
        try:
            return Answer(method(*args, **kwargs))
        except Exception as error:
            return Answer(error=_portable(error))

    return answering


def call_ranks(engine: Any, method: str | Callable[..., Answer], *args: Any) -> list[Any]:
    """Call an :func:`answered` method, or function of the worker, on every rank; their values in order of ranks.

    Raises:
        Exception: what the first rank that failed raised; every rank has answered by then.
        RuntimeError: vLLM's, when a rank is gone.
    """
    answers: list[Answer] = engine.collective_rpc(method, args=args)
    for rank, answer in enumerate(answers):
        if answer.error is not None:
            if len(answers) > 1:
                answer.error.add_note(f"on rank {rank} of {len(answers)} of the engine")
            raise answer.error
    return [answer.value for answer in answers]


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def end_with_engine() -> None:
    """In a rank's process: be killed when the engine's thread ends. Linux only; elsewhere vLLM's pipe must do."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def shared_memory_names() -> tuple[str, ...]:
    """What this process has open of vLLM's queues, collectives and locks: paths under ``/dev/shm``."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return ()
    opened = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    # The maps of who made a lock have it under a name that it was made with.
    locks = [one._semlock.name for one in gc.get_objects() if isinstance(one, SemLock)]
    opened |= {f"{_SHARED_MEMORY}/sem.{name.removeprefix('/')}" for name in locks if name is not None}
    return tuple(sorted(name for name in opened if name.startswith(_SHARED_NAMES) and not name.endswith("(deleted)")))


def forget_shared_memory(names: Iterable[str]) -> None:
    """Take segments' names away, once all ranks have them open: then their memory goes with the processes.

    Those that are killed do not tidy up, and neither does Python's tracker, which Ray kills with them.
    """
    for name in names:
        Path(name).unlink(missing_ok=True)


def unlink_once() -> None:
    """In a process that will make segments or locks: let Python find their names gone without a complaint."""

    def forgiving(original: Callable[[Any], None], kind: str) -> Callable[[Any], None]:
        def unlink(named: Any) -> None:
            try:
                original(named)
            except FileNotFoundError:
                resource_tracker.unregister(getattr(named, "_name", named), kind)

        return unlink

    SharedMemory.unlink = forgiving(SharedMemory.unlink, "shared_memory")
    SemLock._cleanup = staticmethod(forgiving(SemLock._cleanup, "semaphore"))


class RankWatch:
    """Waits, in a thread of its own, for the first of an engine's ranks to end.

    Args:
        engine: vLLM's, with ranks in processes of their own.
        on_death: told which rank ended and how, when the others are dead too. Not called after :meth:`stop`.
    """

    def __init__(self, engine: Any, on_death: Callable[[str], None]) -> None:
        self._processes = compat.rank_processes(engine)
        self._sentinels = [process.sentinel for process in self._processes]
        self._on_death = on_death
        self._stopped = False
        self._told = threading.Event()
        if self._processes:
            threading.Thread(target=self._main, name="rank-watch", daemon=True).start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the ranks, in their order; empty when the only one computes in this process."""
        return tuple(process.pid for process in self._processes)

    def stop(self) -> None:
        """Ranks are about to end in order."""
        self._stopped = True

    def settle(self) -> None:
        """If a rank has ended, wait until ``on_death`` was told; at most some seconds."""
        if not self._stopped and self._processes and multiprocessing.connection.wait(self._sentinels, 0):
            self._told.wait(_NOTICE_S)

    def _main(self) -> None:
        ended = multiprocessing.connection.wait(self._sentinels)
        if self._stopped:
            return
        rank = next(i for i, process in enumerate(self._processes) if process.sentinel in ended)
        process = self._processes[rank]
        for other in self._processes:
            if other is not process:
                other.kill()
        code = _exit_code(process)
        self._on_death(f"rank {rank} of {len(self._processes)} (process {process.pid}) ended with exit code {code}")
        self._told.set()


def _exit_code(process: Any) -> int | None:
    """Of a process that has ended. The system may tell vLLM's own watch first; then it is known here a moment later."""
    deadline = time.monotonic() + 1.0
    while (code := process.exitcode) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return code
