"""The schedules of a run's fused steps: solved beside the loop, from times that earlier steps measured.

    schedules = FusedSchedules(layouts, costs, solve_s=5, drift=0.2)
    schedules.begin({"actor": 8, "critic": 4})              # as soon as the batch is packed; solves in the background
    chosen = schedules.get({"actor": 8, "critic": 4})       # when the step starts
    schedules.observe(outcome.stages)                       # what operations really took

The first schedule goes by the sizes of the models; every later one by measured times. It is solved anew when a step has
another number of micro-batches, or times have drifted; on GPUs also when it holds more than there is room for now, or
there is much more room than it was solved for (``fused_memory``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.pipeline.baselines import serial_makespan
from megatron_ultraep.pipeline.bound import lower_bound
from megatron_ultraep.pipeline.problem import InvalidSchedule, PipelineModel, Problem, Schedule
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.processes import end_with_parent
from rl.orchestration.fused_memory import GIB, StepMemory
from rl.training.fused import StageSeconds

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

    @property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """``[replica][stage]``, node."""
        return self.layout.placement or (tuple(range(self.layout.pp)),)


@dataclass(frozen=True)
class Chosen:
    """A schedule, and what is expected of it; times in seconds, or in units of the models' sizes if ``guessed``.

    Attributes:
        schedule: to run.
        makespan: of the schedule.
        serial: of the models' plain 1F1B schedules one after the other.
        bound: that no schedule can beat.
        guessed: no times were measured yet.
        peaks: by node, bytes of a rank above those before the step at their fullest; None on CPUs.
    """

    schedule: Schedule
    makespan: float
    serial: float
    bound: float
    guessed: bool
    peaks: tuple[float, ...] | None = None

    def metrics(self, measured: float, peaks: Sequence[int] = ()) -> dict[str, float]:
        """Of a step that ran it, in ``measured`` seconds and, by node, ``peaks`` bytes above those before it."""
        out = {
            "fuse/training/makespan": measured,
            "fuse/training/saved_fraction": 1 - self.makespan / self.serial,
            "fuse/training/over_bound": self.makespan / self.bound,
        }
        if not self.guessed:
            out["fuse/training/predicted"] = self.makespan
        if self.peaks is not None:
            out["fuse/training/planned_peak_gib"] = max(self.peaks) / GIB
        if peaks:
            out["fuse/training/peak_gib"] = max(peaks) / GIB
        return out


@dataclass(frozen=True)
class _Solving:
    """A schedule that is, or was, solved.

    Attributes:
        problem: with the times that it is solved for.
        future: of the solving process.
        memory: that the problem goes by; None on CPUs.
        before: for the same numbers of micro-batches and other times; None: there is none.
    """

    problem: Problem
    future: Future[Schedule]
    memory: StepMemory | None = None
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

    def problem(self, microbatches: Mapping[str, int], memory: StepMemory | None = None) -> Problem:
        """What is to be scheduled, with the times known so far.

        Args:
            microbatches: of each model.
            memory: what the step takes and may take of the devices, which fits one micro-batch at a time; None: no cap.
        """
        return Problem(
            self.nodes,
            tuple(self._model(name, model, microbatches[name], memory) for name, model in self.models.items()),
            None if memory is None else memory.caps,
        )

    def begin(self, microbatches: Mapping[str, int], memory: StepMemory | None = None) -> None:
        """Begin to solve for these numbers of micro-batches of each model, unless a schedule for them is good still.

        Raises:
            RuntimeError: the solving process died.
        """
        problem, known = self.problem(microbatches, memory), self._solved.get(self._key(microbatches))
        if known is None:
            self._submit(microbatches, problem, memory)
            return
        before = known.usable()
        full = before is not None and not _holds(before, problem)
        if full or self._drifted(known.problem, problem) or self._roomier(known.memory, memory):
            known.future.cancel()  # nobody wants it any more, and others wait behind it
            self._submit(microbatches, problem, memory, None if full else before)

    def get(self, microbatches: Mapping[str, int], memory: StepMemory | None = None) -> Chosen:
        """The schedule for these numbers of micro-batches; waits until it is solved.

        While a schedule is solved anew because times have drifted, it is the one before, which is as valid.

        Raises:
            RuntimeError: the solving process took too long, or died.
        """
        self.begin(microbatches, memory)
        now = self.problem(microbatches, memory)  # times may have become known, or changed a little
        found = self._solved[self._key(microbatches)].usable()
        if found is None or not _holds(found, now):
            found = self._wait(microbatches)
        if not _holds(found, now):  # was solved for more room than there is now
            self._submit(microbatches, now, memory)
            found = self._wait(microbatches)
        schedule = Schedule(now, found.orders)
        timeline = simulate(schedule)
        peaks = None
        if memory is not None:
            peaks = tuple(held + passing for held, passing in zip(timeline.peak_memory, memory.passing, strict=True))
        return Chosen(
            schedule,
            makespan=timeline.makespan,
            serial=serial_makespan(now),
            bound=lower_bound(now),
            guessed=self._times is None,
            peaks=peaks,
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

    def _key(self, microbatches: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(microbatches[name] for name in self.models)

    def _submit(
        self,
        microbatches: Mapping[str, int],
        problem: Problem,
        memory: StepMemory | None,
        before: Schedule | None = None,
    ) -> None:
        try:
            future = self._pool.submit(_solve, problem, self.solve_s)
        except BrokenProcessPool as error:
            raise self._failed(microbatches, error) from error
        self._solved[self._key(microbatches)] = _Solving(problem, future, memory, before)

    def _wait(self, microbatches: Mapping[str, int]) -> Schedule:
        try:
            return self._solved[self._key(microbatches)].future.result(self.solve_s + self.timeout_s)
        except (TimeoutError, BrokenProcessPool) as error:
            raise self._failed(microbatches, error) from error

    def _failed(self, microbatches: Mapping[str, int], error: Exception) -> RuntimeError:
        return RuntimeError(
            f"no schedule for {dict(microbatches)} micro-batches came within {self.solve_s + self.timeout_s:g} s "
            f"({type(error).__name__}): set fuse.training.mode to off to train the models one after the other"
        )

    def _model(self, name: str, model: FusedModel, microbatches: int, memory: StepMemory | None) -> PipelineModel:
        stages = model.layout.pp
        size = float(model.layers * model.hidden) / stages
        times = self._times[name] if self._times else (StageSeconds(size, 2 * size),) * stages
        return PipelineModel(
            name,
            model.nodes,
            microbatches,
            tuple(t.forward for t in times),
            tuple(0.0 if model.forward_only else t.backward for t in times),
            (size,) * stages if memory is None else memory.activations[name],
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

    def _roomier(self, old: StepMemory | None, new: StepMemory | None) -> bool:
        """Whether a schedule was solved for much less room than there is: some node has more, or it was not measured.

        Not by what micro-batches hold: of mini-batches with different rows the tightest one's schedule serves all.
        """
        if old is None or new is None:
            return False
        return (new.measured and not old.measured) or any(
            now > (1 + self.drift) * before for before, now in zip(old.free, new.free, strict=True)
        )


def _holds(schedule: Schedule, problem: Problem) -> bool:
    """Whether a schedule can run with the memory of another problem."""
    try:
        simulate(Schedule(problem, schedule.orders))
    except InvalidSchedule:
        return False
    return True


def _solve(problem: Problem, seconds: float) -> Schedule:
    from megatron_ultraep.pipeline.solve import solve  # compiled; the driver has no need of it

    return solve(problem, seed=0, seconds=0.75 * seconds, memory_seconds=0.25 * seconds).schedule
