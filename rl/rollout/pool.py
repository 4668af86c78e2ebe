"""Several rollout engines as Ray actors, behind one object.

    with EnginePool(config, engines=2) as pool:
        for group in pool.generate(prompts, 8, Sampling(max_tokens=256), seed=7):
            ...
        pool.update_weights(1, chunks, manifest)

A group (all samples of one prompt) comes back as soon as it is complete. Who generates what is decided by a
``GenerationService``: that of :meth:`EnginePool.generate` is a plain one, first come, first served, which gives up when
an engine dies. For more, make one over the pool:

    with GenerationService(pool, dispatch=..., max_restarts=3) as service: ...
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import ray

from megatron_ultraep.runtime.profiler import ProfileSettings
from rl.rollout.actor import EngineActor, call_apart, with_rows
from rl.rollout.config import EngineConfig, Sampling, engine_environment
from rl.rollout.engine import EngineInfo, EngineTimeout
from rl.rollout.fleet import EngineDied
from rl.rollout.service import GenerationService
from rl.rollout.stepper import RankDied
from rl.rollout.streams import GroupOfSamples
from rl.rollout.weights import Manifest
from rl.shared_gpus import SharedGpus
from rl.types import Prompt, Sample

__all__ = ["EngineDied", "EnginePool"]

_log = logging.getLogger(__name__)

_STEP_TIMES_S = 5.0  # a metric is not worth waiting for
_CALLS_PER_ENGINE = 1024  # concurrent calls that an actor takes; the engine itself queues what it has no seat for


class EnginePool:
    """Start and drive engines.

    Args:
        config: of every engine; each gets ``seed + index``.
        engines: how many.
        environment: additional environment variables of the actors.
        share: GPUs shared with trainer ranks, engine i on the i-th; None: GPUs of their own.

    Attributes:
        handles: of the actors by index, None where an engine was removed; always the same list, so that who holds it
            sees engines come and go.
        infos: what each engine is, by index.
        version: of the weights that all engines got at last through this pool.

    Raises:
        ValueError: no node has as many GPUs as an engine has ranks.
        EngineTimeout, EngineDied: an engine did not come up; those that did are stopped.
    """

    def __init__(
        self,
        config: EngineConfig,
        engines: int = 1,
        environment: dict[str, str] | None = None,
        share: SharedGpus | None = None,
    ) -> None:
        if engines < 1:
            raise ValueError(f"engines must be >= 1, got {engines}")
        if config.device == "cuda" and share is None:
            _check_nodes(config.tensor_parallel)
        self.config = config
        self.version = config.initial_version
        self.handles: list[Any] = []
        self.infos: dict[int, EngineInfo] = {}
        self._stopped = False
        self._share = share
        self._service: GenerationService | None = None
        self._options: dict[str, Any] = {
            "num_cpus": config.tensor_parallel,
            "num_gpus": config.tensor_parallel if config.device == "cuda" else 0,
            "max_concurrency": _CALLS_PER_ENGINE,
            "max_restarts": 0,
            "runtime_env": {"env_vars": engine_environment(config.device) | (environment or {})},
        }
        try:
            calls = {index: self._make(index).start.remote() for index in range(engines)}
            self.infos = self._all(calls, config.start_timeout_s, "its start")
        except BaseException:
            self.stop()
            raise

    @property
    def info(self) -> EngineInfo:
        """What the engines are; they are all alike."""
        return next(iter(self.infos.values()))

    @property
    def engines(self) -> int:
        """How many there are."""
        return len(self.indices())

    # ------------------------------------------------------------------ generation

    def generate(
        self, prompts: Sequence[Prompt], n_samples: int, sampling: Sampling, seed: int
    ) -> Iterator[GroupOfSamples]:
        """Draw ``n_samples`` of every prompt; yields one list per prompt, in the order they complete.

        Sample ids are ``"<prompt uid>/<k>"``. Stopping the iteration early aborts what still runs.

        Raises:
            EngineTimeout: a group did not complete within ``generate_timeout_s``.
            EngineDied: an engine's process ended.
        """
        if self._service is None:
            self._service = GenerationService(self, max_restarts=0)
        with self._service.generate(prompts, n_samples, sampling, seed) as stream:
            yield from stream

    async def agenerate(
        self, prompts: Sequence[Prompt], n_samples: int, sampling: Sampling, seed: int
    ) -> AsyncIterator[GroupOfSamples]:
        """:meth:`generate` for callers in an event loop; the waiting happens in a thread."""
        groups = self.generate(prompts, n_samples, sampling, seed)
        try:
            while (group := await asyncio.to_thread(next, groups, None)) is not None:
                yield group
        finally:
            groups.close()

    # ------------------------------------------------------------------ all engines

    def update_weights(
        self,
        version: int,
        chunks: Sequence[Any],
        manifest: Manifest | None = None,
        in_flight: Literal["refuse", "continue"] = "refuse",
    ) -> float:
        """New weights into all engines at the same time; returns the seconds until the last has them.

        Arguments as in ``RolloutEngine.update_weights``; chunks as Ray references are sent once, whatever the
        number of engines.
        """
        started = time.monotonic()
        arguments = (version, list(chunks), manifest, in_flight)
        calls = {index: self.handles[index].update_weights.remote(*arguments) for index in self.indices()}
        self._all(calls, self.config.update_timeout_s, f"the weight update to version {version}")
        self.version = version
        return time.monotonic() - started

    def sleep(self, keep_weights: bool = False, engines: Sequence[int] | None = None) -> float:
        """Engines, all by default, free their devices; see ``RolloutEngine.sleep``. Returns the slowest one's seconds.

        Those asleep already stay so. One that has died holds nothing: whoever calls it next finds out and replaces it.
        """
        chosen = [i for i in self.indices() if engines is None or i in engines]
        calls = {i: self.handles[i].sleep.remote(keep_weights) for i in chosen}
        slept = self._all(calls, self.config.update_timeout_s, "falling asleep", dead="passed over")
        return max(slept.values(), default=0.0)

    def wake(self, weights_only: bool = False) -> float:
        """All engines take their devices again; see ``RolloutEngine.wake``. Returns the slowest one's seconds.

        As in :meth:`sleep`, one that has died is for its next caller to find.
        """
        calls = {i: self.handles[i].wake.remote(weights_only) for i in self.indices()}
        woke = self._all(calls, self.config.update_timeout_s, "waking up", dead="passed over")
        return max(woke.values(), default=0.0)

    def abort(self, sample_ids: Sequence[str]) -> int:
        """End samples now, wherever they run; returns how many did."""
        calls = {index: self.handles[index].abort.remote(list(sample_ids)) for index in self.indices()}
        return sum(self._all(calls, self.config.update_timeout_s, "aborting samples").values())

    def health(self) -> list[dict[str, Any]]:
        """One entry per engine, see ``RolloutEngine.health``."""
        calls = {index: self.handles[index].health.remote() for index in self.indices()}
        return list(self._all(calls, self.config.stop_timeout_s, "its health").values())

    def profile(self, settings: ProfileSettings, paths: Mapping[int, Path]) -> None:
        """Begin a profiled window on some engines, see ``RolloutEngine.profile``; ``paths`` of their traces."""
        calls = {i: self._handle(i).profile.remote(settings, str(path)) for i, path in paths.items()}
        self._all(calls, self.config.update_timeout_s, "the start of a profiled window")

    def end_profile(self, engines: Sequence[int]) -> list[Path]:
        """End the window on those of these engines that are still there; the traces that were written."""
        calls = {i: self.handles[i].end_profile.remote() for i in engines if i in self.indices()}
        traces = self._all(calls, self.config.generate_timeout_s, "writing the trace of a profiled window")
        return [Path(trace) for trace in traces.values() if trace is not None]

    def stop(self) -> None:
        """Stop all engines, those that hang by force; calling it again does nothing."""
        self._stopped = True
        service, self._service = self._service, None
        try:
            if service is not None:
                service.stop()
        finally:
            handles = [handle for handle in self.handles if handle is not None]
            self.handles.clear()
            calls = [handle.stop.remote() for handle in handles]
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=self.config.stop_timeout_s)
            for handle in handles:
                ray.kill(handle, no_restart=True)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------ one engine, see fleet.Engines

    def indices(self) -> list[int]:
        """Indices of the engines."""
        return [index for index, handle in enumerate(self.handles) if handle is not None]

    def start_engine(self, index: int) -> Future[EngineInfo]:
        """A new process under this index; what is left of another under it is killed."""
        self.kill_engine(index)

        def came_up(info: EngineInfo) -> EngineInfo:
            self.infos[index] = info
            return info

        return _future(self._make(index).start.remote(), index, "its start", came_up)

    def generate_on(
        self, index: int, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> Future[GroupOfSamples]:
        """One group by one engine."""
        method = self._handle(index).generate_apart
        samples, rows = call_apart(method, prompt, list(sample_ids), sampling, seed)
        return _future(samples, index, f"samples of prompt {prompt.uid}", lambda value: with_rows(value, rows))

    def continue_on(
        self, index: int, samples: Sequence[Sample], sampling: Sampling, seed: int
    ) -> Future[GroupOfSamples]:
        """Aborted samples of one group go on at another engine, see ``RolloutEngine.continue_samples``."""
        method = self._handle(index).continue_apart
        answers, rows = call_apart(method, list(samples), sampling, seed)
        what = f"the rest of {len(samples)} samples of prompt {samples[0].prompt.uid}"
        return _future(answers, index, what, lambda value: with_rows(value, rows))

    def unfinished_on(self, index: int, sample_ids: Sequence[str]) -> Future[dict[str, int]]:
        """Response tokens so far of those samples of one engine that have not ended."""
        call = self._handle(index).unfinished.remote(list(sample_ids))
        return _future(call, index, "the progress of its samples")

    def finished_on(self, index: int, sample_ids: Sequence[str]) -> Future[list[Sample]]:
        """Those samples of one engine that have ended, of groups that still run."""
        method = self._handle(index).finished_apart
        samples, rows = call_apart(method, list(sample_ids))
        what = "samples that have ended"
        return _future(samples, index, what, lambda value: [s for s in with_rows(value, rows) if isinstance(s, Sample)])

    def step_times(self, indices: Sequence[int]) -> dict[int, dict[int, tuple[int, float]]]:
        """By engine: how many steps, and their seconds in all, by samples that ran; since the last call.

        Raises:
            EngineDied, EngineTimeout, RuntimeError: an engine is gone, or not up.
        """
        calls = {index: self._handle(index).step_times.remote() for index in indices}
        return self._all(calls, _STEP_TIMES_S, "the times of its steps")

    def update_on(
        self,
        index: int,
        version: int,
        chunks: Sequence[Any],
        manifest: Manifest,
        in_flight: Literal["refuse", "continue"],
    ) -> Future[float]:
        """New weights into one engine; resolves to the seconds that it took."""
        call = self._handle(index).update_weights.remote(version, list(chunks), manifest, in_flight)
        return _future(call, index, f"the weight update to version {version}")

    def abort_on(self, index: int, sample_ids: Sequence[str]) -> Future[int]:
        """End samples of one engine; resolves to how many ran."""
        return _future(self._handle(index).abort.remote(list(sample_ids)), index, "aborting samples")

    def stop_engine(self, index: int) -> Future[None]:
        """End an engine in order; its process stays until :meth:`kill_engine`."""
        return _future(self._handle(index).stop.remote(), index, "its end")

    def kill_engine(self, index: int) -> None:
        """End an engine's process whatever it does; without one, does nothing."""
        handle = self.handles[index] if index < len(self.handles) else None
        if handle is not None:
            self.handles[index] = None
            ray.kill(handle, no_restart=True)

    def _handle(self, index: int) -> Any:
        handle = self.handles[index] if index < len(self.handles) else None
        if handle is None:
            raise EngineDied(f"engine {index} was stopped: stop the generation service before its pool")
        return handle

    def _make(self, index: int) -> Any:
        if self._stopped:
            raise EngineDied(f"engine {index}: not started, the pool was stopped")
        place = {} if self._share is None else self._share.options(index)
        actor = ray.remote(EngineActor).options(**self._options | place)
        handle = actor.remote(replace(self.config, seed=self.config.seed + index), index)
        self.handles.extend([None] * (index + 1 - len(self.handles)))
        self.handles[index] = handle
        return handle

    # ------------------------------------------------------------------ waiting

    def _all(
        self,
        calls: dict[int, ray.ObjectRef],
        limit_s: float,
        what: str,
        dead: Literal["raise", "passed over"] = "raise",
    ) -> dict[int, Any]:
        """Results of one call per engine, within one limit for all; dead engines have none where they may be."""
        deadline = time.monotonic() + limit_s
        # What fails first is reported first: a dead engine must not hide behind a slow one.
        pending = {call: engine for engine, call in calls.items()}
        results: dict[int, Any] = {}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                names = ", ".join(str(engine) for engine in pending.values())
                raise EngineTimeout(f"engine {names}: waited {limit_s:g} s for {what}")
            engine = pending.pop(done[0])
            try:
                results[engine] = ray.get(done[0], timeout=limit_s)
            except ray.exceptions.GetTimeoutError as error:
                raise EngineTimeout(f"engine {engine}: waited {limit_s:g} s for {what}") from error
            except ray.exceptions.RayError as error:
                translated = _translated(error, engine, what)
                if not isinstance(translated, EngineDied) or dead == "raise":
                    raise translated from error
                _log.warning("%s", translated)
        return dict(sorted(results.items()))


