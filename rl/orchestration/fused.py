"""Fused training in the loop: the actor's optimizer steps, and what its partner does in the bubbles of its pipeline.

A critic learns from the same mini-batch. A reference takes the log-probs of the mini-batch after, which is why those of
the first one are taken before.

Which schedule a step runs is solved beside the loop, from times that earlier steps measured:

    schedules = FusedSchedules(layouts, costs, solve_s=5, drift=0.2)
    schedules.begin({"actor": 8, "critic": 4})              # as soon as the batch is packed; solves in the background
    chosen = schedules.get({"actor": 8, "critic": 4})       # when the step starts
    schedules.observe(outcome.stages)                       # what operations really took

The first schedule goes by the sizes of the models; every later one by measured times. It is solved anew when a step has
another number of micro-batches, or times have drifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.pipeline.baselines import serial_makespan
from megatron_ultraep.pipeline.bound import lower_bound
from megatron_ultraep.pipeline.problem import PipelineModel, Problem, Schedule
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.processes import end_with_parent
from rl.config import RunConfig
from rl.config.fused_training import fused_partner
from rl.models.architecture import Architecture
from rl.orchestration.ahead import Pass
from rl.orchestration.critic import value_objective
from rl.training.batch import MiniBatch, TrainSample
from rl.training.fused import FusedOutcome, Learning, StageSeconds, TakingLogprobs
from rl.training.group import WholePart
from rl.training.objectives import Objective
from rl.training.spec import TrainerSpec

if TYPE_CHECKING:
    from rl.orchestration.setup import Run

_START_S = 120.0  # for the solving process to import and compile


@dataclass(frozen=True)
class FusedModel:
    """A model of a fused step.

    Attributes:
        layout: its parallel sizes; without a placement its stages lie on the nodes in order.
        layers: of the whole model.
        hidden: size of hidden states.
        forward_only: it takes log-probs.
    """

    layout: ParallelLayout
    layers: int
    hidden: int
    forward_only: bool = False


@dataclass(frozen=True)
class Chosen:
    """A schedule, and what is expected of it; times in seconds, or in units of the models' sizes if ``guessed``.

    Attributes:
        schedule: to run.
        makespan: of the schedule.
        serial: of the models' plain 1F1B schedules one after the other.
        bound: that no schedule can beat.
        guessed: nothing was measured yet.
    """

    schedule: Schedule
    makespan: float
    serial: float
    bound: float
    guessed: bool

    def metrics(self, measured: float) -> dict[str, float]:
        """Of a step that ran it, in ``measured`` seconds."""
        out = {
            "fuse/training/makespan": measured,
            "fuse/training/saved_fraction": 1 - self.makespan / self.serial,
            "fuse/training/over_bound": self.makespan / self.bound,
        }
        return out if self.guessed else {**out, "fuse/training/predicted": self.makespan}


@dataclass(frozen=True)
class _Solving:
    """A schedule that is, or was, solved.

    Attributes:
        problem: with the times that it is solved for.
        future: of the solving process.
        before: for the same numbers of micro-batches and other times; None: there is none.
    """

    problem: Problem
    future: Future[Schedule]
    before: Schedule | None = None

    def usable(self) -> Schedule | None:
        """What could run now; None: wait for ``future``, also if it failed."""
        solved = self.future.done() and not self.future.cancelled() and self.future.exception() is None
        if solved:
            return self.future.result()
        return None if self.future.done() else self.before


class FusedSchedules:
    """Makes and keeps the schedules of a run's fused steps; a context manager.

    Args:
        models: by name, the actor first.
        solve_s: search time for one schedule, in seconds.
        drift: relative change of any stage's time above which a schedule is solved anew.
        timeout_s: limit of waiting for a schedule beyond ``solve_s``, in seconds.
    """

    def __init__(
        self, models: Mapping[str, FusedModel], *, solve_s: float, drift: float, timeout_s: float = _START_S
    ) -> None:
        self.models, self.solve_s, self.drift, self.timeout_s = dict(models), solve_s, drift, timeout_s
        self._times: dict[str, tuple[StageSeconds, ...]] | None = None
        self._solved: dict[tuple[int, ...], _Solving] = {}
        # Of its own: the search would hold this process' interpreter. Spawned: this one may hold CUDA and threads.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)

    @property
    def nodes(self) -> int:
        return next(iter(self.models.values())).layout.pp

    def problem(self, microbatches: Mapping[str, int]) -> Problem:
        """What is to be scheduled, with the times known so far."""
        return Problem(
            self.nodes, tuple(self._model(name, model, microbatches[name]) for name, model in self.models.items())
        )

    def begin(self, microbatches: Mapping[str, int]) -> None:
        """Begin to solve for these numbers of micro-batches of each model, unless a schedule for them is good still.

        Raises:
            RuntimeError: the solving process died.
        """
        key = tuple(microbatches[name] for name in self.models)
        problem, known, before = self.problem(microbatches), self._solved.get(key), None
        if known is not None:
            if not self._drifted(known.problem, problem):
                return
            before = known.usable()
            known.future.cancel()  # nobody wants it any more, and others wait behind it
        try:
            future = self._pool.submit(_solve, problem, self.solve_s)
        except BrokenProcessPool as error:
            raise self._failed(microbatches, error) from error
        self._solved[key] = _Solving(problem, future, before)

    def get(self, microbatches: Mapping[str, int]) -> Chosen:
        """The schedule for these numbers of micro-batches; waits until it is solved.

        While a schedule is solved anew because times have drifted, it is the one before, which is as valid.

        Raises:
            RuntimeError: the solving process took too long, or died.
        """
        self.begin(microbatches)
        solving = self._solved[tuple(microbatches[name] for name in self.models)]
        found = solving.usable()
        if found is None:
            try:
                found = solving.future.result(self.solve_s + self.timeout_s)
            except (TimeoutError, BrokenProcessPool) as error:
                raise self._failed(microbatches, error) from error
        now = self.problem(microbatches)  # times may have become known, or changed a little
        schedule = Schedule(now, found.orders)
        return Chosen(
            schedule,
            makespan=simulate(schedule).makespan,
            serial=serial_makespan(now),
            bound=lower_bound(now),
            guessed=self._times is None,
        )

    def observe(self, stages: Mapping[str, Sequence[StageSeconds]]) -> None:
        """Take what operations of a step took; of several steps, newer ones count more."""
        if self._times is None:
            self._times = {name: tuple(stages[name]) for name in self.models}
            return
        self._times = {
            name: tuple(
                StageSeconds((old.forward + new.forward) / 2, (old.backward + new.backward) / 2)
                for old, new in zip(self._times[name], stages[name], strict=True)
            )
            for name in self.models
        }

    def close(self) -> None:
        """End the solving process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list((self._pool._processes or {}).values()):
            process.terminate()

    def __enter__(self) -> FusedSchedules:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failed(self, microbatches: Mapping[str, int], error: Exception) -> RuntimeError:
        return RuntimeError(
            f"no schedule for {dict(microbatches)} micro-batches came within {self.solve_s + self.timeout_s:g} s "
            f"({type(error).__name__}): set fuse.training.mode to off to train the models one after the other"
        )

    def _model(self, name: str, model: FusedModel, microbatches: int) -> PipelineModel:
        stages = model.layout.pp
        size = float(model.layers * model.hidden) / stages
        times = self._times[name] if self._times else (StageSeconds(size, 2 * size),) * stages
        return PipelineModel(
            name,
            model.layout.placement or (tuple(range(stages)),),
            microbatches,
            tuple(t.forward for t in times),
            tuple(0.0 if model.forward_only else t.backward for t in times),
            (size,) * stages,
            forward_only=model.forward_only,
        )

    def _drifted(self, old: Problem, new: Problem) -> bool:
        """Whether any time of one problem is far from the other's; a common factor changes no schedule."""
        before, after = (
            [t for model in problem.models for t in (*model.forward, *model.backward)] for problem in (old, new)
        )
        total_before, total_after = sum(before), sum(after)
        return any(
            abs(b / total_after - a / total_before) > self.drift * a / total_before
            for a, b in zip(before, after, strict=True)
        )


