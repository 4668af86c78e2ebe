"""The generation service: weights in, groups of samples out, while engines come, go and die.

    with GenerationService(pool, dispatch=get_dispatch("longest_first"), predictor=predictor) as service:
        with service.generate(prompts, 8, Sampling(max_tokens=256), seed=7, buffer_groups=4) as stream:
            for group in stream:                          # whole groups, in the order they complete
                ...
        update = service.update(1, chunks, manifest, "continue")   # returns at once
        update.result(60).seconds

Several streams may run at the same time; groups that were asked for first go first. When the process of an engine
dies, its groups are generated again, by other engines or by the process that takes its place: every prompt comes
exactly once. See ``dispatcher`` for how.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.rollout import weights
from rl.rollout.config import Sampling
from rl.rollout.dispatch import Dispatch, WaitingGroup, get_dispatch
from rl.rollout.dispatcher import Dispatcher, OnSpan, ServiceStopped
from rl.rollout.fleet import EngineDied, EngineRecord, Engines, InFlight, PendingGroup, Update, UpdateReport
from rl.rollout.streams import GroupStream, TailReport, make_groups
from rl.rollout.tail import TailRule
from rl.types import Prompt

if TYPE_CHECKING:
    from rl.rollout.predictors import LengthPredictor

__all__ = [
    "EngineDied",
    "Engines",
    "GenerationService",
    "GroupStream",
    "InFlight",
    "OnSpan",
    "ServiceStopped",
    "TailReport",
    "TailRule",
    "UpdateReport",
]


def _no_span(*args: Any) -> None:
    pass


class GenerationService:
    """See the module's docstring.

    Its methods may be called from any thread. It does not stop the engines that it was given; who made them does, after
    the service was stopped. While it lives, samples and weights go to the engines through it only.

    Args:
        pool: the engines, e.g. an ``EnginePool``.
        dispatch: which group goes to which engine; None: first come, first served.
        predictor: of response lengths, for policies that use them; it is told every group's lengths.
        max_restarts: processes of engines that may be replaced, altogether. With the next death the service ends:
            ``EngineDied``, naming the engine, is what every stream and every later call raises.
        on_span: told every group and update of every engine for a time line, see ``OnSpan``.
    """

    def __init__(
        self,
        pool: Engines,
        *,
        dispatch: Dispatch | None = None,
        predictor: LengthPredictor | None = None,
        max_restarts: int = 3,
        on_span: OnSpan | None = None,
    ) -> None:
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be >= 0, got {max_restarts}")
        self.pool = pool
        self.predictor = predictor
        # Streams are predicted for by who asks for them, lengths are observed by the dispatcher's thread.
        self._predicting = threading.Lock()
        self._dispatcher = Dispatcher(
            pool, dispatch or get_dispatch("fcfs"), self._observe, max_restarts, on_span or _no_span
        )

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Sequence[Prompt],
        n_samples: int,
        sampling: Sampling,
        seed: int,
        *,
        buffer_groups: int | None = None,
        tail: TailRule | None = None,
    ) -> GroupStream:
        """Draw ``n_samples`` of every prompt; returns at once.

        Args:
            prompts: what to answer; uids are unique.
            n_samples: of each.
            sampling: how to draw.
            seed: the same (seed, sample id) draws with the same random stream, whatever engine and however often.
            buffer_groups: while so many complete groups of this stream wait to be taken, no more of its groups are
                started; those that run may still add to them. None: no bound.
            tail: gather the last samples on few engines, see ``gathering``; None: they stay where they are.

        Returns:
            A stream of ``list[Sample | RefusedSample]``, one per prompt, in the order they complete.

        Raises:
            ServiceStopped, EngineDied: the service has ended.
        """
        self._check_alive()
        groups = make_groups(prompts, n_samples)
        config = self.pool.config
        limit_s = config.generate_timeout_s + config.update_timeout_s + config.start_timeout_s + config.stop_timeout_s
        dispatcher = self._dispatcher
        stream = GroupStream(
            len(groups),
            buffer_groups,
            limit_s,
            progress=lambda: dispatcher.last_completed,
            wake=(lambda: None) if buffer_groups is None else lambda: dispatcher.post(lambda: None),
            close=lambda stream: dispatcher.post(lambda: dispatcher.close(stream)),
        )
        # A length-aware policy must not start the long groups of a later stream before the short ones of this.
        batch = dispatcher.next_order()
        pending = []
        for group, tokens in zip(groups, self._predict(prompts), strict=True):
            view = WaitingGroup(group.prompt.uid, dispatcher.next_order(), n_samples, tokens, batch)
            pending.append(PendingGroup(stream, group, sampling, seed, view))
        dispatcher.post(lambda: dispatcher.submit(stream, pending, tail), stream.end)
        return stream

    def _predict(self, prompts: Sequence[Prompt]) -> list[float | None]:
        if self.predictor is None or not prompts:
            return [None] * len(prompts)
        with self._predicting:
            tokens = self.predictor.predict(prompts)
        return [float(value) if np.isfinite(value) else None for value in tokens]

    def _observe(self, prompt: Prompt, lengths: Sequence[int]) -> None:
        if self.predictor is not None and lengths:
            with self._predicting:
                self.predictor.observe(prompt, lengths)

    # ------------------------------------------------------------------ weights

    def update(
        self,
        version: int,
        chunks: Sequence[Any],
        manifest: weights.Manifest | None = None,
        in_flight: InFlight = "finish",
    ) -> Future[UpdateReport]:
        """New weights for every engine; returns at once. Groups that engines get afterwards are sampled with them.

        Args:
            version: at least that of the update before.
            chunks, manifest: as in ``RolloutEngine.update_weights``. They are kept until the next update, for engines
                that start later.
            in_flight: "finish": every engine, each for itself, finishes the groups that it has, is updated and goes
                on. "continue": it is updated between two steps, and samples go on with the tokens they have.

        Returns:
            Resolves when every engine has the weights, or has newer ones because another update came before this one
            had begun there. Fails with the first of: ``WeightMismatch`` and ``TornWeights`` of
            ``RolloutEngine.update_weights``, ``EngineTimeout``, ``ValueError`` for an older version.
        """
        if in_flight not in ("finish", "continue"):
            raise ValueError(f'in_flight must be "finish" or "continue", got {in_flight!r}')
        manifest = weights.manifest_of(chunks) if manifest is None else manifest
        future: Future[UpdateReport] = _started_future()
        update = Update(version, chunks, manifest, in_flight, future)
        self._dispatcher.post(lambda: self._dispatcher.update(update), update.failed)
        return future

    def version_of(self, engine: int) -> int | None:
        """Version of the weights of an engine; None while a new process has not got the newest yet."""
        return self._record(engine).version

    # ------------------------------------------------------------------ engines

    @property
    def engines(self) -> list[int]:
        """Indices of the engines, those that start or leave included."""
        return sorted(self._dispatcher.records)

    @property
    def restarts(self) -> int:
        """Processes of engines that were replaced so far."""
        return self._dispatcher.max_restarts - self._dispatcher.restarts_left

    def add_engine(self) -> Future[int]:
        """Start one more engine in the background; resolves to its index once it has the newest weights and serves.

        Indices are never used again. Fails with the engine's error if it does not come up; the service goes on.
        """
        future: Future[int] = _started_future()
        self._dispatcher.post(partial(self._dispatcher.add, future), future.set_exception)
        return future

    def remove_engine(self, index: int) -> Future[None]:
        """Let an engine finish what it has and stop it; resolves when it is gone. Its routes can still be fetched.

        Fails with ``ValueError`` if there is no such engine, or no other.
        """
        future: Future[None] = _started_future()
        self._dispatcher.post(partial(self._dispatcher.remove, index, future), future.set_exception)
        return future

    def engine_speed(self) -> dict[int, float | None]:
        """Response tokens per busy second of every engine, an average of the last minute; None: not yet known."""
        return {i: record.meter.tokens_per_second for i, record in list(self._dispatcher.records.items())}

    def busy_seconds(self, engine: int) -> float:
        """Seconds in which the engine held at least one group, since the service began."""
        return self._record(engine).meter.busy_seconds

    def held_since(self, engine: int) -> float | None:
        """When the oldest group that the engine holds was sent to it (``time.time()``); None: it holds none."""
        return min((sent for _, sent in list(self._record(engine).running.values())), default=None)

    def _record(self, engine: int) -> EngineRecord:
        record = self._dispatcher.records.get(engine)
        if record is None:
            raise ValueError(f"expected one of the engines {self.engines}, got {engine}")
        return record

    # ------------------------------------------------------------------ life

    def stop(self) -> None:
        """End the service: streams and updates fail with ``ServiceStopped``. Calling it again does nothing.

        Raises:
            TimeoutError: its thread did not end within ``stop_timeout_s``.
        """
        limit_s = self.pool.config.stop_timeout_s
        if not self._dispatcher.stop(limit_s):
            raise TimeoutError(f"the thread of the generation service did not end within {limit_s:g} s")

    def _check_alive(self) -> None:
        if self._dispatcher.failure is not None:
            raise self._dispatcher.failure

    def __enter__(self) -> GenerationService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _started_future() -> Future[Any]:
    """A future that its holder cannot cancel."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
