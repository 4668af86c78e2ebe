"""Two models of this rank in one pipeline schedule: the actor learns while its partner fills its bubbles (RLHFuse).

    fusion = Fusion(worker)
    result = fusion.train(schedule, [FusedPart("actor", ...), FusedPart("critic", ...)])

The partner is a critic, which learns too, or a reference, which takes log-probs of samples that train later. Gradients
are those of the models one after the other: a schedule says when, not what.

Source:
    Intra-stage fusion, RLHFuse (arXiv:2409.13221), section 5.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.pipeline.communication import Links
from megatron_ultraep.pipeline.executor import ExecutionReport, FusedExecutor
from megatron_ultraep.pipeline.memory import Memory, device_memory
from megatron_ultraep.pipeline.problem import Problem, Schedule
from megatron_ultraep.pipeline.stage import StageWork
from megatron_ultraep.runtime.ranges import ranged
from rl.training.batch import Counts, MiniBatch
from rl.training.foresight import StagePlans
from rl.training.objectives import Objective
from rl.training.passes import PassSettings, PreparedPass, RouteMode, RouteReport
from rl.training.results import StepOutcome, TrainResult, step_outcome

if TYPE_CHECKING:
    from rl.training.worker import TrainWorker

_KEPT_EXECUTORS = 8


@dataclass(frozen=True)
class Learning:
    """A model takes an optimizer step.

    Attributes:
        objective: the loss.
        lr: learning rate of the step; None follows the schedule.
    """

    objective: Objective
    lr: float | None = None


@dataclass(frozen=True)
class TakingLogprobs:
    """A model takes log-probs of learnt tokens; see ``PassRunner.logprobs``."""

    settings: PassSettings
    routes: RouteMode = "own"


@dataclass(frozen=True)
class FusedPart:
    """What one model does in a fused step, on this rank.

    Attributes:
        model: its name, also in the schedule's problem.
        batch: this data-parallel rank's part, in the model's own layout.
        step: of its micro-batch keys.
        task: what it does with it.
        plans: made ahead, of this rank; see ``TrainWorker.train``.
    """

    model: str
    batch: MiniBatch
    step: int
    task: Learning | TakingLogprobs
    plans: StagePlans | None = None


@dataclass(frozen=True)
class StageSeconds:
    """Mean time of one model's operations on this rank, in seconds; waiting for input is not part of it."""

    forward: float
    backward: float


@dataclass(frozen=True)
class StageMemory:
    """What a micro-batch of one model takes in one stage, in bytes for each of its rows; see ``pipeline.memory``.

    Micro-batches of less than half the rows of the largest one are left out: what does not depend on rows would make
    theirs seem large.

    Attributes:
        rows: of the largest micro-batch, padding included.
        held: from its forward to the end of its backward, of a model that only runs forward to the end of its forward.
        passing: beside what is held, within its forward or its backward.
    """

    rows: int
    held: float
    passing: float


@dataclass(frozen=True)
class FusedResult:
    """What a fused step did, on this rank.

    Attributes:
        learnt: of each model that learnt.
        logprobs: of each model that took log-probs: by sample, ``[T]``, and what its routers did.
        stages: measured times of each model.
        memory: of each model, the most over micro-batches; empty where nothing is counted, on CPUs.
        peak: most bytes at once above those before the step, until the last operation; None likewise.
        makespan: from the first operation of any rank to the last one of this one, in seconds.
        finish_s: reducing gradients, in seconds.
    """

    learnt: dict[str, TrainResult] = field(default_factory=dict)
    logprobs: dict[str, tuple[dict[str, np.ndarray], RouteReport]] = field(default_factory=dict)
    stages: dict[str, StageSeconds] = field(default_factory=dict)
    memory: dict[str, StageMemory] = field(default_factory=dict)
    peak: int | None = None
    makespan: float = 0.0
    finish_s: float = 0.0


@dataclass(frozen=True)
class FusedOutcome:
    """A fused step over all ranks.

    Attributes:
        learnt: of each model that learnt.
        logprobs: of each model that took log-probs, by sample, ``[T]`` aligned with tokens.
        stages: of each model by stage, means over ranks.
        makespan: from the first operation to the last, in seconds.
        memory: of each model by stage, the most over ranks; empty where nothing is counted, on CPUs.
        peaks: by node of the first model's stages, most bytes at once above those before the step, of its fullest rank;
            empty likewise.
    """

    learnt: dict[str, StepOutcome]
    logprobs: dict[str, dict[str, np.ndarray]]
    stages: dict[str, tuple[StageSeconds, ...]]
    makespan: float
    memory: dict[str, tuple[StageMemory, ...]] = field(default_factory=dict)
    peaks: tuple[int, ...] = ()


