"""Trainer's weights into engines: through Ray's object store, or directly (``stream.transfer``).

A direct transfer is a collective of trainer ranks and engines: an engine that starts later cannot have it again, and
the death of one breaks it for all. So every direct transfer has a copy in the object store behind it, which ranks make
after they have handed their share over, and which engines that were no members, or whose transfer broke off, take
instead. The next version makes the set of members anew and goes directly again. The generation service sees one update
per version, whichever way its engines take it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ray
import torch.distributed as dist

from rl.config import RunConfig
from rl.rollout.config import Sampling
from rl.rollout.dispatcher import OnSpan
from rl.rollout.fleet import Engines
from rl.rollout.pool import EnginePool
from rl.rollout.service import UpdateReport
from rl.rollout.streams import GroupOfSamples
from rl.rollout.weights import Manifest, TornWeights
from rl.timeline import TRANSFER
from rl.training.group import Trainer, TrainerDied, TrainerTimeout
from rl.transfer import Path
from rl.transfer.links import Limits, Membership, Rendezvous, TransferError, source_name
from rl.transfer.plan import TransferPlan, plan_transfer
from rl.transfer.receiver import Incoming, receiver_names
from rl.transfer.sender import SendReport
from rl.types import Prompt, Sample

if TYPE_CHECKING:
    from rl.orchestration.setup import Run

logger = logging.getLogger(__name__)

_BUCKET_BYTES = 64 * 2**20

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
        copy: the same weights through the store.
        generation: of the members, 0 without communicators.
    """

    chunk: Any
    members: dict[int, int]
    copy: Future[Weights]
    generation: int = 0
    given: set[int] = field(default_factory=set)


class DirectEngines:
    """The pool as the generation service sees it: gives each engine an update directly or from its copy.

    Args:
        pool: the engines.
        broken: told the generation and the reason when a member of a transfer fails or goes.

    Attributes:
        fallbacks: updates of engines that came from the copy.
    """

    def __init__(self, pool: Engines, broken: Callable[[int, str], None] = lambda generation, reason: None) -> None:
        self.pool, self.broken = pool, broken
        self.config, self.version = pool.config, pool.version
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
            direct.copy.add_done_callback(send_copy)

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


