"""What the generation service is given for an update that goes directly: engines take it so, or from its copy.

A direct transfer is a collective of trainer ranks and engines: an engine that starts later cannot have it again, and
the death of one breaks it for all. So each has a copy in the object store behind it, see ``rl.orchestration.transfer``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rl.rollout.config import Sampling
from rl.rollout.fleet import Engines
from rl.rollout.streams import GroupOfSamples
from rl.rollout.weights import Manifest, TornWeights
from rl.transfer import Path
from rl.transfer.links import TransferError
from rl.types import Prompt, Sample

logger = logging.getLogger(__name__)

Weights = tuple[list[Any], dict[str, tuple[int, ...]]]
"""Chunks and manifest, as ``GenerationService.update`` takes them."""


@dataclass(frozen=True)
class Payload:
    """What an update hands to the generation service.

    Attributes:
        chunks, manifest: for ``GenerationService.update``.
        path: how members take it.
    """

    chunks: list[Any]
    manifest: Mapping[str, tuple[int, ...]]
    path: Path


@dataclass(eq=False)
class Direct:
    """A chunk of :class:`Payload`: a direct transfer, and its copy in the object store.

    Attributes:
        chunk: what members are given instead of this.
        members: by engine, which of its processes takes part; each takes it once.
        copy: the same weights through the store; called when an engine needs them.
        generation: of the members, 0 without communicators.
    """

    chunk: Any
    members: dict[int, int]
    copy: Callable[[], Future[Weights]]
    generation: int = 0
    given: set[int] = field(default_factory=set)


class OnDemand:
    """A copy that is made when the first engine asks for it; the others get the same one, unless it failed. Any thread.

    Args:
        make: begins to make it.
    """

    def __init__(self, make: Callable[[], Future[Weights]]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._copy: Future[Weights] | None = None

    def __call__(self) -> Future[Weights]:
        with self._lock:
            failed = self._copy is not None and self._copy.done() and self._copy.exception() is not None
            if self._copy is None or failed:
                self._copy = self._make()
            return self._copy


class DirectEngines:
    """The pool as the generation service sees it: gives each engine an update directly or from its copy.

    Args:
        pool: the engines.
        broken: told the generation and the reason when a member of a transfer fails or goes.
        copy_s: longest time that a copy on demand may take, seconds: ranks make it after what they are doing.

    Attributes:
        fallbacks: updates of engines that came from the copy.
    """

    def __init__(
        self,
        pool: Engines,
        broken: Callable[[int, str], None] = lambda generation, reason: None,
        copy_s: float = 0.0,
    ) -> None:
        self.pool, self.broken = pool, broken
        self.config, self.version = pool.config, pool.version
        if copy_s:  # engines have their own limit from when they are given the copy
            self.config = replace(pool.config, update_timeout_s=pool.config.update_timeout_s + copy_s)
        self.fallbacks = 0
        self._lock = threading.Lock()
        self._processes = dict.fromkeys(pool.indices(), 0)
        self._up = set(pool.indices())
        self._under_way: dict[int, Direct] = {}

    def members(self) -> dict[int, int] | None:
        """``{engine: which of its processes}``; None while some engine starts."""
        with self._lock:
            return {i: self._processes[i] for i in sorted(self._up)} if self._up == set(self._processes) else None

    # ------------------------------------------------------------------ fleet.Engines

    def indices(self) -> list[int]:
        return self.pool.indices()

    def start_engine(self, index: int) -> Future[Any]:
        self._leave(index, f"engine {index} is replaced")
        with self._lock:
            process = self._processes[index] = self._processes.get(index, -1) + 1
        future = self.pool.start_engine(index)

        def came_up(done: Future[Any]) -> None:
            with self._lock:
                if done.exception() is None and self._processes.get(index) == process:
                    self._up.add(index)

        future.add_done_callback(came_up)
        return future

    def generate_on(
        self, index: int, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> Future[GroupOfSamples]:
        return self.pool.generate_on(index, prompt, sample_ids, sampling, seed)

    def continue_on(
        self, index: int, samples: Sequence[Sample], sampling: Sampling, seed: int
    ) -> Future[GroupOfSamples]:
        return self.pool.continue_on(index, samples, sampling, seed)

    def unfinished_on(self, index: int, sample_ids: Sequence[str]) -> Future[dict[str, int]]:
        return self.pool.unfinished_on(index, sample_ids)

    def finished_on(self, index: int, sample_ids: Sequence[str]) -> Future[list[Sample]]:
        return self.pool.finished_on(index, sample_ids)

    def abort_on(self, index: int, sample_ids: Sequence[str]) -> Future[int]:
        return self.pool.abort_on(index, sample_ids)

    def stop_engine(self, index: int) -> Future[Any]:
        self._leave(index, f"engine {index} leaves")
        return self.pool.stop_engine(index)

    def kill_engine(self, index: int) -> None:
        self._leave(index, f"engine {index} was ended")
        with self._lock:
            self._processes.pop(index, None)
        self.pool.kill_engine(index)

    def update_on(
        self,
        index: int,
        version: int,
        chunks: Sequence[Any],
        manifest: Manifest,
        in_flight: Literal["refuse", "continue"],
    ) -> Future[float]:
        """As the pool's; a :class:`Direct` chunk comes directly or from its copy."""
        if not chunks or not isinstance(chunks[0], Direct):
            return self.pool.update_on(index, version, chunks, manifest, in_flight)
        direct, result = chunks[0], Future[float]()

        def from_copy(reason: str) -> None:
            with self._lock:
                self.fallbacks += 1
            logger.warning("engine %d takes weights of version %d from the object store: %s", index, version, reason)
            try:
                direct.copy().add_done_callback(send_copy)
            except Exception as error:
                result.set_exception(error)

        def send_copy(copy: Future[Weights]) -> None:
            try:
                future = self.pool.update_on(index, version, *copy.result(), in_flight)
            except BaseException as error:
                result.set_exception(error)
                return
            future.add_done_callback(lambda done: _pass_on(done, result))

        def answered(done: Future[float]) -> None:
            with self._lock:
                self._under_way.pop(index, None)
            error = done.exception()
            if error is not None:
                self.broken(direct.generation, f"engine {index}: {error}")
            if isinstance(error, (TornWeights, TransferError)):
                from_copy(str(error))
            else:
                _pass_on(done, result)

        with self._lock:
            joined = direct.members.get(index) == self._processes.get(index) and index not in direct.given
            if joined:
                direct.given.add(index)
                self._under_way[index] = direct
        if joined:
            self.pool.update_on(index, version, [direct.chunk], manifest, in_flight).add_done_callback(answered)
        else:
            from_copy("its process was no member of the direct transfer")
        return result

    def _leave(self, index: int, reason: str) -> None:
        """What the engine was to take part in cannot succeed: the others shall not wait for it."""
        with self._lock:
            direct = self._under_way.pop(index, None)
            self._up.discard(index)
        if direct is not None:
            self.broken(direct.generation, reason)


def _pass_on(done: Future[Any], to: Future[Any]) -> None:
    error = done.exception()
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())
