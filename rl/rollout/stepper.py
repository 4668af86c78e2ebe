"""The thread that owns one vLLM engine and steps it.

vLLM's in-process engine is synchronous and not thread-safe. Here one thread makes it, steps it while it has requests,
and between steps runs what others ask for: adding, aborting, updating weights. So nothing ever sees a half-done step,
and a weight update needs no pause protocol.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_ultraep.runtime import ranges
from rl.rollout import compat
from rl.rollout.ranks import RankWatch

T = TypeVar("T")


class EngineFailed(RuntimeError):
    """The engine raised while stepping, or was stopped; it serves no more requests."""


class RankDied(EngineFailed):
    """The process of one of the engine's ranks ended; the engine serves no more requests."""


@dataclass
class Request:
    """A running request.

    Attributes:
        internal_id: vLLM's id.
        output: resolves to vLLM's final output, also after an abort.
        spans: ``(first response token, weight version)``, grows when weights change under the request.
        ended: called once the output is there.
    """

    internal_id: str
    spans: list[tuple[int, int]]
    output: Future[Any] = field(default_factory=Future)
    ended: Callable[[], None] | None = None

    def put(self, output: Any) -> None:
        """vLLM's side: called by the engine's thread with each output, or with an error."""
        if self.output.done():
            return
        if isinstance(output, BaseException):
            self.output.set_exception(output)
        elif output.finished:
            self.output.set_result(output)
        else:
            return
        if self.ended is not None:
            self.ended()


class EngineThread:
    """Makes an engine in a thread of its own and steps it there.

    Args:
        build: makes the engine; its exception is what :attr:`ready` raises.
        version: weight version that the engine starts with.
    """

    def __init__(self, build: Callable[[], Any], version: int, name: str) -> None:
        self.ready: Future[None] = Future()
        self.version = version
        self.failure: BaseException | None = None
        self._build = build
        self._commands: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._requests: dict[str, Request] = {}
        self._ended: list[str] = []  # so that a step need not look at all that run
        self._engine: Any = None
        self._watch: RankWatch | None = None
        self._dead_rank: str | None = None
        self._steps: dict[int, tuple[int, float]] = {}
        self._step_began: tuple[int, float] | None = None
        # A daemon: an engine that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Any], T]) -> Future[T]:
        """Run ``function(engine)`` between two steps."""
        future: Future[T] = Future()
        if self.failure is not None or not self._thread.is_alive():
            future.set_exception(self._error())
        else:
            self._commands.put((future, lambda: function(self._engine)))
            if self.failure is not None:  # it ended between the two lines above
                self._fail(self.failure)
        return future

    def submit(self, request_id: str, tokens: list[int], params: Any) -> Future[Request]:
        """Start a request; resolves to it once the engine has it.

        Args:
            request_id: unique among running requests.
            tokens: prompt token ids.
            params: vLLM's SamplingParams with ``output_kind`` FINAL_ONLY.
        """

        def add(engine: Any) -> Request:
            if request_id in self._requests:
                raise ValueError(f"a request {request_id!r} is already running: sample ids must be unique")
            internal_id = engine.add_request(request_id, {"prompt_token_ids": tokens}, params) or request_id
            request = Request(internal_id, [(0, self.version)], ended=lambda: self._ended.append(request_id))
            compat.attach_sink(engine, internal_id, request)
            self._requests[request_id] = request
            return request

        return self.call(add)

    def abort(self, request_ids: list[str]) -> Future[int]:
        """End requests now; their outputs resolve with what they have. Resolves to how many were running."""

        def end(engine: Any) -> int:
            running = [self._requests[name].internal_id for name in request_ids if name in self._requests]
            compat.abort_internal(engine, running)
            self._forget_finished()
            return len(running)

        return self.call(end)

    def progress(self) -> Future[dict[str, int]]:
        """Response tokens so far of every running request."""
        return self.call(
            lambda engine: {n: compat.tokens_so_far(engine, r.internal_id) for n, r in self._requests.items()}
        )

    def step_times(self) -> Future[dict[int, tuple[int, float]]]:
        """By requests that ran, queued ones included: how many steps, and their seconds in all; since the last call.

        A step's time is that from its start to the start of the next, so it holds whatever comes between two steps,
        except new weights.
        """

        def take(engine: Any) -> dict[int, tuple[int, float]]:
            taken, self._steps = self._steps, {}
            return taken

        return self.call(take)

    def start_version(self, engine: Any, version: int) -> None:
        """From here on tokens count as sampled with ``version``; to be called between steps, on the thread."""
        self.version = version
        self._step_began = None
        for request in self._requests.values():
            start = compat.tokens_so_far(engine, request.internal_id)
            if request.spans[-1][0] == start:  # no token was sampled with the version before
                request.spans.pop()
            request.spans.append((start, version))

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Processes of the engine's ranks; empty when the only one is in this process."""
        return () if self._watch is None else self._watch.pids

    @property
    def running(self) -> int:
        return len(self._requests)

    def stop(self, timeout_s: float) -> bool:
        """End the thread and free the engine; False if it did not end within ``timeout_s`` seconds."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._engine = self._build()
            self._watch = RankWatch(self._engine, self._rank_died)
        except BaseException as error:
            self.failure = error
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while self._run_commands():
                self._note_step()
                if self._requests:
                    with ranges.span("engine step"):
                        self._engine.step()
                    self._forget_finished()
            self._fail(self._cause(EngineFailed("the engine was stopped")))
        except BaseException as error:
            self._fail(self._cause(error))
        finally:
            self._watch.stop()
            engine, self._engine = self._engine, None
            compat.shut_down(engine)

    def _rank_died(self, which: str) -> None:
        """From the watch's thread: end the engine's, which may wait for a command or for the rank."""
        self._dead_rank = which
        self._commands.put(None)

    def _cause(self, error: BaseException) -> BaseException:
        """The error, or the end of the rank that it comes from."""
        assert self._watch is not None
        self._watch.settle()
        return error if self._dead_rank is None else RankDied(self._dead_rank)

    def _note_step(self) -> None:
        """The last step ends where the next begins; an engine without requests has none."""
        now, before = time.perf_counter(), self._step_began
        self._step_began = (len(self._requests), now) if self._requests else None
        if before is not None:
            running, began = before
            steps, seconds = self._steps.get(running, (0, 0.0))
            self._steps[running] = steps + 1, seconds + now - began

    def _run_commands(self) -> bool:
        """Run all commands that wait, and wait for one when there is nothing to step; False: stop."""
        while True:
            if not self._requests:
                self._note_step()
            try:
                command = self._commands.get(block=not self._requests)
            except queue.Empty:
                return True
            if command is None:
                return False
            future, function = command
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                cause = self._cause(error)
                if cause is not error:
                    cause.__cause__ = error
                future.set_exception(cause)

    def _forget_finished(self) -> None:
        for name in self._ended:
            self._requests.pop(name, None)
        self._ended.clear()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for request in self._requests.values():
            request.put(self._error())
        self._requests.clear()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None and command[0].set_running_or_notify_cancel():
                command[0].set_exception(self._error())

    def _error(self) -> EngineFailed:
        kind, why = (
            (RankDied, f"{self.failure}") if isinstance(self.failure, RankDied) else (EngineFailed, f"{self.failure!r}")
        )
        error = kind(f"the engine serves no more requests: {why}")
        error.__cause__ = self.failure
        return error
