"""Trainer's weights into engines: through Ray's object store, or directly (``stream.transfer``).

A direct transfer is a collective of trainer ranks and engines: an engine that starts later cannot have it again, and
the death of one breaks it for all. Engines that were no members, or whose transfer broke off, take a copy in the object
store instead, which trainer ranks make when the first engine asks for it, between two of their calls: a healthy run
pays nothing for it (made each time it took ranks seconds of a step). With ``stream.staleness`` the trainer may be at
the next version by then; the engine then has that one under the older one's number, fresher than it says. The next
version makes the set of members anew and goes directly again. The generation service sees one update per version,
whichever way its engines take it.

Where engines and trainer ranks share GPUs (``ipc``), one engine beside the only rank reads its memory as it is; more
take buckets from staging memory, see ``rl.transfer.staged_sender``.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist

from rl.config import RunConfig
from rl.orchestration.direct import Direct, DirectEngines, OnDemand, Payload, Weights
from rl.rollout.dispatcher import OnSpan
from rl.rollout.pool import EnginePool
from rl.rollout.service import UpdateReport
from rl.timeline import TRANSFER
from rl.training.group import Trainer, TrainerDied, TrainerTimeout
from rl.transfer import Path
from rl.transfer.links import Limits, Membership, Rendezvous, TransferError, source_name
from rl.transfer.plan import TransferPlan, plan_transfer
from rl.transfer.receiver import Incoming, receiver_names
from rl.transfer.sender import SendReport
from rl.transfer.turns import GPU_BUCKET_BYTES, Turn, staging_bytes, turns_of

if TYPE_CHECKING:
    from rl.orchestration.setup import Run

logger = logging.getLogger(__name__)

_BUCKET_BYTES = 64 * 2**20


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
        copy_s = 0.0 if self.path == "store" else trainer.limits.step_s
        self.engines = DirectEngines(pool, self._broken, copy_s)
        self._pool, self._trainer, self._on_span = pool, trainer, on_span
        self._dtype = config.engine_dtype
        self._experts_move = config.balance.enabled and config.balance.reorder
        # Shorter than the engines' own limit of an update, within which they take the copy if this fails.
        limit = config.run.limits.weight_update_s / 4
        self._limits = Limits(join_s=limit, start_s=limit, bucket_s=limit)
        self._zero_copy = self.path == "ipc" and config.trainer.ranks == 1 and config.trainer.backend == "nccl"
        self._staged = self.path == "ipc" and not self._zero_copy
        self._backend = config.trainer.backend
        self._bucket_bytes = GPU_BUCKET_BYTES if self._staged and self._backend == "nccl" else _BUCKET_BYTES
        meets = self.path != "store" and not self._zero_copy
        self._rendezvous = Rendezvous(ray.util.get_node_ip_address()) if meets else None
        self._plan: TransferPlan | None = None
        self._turns: tuple[Turn, ...] = ()
        self._staging_bytes = 0
        self._handing: dict[str, Any] = {}
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
        if self._zero_copy:
            (handles,) = self._ranks("share", self._dtype)
            direct = Direct(handles, self.engines.members() or {}, OnDemand(self._copy))
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
        """Every engine has what the trainer shares with it on its GPU: let ranks go on.

        Raises:
            TrainerDied, TrainerTimeout: a rank could not do its part. That a transfer broke off is no error: engines
                have taken the copy then.
        """
        if self._zero_copy:
            self._ranks("release_shared")
            return
        calls, self._handing = self._handing, {}
        try:
            reports: list[SendReport] = self._wait(calls, "handing weights over", self._trainer.limits.step_s)
        except TransferError as error:
            logger.warning("trainer ranks stopped handing weights over: %s", error)
            return
        for rank, report in enumerate(reports):
            self._note_report(rank, report)

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
        generation = self._membership.generation
        if self._staged:
            self._begin_handing_over(generation)
        else:
            self._ranks("transfer_send", self._plan, "device", generation=generation)
        direct = Direct(Incoming(self._plan), members, OnDemand(self._copy), generation)
        return Payload([direct], self._plan.manifest, self.path)

    def _begin_handing_over(self, generation: int) -> None:
        """Ranks wait for the engines beside them until :meth:`release`; a rank that fails ends the others' waits."""
        plan, turns = ray.put(self._plan), ray.put(self._turns)
        self._handing = self._submit("transfer_hand_over", plan, turns)

        def ended(who: str, done: Future[Any]) -> None:
            if (error := done.exception()) is not None:
                self._broken(generation, f"{who}: {error}")

        for who, call in self._handing.items():
            call.future().add_done_callback(functools.partial(ended, who))

    def _finish_sending(self) -> None:
        """Trainer ranks have sent their copies of the version before, or say what went wrong."""
        if self._plan is None or self._staged:
            return
        limit_s = self._limits.start_s
        try:
            reports: list[SendReport | None] = self._ranks(
                "transfer_finish", limit_s, limit_s=limit_s + self._limits.join_s
            )
        except TransferError as error:  # engines have taken the copy; this version goes directly again
            logger.warning("trainer ranks stopped sending weights: %s", error)
            return
        for rank, report in enumerate(reports):
            if report is not None:
                self._note_report(rank, report)

    def _note_report(self, rank: int, report: SendReport) -> None:
        args = {"bytes": report.nbytes, "buckets": report.buckets, "waited_for_engines_s": report.ready_s}
        self._on_span(TRANSFER, f"sent by rank {rank}", report.started, report.ended, args)

    def _join(self, members: dict[int, int]) -> None:
        """A plan, and communicators of its sources and these engines, unless those of before will do."""
        if self._plan is None or self._experts_move:
            announced = self._ranks("transfer_announce", self._dtype)
            plan = plan_transfer(announced, self._bucket_bytes)
            if self._plan is None or plan.ranks != self._plan.ranks:
                self._membership = None
            self._plan = plan
            # The digest travels with the plan, so that nobody computes it again.
            logger.debug("weights travel by plan %s, from %d trainer ranks", plan.digest, len(plan.ranks))
            if self._staged:
                self._turns = turns_of(plan, {t.name: h.key for ours in announced for h in ours for t in h.tensors})
                if staging_bytes(plan) > self._staging_bytes:
                    self._staging_bytes, self._membership = staging_bytes(plan), None
        broken = self._membership is not None and self._membership.generation in self._failed
        if self._membership is not None and not broken and members == self._members:
            return
        assert self._rendezvous is not None
        began = time.time()
        sources = range(len(self._trainer.handles)) if self._staged else self._plan.ranks
        membership = self._rendezvous.generation(
            [source_name(rank) for rank in sources],
            receiver_names(sorted(members), self._pool.config.tensor_parallel),
            self._backend,
            self._limits,
        )
        self._membership = None
        engines = {index: self._pool.handles[index] for index in members}
        what, limit_s = "joining a weight transfer", 2 * self._limits.join_s
        if self._staged:
            calls = self._submit("transfer_join_staged", membership, self._staging_bytes)
            staging = dict(enumerate(self._wait(calls, what, limit_s, membership.generation)))
            joining = {}
        else:
            staging, joining = {}, self._submit("transfer_join", membership)
        joining |= {
            f"engine {i}": h.transfer_join.remote(membership, staging.get(i))
            for i, h in engines.items()
            if h is not None
        }
        self._wait(joining, what, limit_s, membership.generation)
        self._membership, self._members = membership, members
        args = {"generation": membership.generation, "engines": len(members), "sources": len(self._plan.ranks)}
        self._on_span(TRANSFER, "join", began, time.time(), args)

    def _broken(self, generation: int, reason: str) -> None:
        """End the waits of a generation's members; it is not used again. Any thread."""
        if self._rendezvous is not None and generation not in self._failed:
            self._failed.add(generation)
            dist.PrefixStore(f"transfer/{generation}", self._rendezvous.store).compare_set("failed", "", reason)

    def _copy(self) -> Future[Weights]:
        """Have ranks copy today's weights to the object store when they have time; before anything they do later.

        That may be in any phase of a colocated run, so they bring offloaded weights back for it. When the trainer is
        at newer ones already, engines get those; colocated ones generate only after the update that brings them.
        """
        limit_s = self._trainer.limits.step_s
        named = self._submit("export", self._dtype, self.path == "ipc")

        def collect() -> Weights:
            chunks: list[Any] = []
            manifest: dict[str, tuple[int, ...]] = {}
            for buckets in self._wait(named, "copying weights to the object store", limit_s):
                for reference, shapes in buckets:
                    chunks.append(reference)
                    manifest |= shapes
            return chunks, manifest

        return self._copies.submit(collect)

    def _ranks(self, name: str, *args: Any, limit_s: float | None = None, generation: int | None = None) -> list[Any]:
        return self._wait(self._submit(name, *args), name, limit_s or self._trainer.limits.step_s, generation)

    def _submit(self, name: str, *args: Any) -> dict[str, Any]:
        """A call to every rank, by its name."""
        trainer = self._trainer
        with trainer.in_order:
            return {f"trainer rank {r}": getattr(h, name).remote(*args) for r, h in enumerate(trainer.handles)}

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
                # A rank whose peer died fails, too, and often first: the one that died is the cause to name.
                died = isinstance(error, ray.exceptions.RayActorError) and isinstance(found, TrainerDied)
                failure = found if failure is None or died else failure
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
        # Engines' weights must have room while the trainer's are still on the GPU; everything else waits.
        with run.phase("offload"):
            run.trainer.offload(("gradients", "optimizer"))
            run.pool.wake(weights_only=True)
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
