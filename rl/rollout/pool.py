"""Several rollout engines as Ray actors, behind one object.

    with EnginePool(config, engines=2) as pool:
        for group in pool.generate(prompts, 8, Sampling(max_tokens=256), seed=7):
            ...
        pool.update_weights(1, chunks, manifest)

A group (all samples of one prompt) goes to the engine with the fewest samples outstanding, and comes back as soon as
it is complete. Engines get new groups only while they have room, so that a slow one does not hoard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import ray

from rl.rollout.config import EngineConfig, Sampling, engine_environment
from rl.rollout.engine import EngineInfo, EngineTimeout, RolloutEngine
from rl.rollout.validation import RefusedSample
from rl.rollout.weights import Manifest
from rl.types import Prompt, Sample

_CALLS_PER_ENGINE = 1024  # concurrent calls that an actor takes; the engine itself queues what it has no seat for
_FILL = 2  # samples outstanding at an engine, in units of its max_num_seqs, so that it never idles between groups


class EngineDied(RuntimeError):
    """The process of an engine ended; the message names it and what it was doing."""


@dataclass(frozen=True)
class Group:
    """All samples of one prompt, as asked for."""

    prompt: Prompt
    sample_ids: tuple[str, ...]


class EnginePool:
    """Start and drive engines.

    Args:
        config: of every engine; each gets ``seed + index``.
        engines: how many.
        environment: additional environment variables of the actors.

    Raises:
        EngineTimeout, EngineDied: an engine did not come up; those that did are stopped.
    """

    def __init__(self, config: EngineConfig, engines: int = 1, environment: dict[str, str] | None = None) -> None:
        if engines < 1:
            raise ValueError(f"engines must be >= 1, got {engines}")
        self.config = config
        self.engines = engines
        actor = ray.remote(RolloutEngine).options(
            num_cpus=1,
            num_gpus=config.tensor_parallel if config.device == "cuda" else 0,
            max_concurrency=_CALLS_PER_ENGINE,
            max_restarts=0,
            runtime_env={"env_vars": engine_environment(config.device) | (environment or {})},
        )
        self.handles = [actor.remote(replace(config, seed=config.seed + i), i) for i in range(engines)]
        self._outstanding = [0] * engines
        try:
            self.infos: list[EngineInfo] = self._all(
                [handle.start.remote() for handle in self.handles], config.start_timeout_s, "its start"
            )
        except BaseException:
            self.stop()
            raise

    @property
    def info(self) -> EngineInfo:
        """What the engines are; they are all alike."""
        return self.infos[0]

    # ------------------------------------------------------------------ generation

    def generate(
        self, prompts: Sequence[Prompt], n_samples: int, sampling: Sampling, seed: int
    ) -> Iterator[list[Sample | RefusedSample]]:
        """Draw ``n_samples`` of every prompt; yields one list per prompt, in the order they complete.

        Sample ids are ``"<prompt uid>/<k>"``. Stopping the iteration early aborts what still runs.

        Raises:
            EngineTimeout: no group completed within ``generate_timeout_s``.
            EngineDied: an engine's process ended.
        """
        waiting = list(reversed(make_groups(prompts, n_samples)))
        running: dict[ray.ObjectRef, tuple[int, Group]] = {}
        try:
            while waiting or running:
                self._dispatch(waiting, running, sampling, seed)
                yield self._next(running)
        finally:
            for engine, group in running.values():
                self._outstanding[engine] -= len(group.sample_ids)
                if self.handles:
                    self.handles[engine].abort.remote(list(group.sample_ids))

    async def agenerate(
        self, prompts: Sequence[Prompt], n_samples: int, sampling: Sampling, seed: int
    ) -> AsyncIterator[list[Sample | RefusedSample]]:
        """:meth:`generate` for callers in an event loop; the waiting happens in a thread."""
        groups = self.generate(prompts, n_samples, sampling, seed)
        try:
            while (group := await asyncio.to_thread(next, groups, None)) is not None:
                yield group
        finally:
            groups.close()

    def _dispatch(
        self,
        waiting: list[Group],
        running: dict[ray.ObjectRef, tuple[int, Group]],
        sampling: Sampling,
        seed: int,
    ) -> None:
        """Hand out groups while the least loaded engine has room; an idle engine always has."""
        room = _FILL * self.config.max_num_seqs
        while waiting:
            engine = min(range(self.engines), key=lambda i: (self._outstanding[i], i))
            size = len(waiting[-1].sample_ids)
            if self._outstanding[engine] and self._outstanding[engine] + size > room:
                return
            group = waiting.pop()
            self._outstanding[engine] += size
            reference = self.handles[engine].generate.remote(group.prompt, list(group.sample_ids), sampling, seed)
            running[reference] = (engine, group)

    def _next(self, running: dict[ray.ObjectRef, tuple[int, Group]]) -> list[Sample | RefusedSample]:
        limit = self.config.generate_timeout_s
        done, _ = ray.wait(list(running), num_returns=1, timeout=limit)
        if not done:
            engine, group = next(iter(running.values()))
            raise EngineTimeout(
                f"no group of samples completed within {limit:g} s; the longest wait is for engine {engine}, "
                f"prompt {group.prompt.uid}; raise generate_timeout_s or lower max_tokens"
            )
        engine, group = running.pop(done[0])
        self._outstanding[engine] -= len(group.sample_ids)
        return self._get(done[0], engine, limit, f"samples of prompt {group.prompt.uid}")

    # ------------------------------------------------------------------ everything else

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
        calls = [handle.update_weights.remote(version, list(chunks), manifest, in_flight) for handle in self.handles]
        self._all(calls, self.config.update_timeout_s, f"the weight update to version {version}")
        return time.monotonic() - started

    def abort(self, sample_ids: Sequence[str]) -> int:
        """End samples now, wherever they run; returns how many did."""
        calls = [handle.abort.remote(list(sample_ids)) for handle in self.handles]
        return sum(self._all(calls, self.config.update_timeout_s, "aborting samples"))

    def health(self) -> list[dict[str, Any]]:
        """One entry per engine, see ``RolloutEngine.health``."""
        return self._all([h.health.remote() for h in self.handles], self.config.stop_timeout_s, "its health")

    def stop(self) -> None:
        """Stop all engines, those that hang by force; calling it again does nothing."""
        handles, self.handles = self.handles, []
        limit = self.config.stop_timeout_s
        calls = [handle.stop.remote() for handle in handles]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=limit)
        for handle in handles:
            ray.kill(handle, no_restart=True)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _all(self, calls: Sequence[ray.ObjectRef], limit_s: float, what: str) -> list[Any]:
        """Results of one call per engine, within one limit for all."""
        deadline = time.monotonic() + limit_s
        # What fails first is reported first: a dead engine must not hide behind a slow one.
        pending = {call: engine for engine, call in enumerate(calls)}
        results: dict[int, Any] = {}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                names = ", ".join(str(engine) for engine in pending.values())
                raise EngineTimeout(f"engine {names}: waited {limit_s:g} s for {what}")
            engine = pending.pop(done[0])
            results[engine] = self._get(done[0], engine, limit_s, what)
        return [results[engine] for engine in sorted(results)]

    def _get(self, reference: ray.ObjectRef, engine: int, limit_s: float, what: str) -> Any:
        try:
            return ray.get(reference, timeout=limit_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineTimeout(f"engine {engine}: waited {limit_s:g} s for {what}") from error
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise EngineDied(f"engine {engine} died while we waited for {what}: {error}") from error
        except ray.exceptions.RayTaskError as error:
            # The actor's own exception, without Ray's wrapping in the message; its traceback is in the cause.
            raise (error.cause if isinstance(error.cause, Exception) else error) from error


def make_groups(prompts: Sequence[Prompt], n_samples: int) -> list[Group]:
    """One group per prompt, with the ids of its samples."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be >= 1, got {n_samples}")
    return [Group(p, tuple(f"{p.uid}/{k}" for k in range(n_samples))) for p in prompts]
