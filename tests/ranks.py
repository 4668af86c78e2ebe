"""Pools of rank processes that stay up between tests, so that a multi-rank test costs seconds.

    def test_all_reduce(ranks):
        assert ranks(2).run(sum_of_ranks) == [1, 1]

1. A fork server (a fresh process: never the one of pytest, which may hold threads of Ray or vLLM) imports
   `tests._preload` once.
2. `RankPools.get(n)` forks n ranks from it; they form one gloo group over the loopback interface.
3. `RankPool.run(function, ...)` runs a module-level function on every rank and returns the results in rank order.
4. A run that fails or times out ends the pool's processes; the next run starts fresh ones.

Invariants: every run starts from the same state (`tests._rank_process.reset`); at most `MAX_PROCESSES` ranks are alive;
every wait has a limit; no rank outlives the pytest process, however that one ends.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import _pickling
from tests._rank_process import CRASHED, OK, rank_main

ROOT = Path(__file__).resolve().parent.parent
MAX_PROCESSES = 8
START_TIMEOUT = 180.0  # seconds; the first start waits for the imports of the fork server
RUN_TIMEOUT = 120.0  # seconds
# After one rank has failed, the others usually fail too, or wait in a collective for a rank that will not come.
GRACE_AFTER_FAILURE = 2.0  # seconds

# What the ranks need to find set before the imports.
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


class RankError(Exception):
    """A rank raised or died; the message holds its traceback."""


class RankTimeoutError(RankError):
    """Not every rank answered in time; the message names them and shows where each one is."""


class RankPool:
    """`size` processes of one gloo group; made by `RankPools`, started by the first run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order; empty when the pool is not up."""
        return [process.pid for process in self._processes if process.pid is not None]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = RUN_TIMEOUT, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank, in an initialised `torch.distributed` of `size` ranks.

        Arguments and results are pickled by value (tensors too). `function` must be importable by its name: a
        module-level function of a test module will do, a lambda or a nested function will not.

        Returns the results in rank order. Raises `RankError` with the traceback of the first rank that raised, or
        `RankTimeoutError` after `timeout` seconds; either way the next run has fresh processes.
        """
        work = _pickle_work(function, args, kwargs)
        try:
            if not self._processes:
                self._start()
            for rank, connection in enumerate(self._connections):
                self._send(rank, connection, work)
            return self._gather(f"{function.__module__}.{function.__qualname__}", timeout)
        except BaseException:  # Ctrl-C too: ranks that are in the middle of something are of no more use
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes now; a later run starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ultraep-ranks-")
        with _fork_server_environment():
            context = multiprocessing.get_context("forkserver")
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=rank_main, args=(theirs, rank, self.size, str(self._stack_file(rank))), name=f"rank{rank}"
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        # Rank 0 opens the store of the process group and says at which port; the others get told.
        deadline = time.monotonic() + START_TIMEOUT
        port = self._receive_one(0, deadline)
        for rank, connection in enumerate(self._connections):
            self._send(rank, connection, pickle.dumps(port))
        self._gather("starting the process group", deadline - time.monotonic())

    def _send(self, rank: int, connection: Connection, data: bytes) -> None:
        try:
            connection.send_bytes(data)
        except OSError as error:
            raise RankError(f"rank {rank} of {self.size} is gone ({self._exit_of(rank)}) before the run") from error

    def _receive_one(self, rank: int, deadline: float) -> Any:
        connection = self._connections[rank]
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            raise self._timeout_error("starting", [rank], START_TIMEOUT)
        status, value = self._receive(rank)
        if status != OK:
            raise RankError(f"rank {rank} of {self.size} failed while starting:\n{value}")
        return value

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            data = self._connections[rank].recv_bytes()
        except (EOFError, OSError):
            return CRASHED, f"The process ended without an answer ({self._exit_of(rank)})."
        return pickle.loads(data)  # type: ignore[no-any-return]

    def _gather(self, what: str, timeout: float) -> list[Any]:
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {self._connections[rank]: rank for rank in range(self.size) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                answers[rank] = self._receive(rank)
                if answers[rank][0] != OK:
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
        missing = [rank for rank in range(self.size) if rank not in answers]
        failed = [rank for rank in sorted(answers) if answers[rank][0] != OK]
        if failed:
            raise RankError(self._failure_text(what, answers, failed, missing))
        if missing:
            raise self._timeout_error(what, missing, timeout)
        return [answers[rank][1] for rank in range(self.size)]

    def _failure_text(
        self, what: str, answers: dict[int, tuple[str, Any]], failed: list[int], missing: list[int]
    ) -> str:
        # An exception comes before a crash: a rank that raises often takes the connections of the others with it.
        first = min(failed, key=lambda rank: (answers[rank][0] == CRASHED, rank))
        others = [rank for rank in failed if rank != first]
        lines = [f"{what}: rank {first} of {self.size} failed.", str(answers[first][1]).rstrip()]
        lines += [f"Rank {rank} failed too: {str(answers[rank][1]).strip().splitlines()[-1]}" for rank in others]
        if missing:
            lines.append(f"No answer within {GRACE_AFTER_FAILURE:g} s after that from: {_named(missing)}.")
        return "\n".join(lines)

    def _timeout_error(self, what: str, missing: list[int], timeout: float) -> RankTimeoutError:
        lines = [f"{what}: no answer within {timeout:g} s from {_named(missing)} of {self.size}."]
        for rank in missing:
            lines += [f"Rank {rank} ({self._exit_of(rank)}) is at:", self._stack_of(rank)]
        return RankTimeoutError("\n".join(lines))

    def _exit_of(self, rank: int) -> str:
        self._processes[rank].join(1)
        code = self._processes[rank].exitcode
        return "still running" if code is None else f"exit code {code}"

    def _stack_file(self, rank: int) -> Path:
        assert self._directory is not None
        return Path(self._directory.name) / f"rank{rank}.stack"

    def _stack_of(self, rank: int) -> str:
        """Where the rank's threads are, as its fault handler writes it on SIGUSR1."""
        pid = self._processes[rank].pid
        with contextlib.suppress(OSError, TypeError):
            os.kill(pid, signal.SIGUSR1)  # type: ignore[arg-type]
            time.sleep(0.3)
            return self._stack_file(rank).read_text().rstrip()
        return "(unknown)"


class RankPools:
    """The pools of one test session, by size. `ranks(4)` in a test is `RankPools.get(4)`."""

    def __init__(self, max_processes: int = MAX_PROCESSES) -> None:
        self._max_processes = max_processes
        self._pools: OrderedDict[int, RankPool] = OrderedDict()  # least recently used first
        atexit.register(self.stop)  # before multiprocessing's own exit handler, which waits for the ranks

    def get(self, size: int) -> RankPool:
        """A pool of `size` ranks; the pools that were not used for longest stop if there would be too many ranks."""
        if not 1 <= size <= self._max_processes:
            raise ValueError(f"1 to {self._max_processes} ranks expected, got {size}")
        pool = self._pools.pop(size, None) or RankPool(size)
        while sum(self._pools) + size > self._max_processes:
            _, unused = self._pools.popitem(last=False)
            unused.stop()
        self._pools[size] = pool
        return pool

    __call__ = get

    def stop(self) -> None:
        """End every process of every pool."""
        for pool in self._pools.values():
            pool.stop()
        self._pools.clear()


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _pickle_work(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return _pickling.dumps((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"a module-level function and picklable arguments expected, got {function!r}: {error}. "
            "Move nested functions and lambdas to the top of the test module."
        ) from error


@contextlib.contextmanager
def _fork_server_environment() -> Iterator[None]:
    """What the fork server inherits when it starts; without effect once it is up."""
    # Some releases of Python 3.11 do not hand sys.path to the fork server, hence PYTHONPATH.
    path = os.pathsep.join(entry for entry in [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)] if entry)
    settings = RANK_ENVIRONMENT | {"PYTHONPATH": path}
    if sys.platform != "linux":
        settings.pop("GLOO_SOCKET_IFNAME")
    saved = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    multiprocessing.set_forkserver_preload(["tests._preload"])
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