def fused_outcome(
    results: Sequence[FusedResult], layouts: Mapping[str, ParallelLayout], learnt: Mapping[str, Counts]
) -> FusedOutcome:
    """One fused step, from what every rank tells.

    Args:
        results: by rank.
        layouts: of each model, the one whose stages are the nodes first.
        learnt: what each model that learns has learnt from.
    """
    stages: dict[str, tuple[StageSeconds, ...]] = {}
    memory: dict[str, tuple[StageMemory, ...]] = {}
    for name, layout in layouts.items():
        of_stage: list[list[FusedResult]] = [[] for _ in range(layout.pp)]
        for rank, result in enumerate(results):
            of_stage[layout.coordinates(rank)["pp"]].append(result)
        times = [[result.stages[name] for result in some] for some in of_stage]
        stages[name] = tuple(
            StageSeconds(float(np.mean([t.forward for t in some])), float(np.mean([t.backward for t in some])))
            for some in times
        )
        if all(name in result.memory for result in results):
            memory[name] = tuple(most_of([result.memory[name] for result in some]) for some in of_stage)
    merged: dict[str, dict[str, np.ndarray]] = {}
    for result in results:
        for name, (values, _) in result.logprobs.items():
            merged.setdefault(name, {}).update(values)
    return FusedOutcome(
        learnt={name: step_outcome([r.learnt[name] for r in results], counts) for name, counts in learnt.items()},
        logprobs=merged,
        stages=stages,
        makespan=max(result.makespan for result in results),
        memory=memory,
        peaks=_peaks(results, next(iter(layouts.values())).pp),
    )


def by_node(values: Sequence[int], nodes: int) -> list[list[int]]:
    """Values of all ranks, ``[node][rank]``: a node is ``ranks / nodes`` consecutive ranks (``pipeline.Links``)."""
    size = len(values) // nodes
    return [list(values[n * size : (n + 1) * size]) for n in range(nodes)]


def _peaks(results: Sequence[FusedResult], nodes: int) -> tuple[int, ...]:
    counted = [result.peak for result in results if result.peak is not None]
    return tuple(max(some) for some in by_node(counted, nodes)) if len(counted) == len(results) else ()


def most_of(found: Sequence[StageMemory]) -> StageMemory:
    """The most of several ranks, or steps."""
    return StageMemory(max(m.rows for m in found), max(m.held for m in found), max(m.passing for m in found))