def _solve(problem: Problem, seconds: float) -> Schedule:
    from megatron_ultraep.pipeline.solve import solve  # compiled; the driver has no need of it

    return solve(problem, seed=0, seconds=0.75 * seconds, memory_seconds=0.25 * seconds).schedule


class FusedTraining:
    """The fused steps of a run, whose configuration says that there are any; a context manager.

    Args:
        partner: who fills the bubbles.
        schedules: of its steps.
    """

    def __init__(self, partner: str, schedules: FusedSchedules) -> None:
        self.partner, self.schedules = partner, schedules
        self._taken: list[tuple[Chosen, float]] = []

    @staticmethod
    def of_run(config: RunConfig, arch: Architecture, spec: TrainerSpec) -> FusedTraining | None:
        """None where a run has none, see ``rl.config.fused_training``."""
        partner, section = fused_partner(config).name, config.fuse.training
        if partner is None:
            return None
        models = {
            "actor": FusedModel(spec.layout, arch.layers, arch.hidden),
            partner: FusedModel(spec.layout_of(partner), arch.layers, arch.hidden, forward_only=partner == "reference"),
        }
        return FusedTraining(partner, FusedSchedules(models, solve_s=section.solve_s, drift=section.drift))

    def begin(self, run: Run, batches: Sequence[Sequence[TrainSample]]) -> None:
        """Begin to solve for the mini-batches of an iteration, before anything runs."""
        if self.partner == "reference":
            batches = batches[: run.config.algorithm.mini_batches]  # later epochs have their log-probs
        for mine, theirs in self._pairs(batches):
            packed = run.packing.layout_of(mine), run.packing_of(self.partner).layout_of(theirs)
            self.schedules.begin(self._microbatches(*(layout.num_microbatches for layout in packed)))

    def with_critic(
        self, run: Run, samples: Sequence[TrainSample], planned: Pass, objective: Objective
    ) -> FusedOutcome:
        """One optimizer step of the actor and one of the critic, on the same samples.

        Args:
            run: whose trainer.
            samples: of the mini-batch, with advantages, values and returns.
            planned: the actor's pass.
            objective: the actor's loss.
        """
        task = Learning(value_objective(run))
        return self._step(run, samples, planned, objective, samples, task)

    def with_reference(
        self,
        run: Run,
        samples: Sequence[TrainSample],
        planned: Pass,
        objective: Objective,
        following: Sequence[TrainSample],
    ) -> FusedOutcome:
        """One optimizer step of the actor, and the reference's log-probs of samples that train later.

        Args:
            run, samples, planned, objective: as for :meth:`with_critic`.
            following: samples without log-probs of the reference.
        """
        task = TakingLogprobs(run.settings(), run.config.algorithm.routes.reference if run.arch.is_moe else "own")
        return self._step(run, samples, planned, objective, following, task)

    def metrics(self) -> dict[str, float]:
        """Means over the fused steps since the last call; empty without any."""
        taken, self._taken = self._taken, []
        every = [chosen.metrics(measured) for chosen, measured in taken]
        names = dict.fromkeys(name for metrics in every for name in metrics)
        return {name: float(np.mean([m[name] for m in every if name in m])) for name in names}

    def to_json(self) -> dict[str, Any]:
        """For the ledger: what the last fused step ran; empty without any since :meth:`metrics`."""
        if not self._taken:
            return {}
        chosen, measured = self._taken[-1]
        return {
            "partner": self.partner,
            "steps": len(self._taken),
            "schedule": chosen.schedule.digest(),
            "microbatches": {model.name: model.microbatches for model in chosen.schedule.problem.models},
            "makespan_s": measured,
            **({} if chosen.guessed else {"predicted_s": chosen.makespan}),
        }

    def close(self) -> None:
        self.schedules.close()

    def __enter__(self) -> FusedTraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pairs(
        self, batches: Sequence[Sequence[TrainSample]]
    ) -> Iterator[tuple[Sequence[TrainSample], Sequence[TrainSample]]]:
        """What the actor learns from, and what its partner works on meanwhile."""
        if self.partner == "critic":
            yield from ((batch, batch) for batch in batches)
        else:
            yield from pairwise(batches)

    def _microbatches(self, of_actor: int, of_partner: int) -> dict[str, int]:
        return {"actor": of_actor, self.partner: of_partner}

    def _step(
        self,
        run: Run,
        samples: Sequence[TrainSample],
        planned: Pass,
        objective: Objective,
        theirs: Sequence[TrainSample],
        task: Learning | TakingLogprobs,
    ) -> FusedOutcome:
        mine, other = MiniBatch.make(samples, planned.layout), run.packing_of(self.partner).mini_batch(theirs)
        with run.phase("schedule"):
            chosen = self.schedules.get(self._microbatches(mine.layout.num_microbatches, other.layout.num_microbatches))
        parts = [
            WholePart("actor", mine, Learning(objective), planned.plans),
            WholePart(self.partner, other, task),
        ]
        outcome = run.trainer.train_fused(chosen.schedule, parts)
        self.schedules.observe(outcome.stages)
        self._taken.append((chosen, outcome.makespan))
        return outcome
