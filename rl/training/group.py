"""The trainer as the loop sees it: Megatron ranks as Ray actors behind one object.

    with Trainer(spec, backend="gloo") as trainer:
        trainer.connect(pool.handles)
        old, _ = trainer.logprobs(batch, "actor", "old_logprob", routes="replay", settings=settings)
        outcome = trainer.train(batch, objective)
        pool.update_weights(version, *trainer.export())

Each data-parallel rank is sent its own samples, and fetches from the engines just the rows and layers of routes that
its routers see.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import ray

from megatron_ultraep.layout import Pass
from megatron_ultraep.megatron.migrate import MoveReport
from megatron_ultraep.pipeline.problem import Schedule
from megatron_ultraep.runtime.profiler import ProfileSettings
from rl.rank_nodes import RankNodes
from rl.shared_gpus import SEES_ALL_GPUS, SharedGpus
from rl.training.accumulate import check_apply, check_first
from rl.training.actor import TrainerActor
from rl.training.batch import Counts, MiniBatch
from rl.training.engine_routes import RoutesOfEngines
from rl.training.foresight import ExpertGroup, Homes, PassPlans, expert_groups
from rl.training.fused import FusedOutcome, Learning, TakingLogprobs, fused_outcome
from rl.training.objectives import Objective
from rl.training.offload import MemoryReport, OffloadReport, Part, merge_reports
from rl.training.passes import PassSettings, RouteMode, RouteReport
from rl.training.results import ChunkOutcome, StepOutcome, chunk_outcome, step_outcome
from rl.training.spec import TrainerSpec

__all__ = ["RoutesOfEngines", "StepOutcome", "Trainer", "TrainerDied", "TrainerLimits", "TrainerTimeout"]

_PEERS_S = 5.0  # for the death of a rank to be known after its peers have failed
_CLOSE_S = 10.0  # to write what is left of the load records


class TrainerDied(RuntimeError):
    """The process of a trainer rank ended; the message names the rank and what it was doing."""


class TrainerTimeout(TimeoutError):
    """A trainer rank did not answer within its limit; the message names it and what was waited for."""


@dataclass(frozen=True)
class TrainerLimits:
    """Seconds to wait for each kind of work."""

    start_s: float = 300.0
    step_s: float = 900.0
    checkpoint_s: float = 600.0
    routes_s: float = 300.0


@dataclass(frozen=True)
class WholePart:
    """What one model does in a fused step, on all ranks.

    Attributes:
        model: its name.
        batch: the whole mini-batch, laid out for the model's layout.
        task: what it does with it.
        plans: made ahead, of the actor.
    """

    model: str
    batch: MiniBatch
    task: Learning | TakingLogprobs
    plans: PassPlans | None = None


class Trainer:
    """Start and drive the ranks.

    Args:
        spec: what each rank builds.
        backend: ``"gloo"`` or ``"nccl"``.
        limits: of every wait.
        environment: additional environment variables of the ranks.
        share: GPUs shared with engines, rank r on the r-th; None: GPUs of their own.
        nodes: room on the nodes of a cluster; None: there is one node, or ``share`` says where.

    Raises:
        TrainerDied, TrainerTimeout: a rank did not come up; those that did are ended.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        *,
        backend: str = "gloo",
        limits: TrainerLimits | None = None,
        environment: dict[str, str] | None = None,
        share: SharedGpus | None = None,
        nodes: RankNodes | None = None,
    ) -> None:
        self.spec = spec
        self.limits = limits or TrainerLimits()
        # Held while calls to several ranks are made: those of two threads must come to all ranks in one order, or their
        # collectives meet crosswise.
        self.in_order = threading.Lock()
        self.steps = 0  # optimizer steps of the actor so far, what micro-batch keys count
        self.critic_steps = 0  # likewise, of the critic
        self._sets: dict[str, Counts] = {}  # what the chunks of each model's open set learn from
        world = spec.layout.world
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": 1 if backend == "nccl" else 0,
            "max_restarts": 0,
            "runtime_env": {"env_vars": trainer_environment(backend) | (environment or {})},
        }
        actor, place = ray.remote(TrainerActor), share or nodes
        self.handles = [
            actor.options(**options | (place.options(rank) if place is not None else {})).remote(rank)
            for rank in range(world)
        ]
        try:
            address = self._all([self.handles[0].listen_address.remote()], self.limits.start_s, "its address")[0]
            self.ranks: list[dict[str, Any]] = self._call(
                "start", spec, world, address, backend, self.limits.routes_s, limit=self.limits.start_s
            )
        except BaseException:
            self.stop()
            raise

    def connect(self, engines: Sequence[Any]) -> None:
        """Where routes are: handles of the rollout engines, in the order of their index."""
        self._call("connect", list(engines), limit=self.limits.start_s)

    # ---------------------------------------------------------------- passes

    def logprobs(
        self,
        batch: MiniBatch,
        model: str,
        pass_: Pass,
        *,
        routes: RouteMode,
        settings: PassSettings,
        plans: PassPlans | None = None,
        first_micro_batch: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> tuple[dict[str, np.ndarray], RouteReport]:
        """Log-probs of the learnt tokens of all samples, ``[T]`` each aligned with tokens, and what routers did.

        Plans were made ahead, of the actor's pass; None plans on exact loads. Passes over several chunks of one step
        count micro-batches on from chunk to chunk, each from its ``first_micro_batch``.

        Args:
            ranks: that take part: whole replicas of the model (``rl.orchestration.blocks``), between which a forward
                pass communicates nothing; the batch has micro-batches for no others. None: all.
        """
        parts, ahead = self._parts(batch, model), self._plans(plans)
        chosen = range(len(self.handles)) if ranks is None else ranks
        with self.in_order:
            calls = [
                self.handles[rank].logprobs.remote(
                    parts[rank], model, pass_, self.steps, routes, settings, ahead[rank], first_micro_batch
                )
                for rank in chosen
            ]
        merged: dict[str, np.ndarray] = {}
        total = RouteReport()
        for values, report in self._all(calls, self.limits.step_s, f"log-probs of the {model}", chosen):
            merged |= values
            total.rows += report.rows
            total.differing += report.differing
        return merged, total

    def values(
        self,
        batch: MiniBatch,
        *,
        model: str = "critic",
        first_micro_batch: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the critic (or the ``"scorer"``) says before every learnt token, ``[T]`` by sample, aligned with tokens.

        Args:
            batch: laid out for the model's layout (``spec.layout_of``).
            model: whose head.
            first_micro_batch, ranks: as for :meth:`logprobs`.
        """
        parts = self._parts(batch, model)
        chosen = range(len(self.handles)) if ranks is None else ranks
        with self.in_order:
            calls = [
                self.handles[rank].values.remote(parts[rank], self._step_of(model), model, first_micro_batch)
                for rank in chosen
            ]
        merged: dict[str, np.ndarray] = {}
        for values in self._all(calls, self.limits.step_s, f"values of the {model}", chosen):
            merged |= values
        return merged

    def train(
        self,
        batch: MiniBatch,
        objective: Objective,
        *,
        lr: float | None = None,
        plans: PassPlans | None = None,
        model: str = "actor",
    ) -> StepOutcome:
        """One optimizer step of the actor or the critic; plans as for :meth:`logprobs`, and the actor's."""
        parts, ahead, step = self._parts(batch, model), self._plans(plans), self._step_of(model)
        with self.in_order:
            calls = [
                handle.train.remote(parts[rank], step, objective, lr, ahead[rank], model)
                for rank, handle in enumerate(self.handles)
            ]
        results = self._all(calls, self.limits.step_s, f"optimizer step {step} of the {model}")
        self._stepped(model)
        return step_outcome(results, batch.learnt)

    def train_fused(self, schedule: Schedule, parts: Sequence[WholePart]) -> FusedOutcome:
        """The models of a schedule in one pipeline: each takes an optimizer step, or log-probs.

        Args:
            schedule: its models are those of the parts, by name.
            parts: what each model does; see ``rl.training.fused``.
        """
        whats = [(part.model, self._step_of(part.model), part.task) for part in parts]
        batches = [self._parts(part.batch, part.model) for part in parts]
        plans = [self._plans(part.plans) for part in parts]
        sent = ray.put(schedule)
        with self.in_order:
            calls = [
                handle.train_fused.remote(
                    sent, whats, self.spec.collective_s, *(b[rank] for b in batches), *(p[rank] for p in plans)
                )
                for rank, handle in enumerate(self.handles)
            ]
        names = " and ".join(part.model for part in parts)
        results = self._all(calls, self.limits.step_s, f"fused step {self.steps} of {names}")
        learnt = {part.model: part.batch.learnt for part in parts if isinstance(part.task, Learning)}
        for model in learnt:
            self._stepped(model)
        return fused_outcome(results, {part.model: self.spec.layout_of(part.model) for part in parts}, learnt)

    def _step_of(self, model: str) -> int:
        return self.critic_steps if model == "critic" else self.steps

    def _stepped(self, model: str) -> None:
        if model == "critic":
            self.critic_steps += 1
        else:
            self.steps += 1

    # ---------------------------------------------------------------- sets that arrive in chunks

    def accumulate(
        self,
        batch: MiniBatch,
        objective: Objective,
        *,
        plans: PassPlans | None = None,
        first: bool,
        model: str = "actor",
    ) -> ChunkOutcome:
        """Forward and backward of one chunk of a set, whose optimizer step is :meth:`apply`'s.

        Args:
            batch: the chunk, with the same estimated denominators as all chunks of its set (``MiniBatch.make``).
            objective: the loss.
            plans: of this chunk, as for :meth:`logprobs`.
            first: begins a set.
            model: whose set.

        Raises:
            AccumulationError: a set begun twice, or not at all.
        """
        check_first(model in self._sets, first)
        parts, ahead, step = self._parts(batch, model), self._plans(plans), self._step_of(model)
        with self.in_order:
            calls = [
                handle.accumulate.remote(parts[rank], step, objective, ahead[rank], first, model)
                for rank, handle in enumerate(self.handles)
            ]
        self._sets[model] = self.accumulated(model) + batch.learnt
        results = self._all(calls, self.limits.step_s, f"a chunk of optimizer step {step} of the {model}")
        return chunk_outcome(results, batch.learnt)

    def accumulated(self, model: str = "actor") -> Counts:
        """What the chunks of a model's open set learn from so far: true counts."""
        return self._sets.get(model, Counts())

    def apply(self, scale: float, *, lr: float | None = None, model: str = "actor") -> StepOutcome:
        """End the set: one optimizer step on the gradients of all its chunks.

        Args:
            scale: estimated denominator / true one: ``Counts(estimate).scale(aggregation, trainer.accumulated())``.
            lr: learning rate of this step; None follows the schedule.
            model: whose set.

        Returns:
            the step, with what all its chunks did; seconds of chunks add up.

        Raises:
            AccumulationError: no set is open.
            ValueError: a scale that is no positive number.
        """
        check_apply(model in self._sets, scale)
        results = self._call("apply", scale, lr, model, limit=self.limits.step_s)
        learnt = self._sets.pop(model)
        self._stepped(model)
        return step_outcome(results, learnt)

    def discard(self) -> None:
        """Drop open sets, if there are any, with their gradients."""
        self._call("discard", limit=self.limits.step_s)
        self._sets.clear()

    # ---------------------------------------------------------------- colocated mode

    def offload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Free the ranks' devices of weights, gradients and optimizer states, or of some; see ``rl.training.offload``.

        Returns:
            bytes over all ranks, and the slowest rank's seconds.
        """
        return merge_reports(self._call("offload", what, limit=self.limits.step_s))

    def onload(self, what: Sequence[Part] | None = None, ranks: Sequence[int] | None = None) -> OffloadReport:
        """Bring back what was offloaded, or some of it, on all ranks or some."""
        chosen = range(len(self.handles)) if ranks is None else ranks
        calls = [self.handles[rank].onload.remote(what) for rank in chosen]
        return merge_reports(self._all(calls, self.limits.step_s, "onload", chosen))

    def memory(self) -> list[MemoryReport]:
        """What each rank takes."""
        return self._call("memory", limit=self.limits.start_s)

    # ---------------------------------------------------------------- between steps

    def reorder(self, homes: Homes) -> MoveReport:
        """Move experts to new homes between steps; see ``TrainWorker.reorder``.

        Returns:
            bytes and experts over all pipeline stages, the most waves, and the slowest rank's seconds.
        """
        reports = self._call("reorder", homes, limit=self.limits.step_s)
        # Every rank of a stage reports what the whole stage did.
        stages = {self.spec.layout.coordinates(rank)["pp"]: report for rank, report in enumerate(reports)}
        return MoveReport(
            bytes=sum(report.bytes for report in stages.values()),
            experts=sum(report.experts for report in stages.values()),
            waves=max(report.waves for report in reports),
            seconds=max(report.seconds for report in reports),
        )

    def expert_groups(self) -> tuple[ExpertGroup, ...]:
        """The expert-parallel groups that balance, as plans made ahead have to know them; none without balancing."""
        told = [rank["balance"] for rank in self.ranks]
        return expert_groups(self.spec.layout, told) if all(each is not None for each in told) else ()

    def end_warmup(self) -> None:
        """Fresh optimizer state; reference and critic take today's weights."""
        self._call("end_warmup", limit=self.limits.step_s)

    # ---------------------------------------------------------------- weights

    def export(self, dtype: str) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
        """All weights in Hugging Face names, as references into the object store, and their shapes."""
        chunks: list[Any] = []
        manifest: dict[str, tuple[int, ...]] = {}
        for buckets in self._call("export", dtype, limit=self.limits.step_s):
            for reference, shapes in buckets:
                chunks.append(reference)
                manifest |= shapes
        return chunks, manifest

    def save(self, directory: Path, *, optimizer: bool = True) -> None:
        self._call("save", str(directory), optimizer, limit=self.limits.checkpoint_s)

    def load(self, directory: Path, reference: Path | None = None) -> None:
        self._call("load", str(directory), str(reference) if reference else None, limit=self.limits.checkpoint_s)

    def save_reference(self, directory: Path) -> None:
        self._call("save_reference", str(directory), limit=self.limits.checkpoint_s)

    def save_hf(self, source: Path, target: Path) -> None:
        """Write a Hugging Face directory; see ``rl.models.weights.save_hf``."""
        self._call("save_hf", str(source), str(target), limit=self.limits.checkpoint_s)

    # ---------------------------------------------------------------- profiling

    def profile(self, settings: ProfileSettings, paths: Mapping[int, Path]) -> None:
        """Begin a profiled window on some ranks, see ``rl.training.profiling``; ``paths`` of their traces by rank."""
        calls = [self.handles[rank].profile.remote(settings, str(path)) for rank, path in paths.items()]
        self._all(calls, self.limits.step_s, "the start of a profiled window", list(paths))

    def end_profile(self, ranks: Sequence[int]) -> list[Path]:
        """End the window on these ranks; the traces that were written."""
        calls = [self.handles[rank].end_profile.remote() for rank in ranks]
        traces = self._all(calls, self.limits.step_s, "writing the trace of a profiled window", ranks)
        return [Path(trace) for trace in traces if trace is not None]

    # ---------------------------------------------------------------- life

    def stop(self) -> None:
        """End all ranks; calling it again does nothing. A rank that does not answer loses its last load records."""
        handles, self.handles = self.handles, []
        if self.spec.balance is not None and self.spec.balance.record:
            # Killed actors run no exit handlers.
            ray.wait([handle.close.remote() for handle in handles], num_returns=len(handles), timeout=_CLOSE_S)
        for handle in handles:
            ray.kill(handle, no_restart=True)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _parts(self, batch: MiniBatch, model: str) -> list[Any]:
        """By rank a reference to its part: each put once for all tensor and pipeline ranks of a data-parallel one.

        Raises:
            ValueError: a batch that was laid out for another layout than the model's.
        """
        layout = self.spec.layout_of(model)
        laid_out = len(batch.layout.micro_batches)
        if laid_out != layout.dp:
            raise ValueError(
                f"{model}: expected a batch for {layout.dp} data-parallel ranks, got one for {laid_out}: pack it for "
                "the model's own layout"
            )
        parts = [ray.put(batch.part(dp)) for dp in range(layout.dp)]
        return [parts[layout.coordinates(rank)["dp"]] for rank in range(layout.world)]

    def _plans(self, plans: PassPlans | None) -> list[Any]:
        """By rank a reference to its group's plans, each put once."""
        if plans is None:
            return [None] * self.spec.layout.world
        parts, of_rank = plans.parts(self.spec.layout.world)
        references = [ray.put(part) for part in parts]
        return [references[part] for part in of_rank]

    def _call(self, name: str, *args: Any, limit: float) -> list[Any]:
        with self.in_order:
            calls = [getattr(handle, name).remote(*args) for handle in self.handles]
        return self._all(calls, limit, name)

    def _all(self, calls: Sequence[Any], limit_s: float, what: str, ranks: Sequence[int] | None = None) -> list[Any]:
        """Results of calls to ranks (all by default), within one limit; the first failure of any ends the wait."""
        deadline = time.monotonic() + limit_s
        asked = range(len(calls)) if ranks is None else ranks
        rank_of = dict(zip(calls, asked, strict=True))
        results: dict[int, Any] = {}
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = [rank_of[c] for c in waiting]
                raise TrainerTimeout(
                    f"trainer rank {', '.join(map(str, late))} did not finish {what} within {limit_s:g} s; raise "
                    "run.limits or look for a rank that hangs"
                )
            rank = rank_of[done[0]]
            try:
                results[rank] = ray.get(done[0])
            except ray.exceptions.RayActorError as error:
                raise TrainerDied(f"trainer rank {rank} died while it was at {what}: {error}") from error
            except ray.exceptions.RayTaskError as error:
                self._name_the_dead(waiting, rank_of, what)
                raise TrainerDied(f"trainer rank {rank} failed at {what}: {error}") from error
        return [results[rank] for rank in asked]

    @staticmethod
    def _name_the_dead(waiting: Sequence[Any], rank_of: Mapping[Any, int], what: str) -> None:
        """A rank that failed may only have lost its peer: a peer that died is the cause to name."""
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_PEERS_S) if waiting else ([], [])
        for call in done:
            try:
                ray.get(call)
            except ray.exceptions.RayActorError as error:
                raise TrainerDied(f"trainer rank {rank_of[call]} died while it was at {what}: {error}") from error
            except ray.exceptions.RayTaskError:
                continue


def trainer_environment(backend: str) -> dict[str, str]:
    """Environment of a trainer rank's process."""
    environment = {
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Megatron's tensor parallelism overlaps communication by issue order.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    if backend == "nccl":
        environment |= SEES_ALL_GPUS
    else:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return environment