class Fusion:
    """Fused steps of a worker's models; collective with all other ranks.

    Args:
        worker: whose models.
        timeout_s: limit of every wait for another rank, in seconds.
        memory: readings of this rank's memory; by default those of its CUDA device, none on CPUs.
    """

    def __init__(self, worker: TrainWorker, timeout_s: float, memory: Memory | None = None) -> None:
        self._worker, self._timeout = worker, timeout_s
        device = worker.actor.device
        self._memory = device_memory(device) if memory is None and device.type == "cuda" else memory
        self._steps = 0
        self._links: Links | None = None
        self._executors: dict[str, FusedExecutor] = {}

    @ranged("train_fused")
    def train(self, schedule: Schedule, parts: Sequence[FusedPart]) -> FusedResult:
        """Run the parts by a schedule, then step the optimizers of those that learn, in the schedule's order of models.

        Args:
            schedule: of all ranks; its models are the parts' by name.
            parts: of this rank.

        Raises:
            ScheduleMismatch: on all ranks, before anything runs.
            ExecutionError: a rank failed or hung; the process is of no more use.
            AccumulationError: a model that learns has an open set.
            ForesightMismatch: see ``TrainWorker.train``.
        """
        by_name = {part.model: part for part in parts}
        ordered = [by_name[model.name] for model in schedule.problem.models]
        started = time.perf_counter()
        executor = self._executor(schedule)
        allocated = self._allocated()
        with contextlib.ExitStack() as stack:
            prepared = [self._prepare(part, stack) for part in ordered]
            report = executor.run([stage_work(each) for each in prepared], allocated=allocated)
            routes = [each.finish() for each in prepared]
        computed, first = time.perf_counter(), self._steps == 0
        self._steps += 1
        rows = [each.rows for each in prepared]
        result = FusedResult(
            stages=_stage_seconds(schedule.problem, report),
            memory=_stage_memory(schedule.problem, report, rows, self._allocated() - allocated, first),
            peak=report.peak,
            makespan=report.makespan,
            finish_s=report.finish_s,
        )
        for part, kept, route_report in zip(ordered, report.kept, routes, strict=True):
            if isinstance(part.task, Learning):
                result.learnt[part.model] = self._step(part.model, part.task, kept, route_report, computed - started)
            else:
                taken = self._worker.runners[part.model].by_sample(part.batch, kept)
                result.logprobs[part.model] = taken, route_report
        return result

    def _allocated(self) -> int:
        """Bytes of this rank's tensors; 0 where nothing is counted."""
        return 0 if self._memory is None else self._memory().allocated

    def _prepare(self, part: FusedPart, stack: contextlib.ExitStack) -> PreparedPass:
        if isinstance(part.task, TakingLogprobs):
            return stack.enter_context(
                self._worker.runners[part.model].prepare_logprobs(
                    part.batch, part.task.settings, pass_="old_logprob", step=part.step, routes=part.task.routes
                )
            )
        trained = self._worker.trained[part.model]
        trained.require_no_set("a fused step")
        trained.balance_metrics()  # of passes before this one
        trained.empty_gradients()
        stack.enter_context(trained.foreseen(part.batch, "train", part.step, part.plans, 0))
        return stack.enter_context(trained.prepare(part.batch, part.step, part.task.objective))

    def _step(
        self, model: str, task: Learning, kept: list[dict[str, object]], routes: RouteReport, seconds: float
    ) -> TrainResult:
        trained = self._worker.trained[model]
        loss, sums = trained.add_up(kept)  # type: ignore[arg-type]
        started = time.perf_counter()
        grad_norm, used, updated = trained.optimizer_step(task.lr)
        return TrainResult(
            loss=loss,
            sums=sums,
            grad_norm=grad_norm,
            lr=used,
            updated=updated,
            routes=routes,
            # Both models computed in this time, in turns.
            seconds={"forward_backward": seconds, "optimizer": time.perf_counter() - started},
            balance=trained.balance_metrics(),
        )

    def _executor(self, schedule: Schedule) -> FusedExecutor:
        """Made once per schedule; the order in which schedules come is the same on all ranks."""
        digest = schedule.digest()
        found = self._executors.pop(digest, None)
        if found is None:
            if self._links is None:
                problem = schedule.problem
                self._links = Links.of_models(problem.models, problem.nodes, timeout_s=self._timeout)
            found = FusedExecutor(schedule, self._links, memory=self._memory)
        self._executors[digest] = found
        while len(self._executors) > _KEPT_EXECUTORS:
            del self._executors[next(iter(self._executors))]
        return found


def stage_work(prepared: PreparedPass) -> StageWork:
    """A prepared pass as the executor takes it."""
    model = prepared.model
    return StageWork(
        chunk=model.run_chunks()[0],
        config=model.config,
        groups=model.groups,
        forward_step=prepared.forward_step,
        data=prepared.iterators[0],
        rows=prepared.rows,
        forward_only=prepared.forward_only,
    )


def _stage_seconds(problem: Problem, report: ExecutionReport) -> dict[str, StageSeconds]:
    spent: Mapping[tuple[int, bool], list[float]] = {
        (m, backward): [] for m in range(len(problem.models)) for backward in (False, True)
    }
    for measured in report.measured:
        spent[measured.operation.model, measured.operation.backward].append(measured.end - measured.start)
    return {
        model.name: StageSeconds(*(float(np.mean(spent[m, b])) if spent[m, b] else 0.0 for b in (False, True)))
        for m, model in enumerate(problem.models)
    }


def _stage_memory(
    problem: Problem, report: ExecutionReport, rows: Sequence[Sequence[int]], stayed: int, first: bool
) -> dict[str, StageMemory]:
    """What operations took, without what is made once (tables of positions, workspaces), which the next step has.

    Args:
        problem: of the step.
        report: of its run.
        rows: of each model's micro-batches.
        stayed: bytes that are allocated after the run and were not before it.
        first: of these models; what forwards make once they make for the first micro-batch.
    """
    if report.memory is None:
        return {}
    held, passing = ([0.0] * len(problem.models) for _ in range(2))
    for measured, counted in zip(report.measured, report.memory, strict=True):
        m, i = measured.operation.model, measured.operation.microbatch
        own = rows[m][i]
        if 2 * own < max(rows[m]):
            continue
        if not (first and i == 0 and any(2 * other >= max(rows[m]) for other in rows[m][1:])):
            held[m] = max(held[m], counted.held / own)
        passing[m] = max(passing[m], (counted.passing - max(0, stayed)) / own)
    return {model.name: StageMemory(max(rows[m]), held[m], passing[m]) for m, model in enumerate(problem.models)}