def _check_nodes(ranks: int) -> None:
    """An engine's ranks are children of its process: see that some node has GPUs for all, which Ray would wait for."""
    most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if most < ranks:
        raise ValueError(
            f"an engine of {ranks} ranks must fit on one node: expected a node with {ranks} GPUs, the largest of Ray's "
            f"has {most:g}; lower rollout.tensor_parallel"
        )


def _future(
    reference: ray.ObjectRef, engine: int, what: str, then: Callable[[Any], Any] = lambda value: value
) -> Future[Any]:
    """``then(result)`` of a call to an engine, or our own exceptions."""
    future: Future[Any] = Future()

    def done(inner: Future[Any]) -> None:
        try:
            future.set_result(then(inner.result()))
        except BaseException as error:
            translated = _translated(error, engine, what)
            if translated is not error:
                translated.__cause__ = error
            future.set_exception(translated)

    reference.future().add_done_callback(done)
    return future


def _translated(error: BaseException, engine: int, what: str) -> BaseException:
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RankDied):
        return EngineDied(f"engine {engine} died while we waited for {what}: {error.cause}")
    if isinstance(error, ray.exceptions.RayTaskError):
        # The actor's own exception, without Ray's wrapping in the message; its traceback is in the cause.
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)):
        return EngineDied(f"engine {engine} died while we waited for {what}: {error}")
    return error