class WeightTransfer:
    """Makes of the trainer's weights what the generation service sends to engines.

    Args:
        config: of the run.
        pool, trainer: both ends.
        on_span: told on track ``transfer`` when members joined.

    Attributes:
        path: how weights travel when nothing is in the way.
        engines: what the generation service must be given in place of the pool.
    """

    def __init__(self, config: RunConfig, pool: EnginePool, trainer: Trainer, on_span: OnSpan) -> None:
        self.path: Path = config.transfer_path
        self.engines = DirectEngines(pool, self._broken)
        self._pool, self._trainer, self._on_span = pool, trainer, on_span
        self._dtype = config.engine_dtype
        self._experts_move = config.balance.enabled and config.balance.reorder
        # Shorter than the engines' own limit of an update, within which they take the copy if this fails.
        limit = config.run.limits.weight_update_s / 4
        self._limits = Limits(join_s=limit, start_s=limit, bucket_s=limit)
        self._rendezvous = Rendezvous(ray.util.get_node_ip_address()) if self.path in ("gloo", "nccl") else None
        self._plan: TransferPlan | None = None
        self._membership: Membership | None = None
        self._members: dict[int, int] = {}
        self._failed: set[int] = set()
        self._copies = ThreadPoolExecutor(1, "weight-copy")

    def prepare(self, *, settled: bool) -> Payload:
        """Begin to hand the trainer's weights over; afterwards the trainer may change them.

        Args:
            settled: every engine has the weights of the update before.

        Returns:
            for ``GenerationService.update``, which must be called at once: trainer ranks wait for the engines.

        Raises:
            TrainerDied, TrainerTimeout: a rank could not do its part.
        """
        if self.path == "ipc":
            (handles,) = self._ranks("share", self._dtype)
            direct = Direct(handles, self.engines.members() or {}, self._copy())
            return Payload([direct], handles.manifest, "ipc")
        if self.path != "store":
            try:
                return self._start_direct(settled)
            except TransferError as error:
                logger.warning("weights go through the object store this time, not by %s: %s", self.path, error)
                self.engines.fallbacks += 1
        chunks, manifest = self._trainer.export(self._dtype)
        return Payload(chunks, manifest, "store")

    def release(self) -> None:
        """Every engine has read what the trainer shares with it on its GPU."""
        self._ranks("release_shared")

    def close(self) -> None:
        """Wait for no copy any more."""
        self._copies.shutdown(wait=False, cancel_futures=True)

    def _start_direct(self, settled: bool) -> Payload:
        self._finish_sending()
        members = self.engines.members()
        if not settled or not members:
            raise TransferError("an engine starts, or is still at the update before")
        self._join(members)
        assert self._plan is not None
        assert self._membership is not None
        self._ranks("transfer_send", self._plan, "device", generation=self._membership.generation)
        direct = Direct(Incoming(self._plan), members, self._copy(), self._membership.generation)
        return Payload([direct], self._plan.manifest, self.path)

    def _finish_sending(self) -> None:
        """Trainer ranks have sent their copies of the version before, or say what went wrong."""
        if self._plan is None:
            return
        limit_s = self._limits.start_s
        reports: list[SendReport | None] = self._ranks(
            "transfer_finish", limit_s, limit_s=limit_s + self._limits.join_s
        )
        for rank, report in enumerate(reports):
            if report is not None:
                args = {"bytes": report.nbytes, "buckets": report.buckets, "waited_for_engines_s": report.ready_s}
                self._on_span(TRANSFER, f"sent by rank {rank}", report.started, report.ended, args)

    def _join(self, members: dict[int, int]) -> None:
        """A plan, and communicators of its sources and these engines, unless those of before will do."""
        if self._plan is None or self._experts_move:
            plan = plan_transfer(self._ranks("transfer_announce", self._dtype), _BUCKET_BYTES)
            if self._plan is None or plan.ranks != self._plan.ranks:
                self._membership = None
            self._plan = plan
        broken = self._membership is not None and self._membership.generation in self._failed
        if self._membership is not None and not broken and members == self._members:
            return
        assert self._rendezvous is not None
        began = time.time()
        membership = self._rendezvous.generation(
            [source_name(rank) for rank in self._plan.ranks],
            receiver_names(sorted(members), self._pool.config.tensor_parallel),
            "nccl" if self.path == "nccl" else "gloo",
            self._limits,
        )
        self._membership = None
        engines = {index: self._pool.handles[index] for index in members}
        joining = {f"engine {i}": h.transfer_join.remote(membership) for i, h in engines.items() if h is not None}
        joining |= {
            f"trainer rank {r}": h.transfer_join.remote(membership) for r, h in enumerate(self._trainer.handles)
        }
        self._wait(joining, "joining a weight transfer", 2 * self._limits.join_s, membership.generation)
        self._membership, self._members = membership, members
        args = {"generation": membership.generation, "engines": len(members), "sources": len(self._plan.ranks)}
        self._on_span(TRANSFER, "join", began, time.time(), args)

    def _broken(self, generation: int, reason: str) -> None:
        """End the waits of a generation's members; it is not used again. Any thread."""
        if self._rendezvous is not None and generation not in self._failed:
            self._failed.add(generation)
            dist.PrefixStore(f"transfer/{generation}", self._rendezvous.store).compare_set("failed", "", reason)

    def _copy(self) -> Future[Weights]:
        """Have ranks copy today's weights to the object store when they have time; before anything they do later."""
        limit_s = self._trainer.limits.step_s
        calls = [handle.export.remote(self._dtype) for handle in self._trainer.handles]

        def collect() -> Weights:
            chunks: list[Any] = []
            manifest: dict[str, tuple[int, ...]] = {}
            named = {f"trainer rank {rank}": call for rank, call in enumerate(calls)}
            for buckets in self._wait(named, "copying weights to the object store", limit_s):
                for reference, shapes in buckets:
                    chunks.append(reference)
                    manifest |= shapes
            return chunks, manifest

        return self._copies.submit(collect)

    def _ranks(self, name: str, *args: Any, limit_s: float | None = None, generation: int | None = None) -> list[Any]:
        calls = {f"trainer rank {r}": getattr(h, name).remote(*args) for r, h in enumerate(self._trainer.handles)}
        return self._wait(calls, name, limit_s or self._trainer.limits.step_s, generation)

    def _wait(self, calls: Mapping[str, Any], what: str, limit_s: float, generation: int | None = None) -> list[Any]:
        """Results by member.

        Raises:
            TransferError: a member met one, or an engine died.
            TrainerDied, TrainerTimeout: naming the rank.
        """
        deadline = time.monotonic() + limit_s
        who = {call: name for name, call in calls.items()}
        waiting, failure = list(who), None
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = ", ".join(who[call] for call in waiting)
                raise failure or TrainerTimeout(f"{late} did not finish {what} within {limit_s:g} s")
            try:
                ray.get(done[0])
            except ray.exceptions.RayError as error:
                found = _translated(error, who[done[0]], what)
                failure = failure or found
                if generation is not None:
                    self._broken(generation, str(found))
        if failure is not None:
            self._membership = None
            raise failure
        return ray.get(list(who))


def _translated(error: Exception, who: str, what: str) -> Exception:
    """A failure of the transfer is survived; the trainer's own is not."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (TransferError, TimeoutError)) or who.startswith("engine"):
        return TransferError(f"{who} failed at {what}: {cause or error}")
    return TrainerDied(f"{who} failed at {what}: {error}")


def send_weights(run: Run) -> None:
    """The trainer's weights into all engines, as the next version; see ``Run.update_engines``."""
    run.check_updates()
    run.trainer_turn()
    transfer, config = run.transfer, run.config
    if transfer.path == "ipc" and run.turn == "trainer":
        # Engines must be awake while the trainer's weights are still on the GPU; the rest makes room for them.
        with run.phase("offload"):
            run.trainer.offload(("gradients", "optimizer"))
            run.pool.wake()
    with run.phase("export"):
        payload = transfer.prepare(settled=run.updating is None)
    if payload.path != "ipc":
        run.engines_turn()
    run.version += 1
    version, steps, feed, began = run.version, run.step, run.feed, time.time()
    feed.announce(version, steps)
    arrived: Future[None] = Future()

    def resolve(update: Future[UpdateReport]) -> None:
        try:
            report = update.result()
            args = {"version": version, "path": payload.path}
            run.timeline.span(TRANSFER, f"weights of step {steps}", began, time.time(), args)
            feed.delivered(version, steps)
            if run.ahead_of_training:
                feed.admit()
            run.transfer_seconds = report.seconds
            arrived.set_result(None)
        except BaseException as error:
            arrived.set_exception(error)

    update = run.service.update(version, payload.chunks, payload.manifest, config.stream.in_flight)
    update.add_done_callback(resolve)
    run.updating = arrived
    if not config.stream.staleness:
        run.updated()
    if payload.path == "ipc":
        run.updated()
        transfer.release()
        run.engines_turn()
