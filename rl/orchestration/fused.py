"""Fused training in the loop: the actor's optimizer steps, and what its partner does in the bubbles of its pipeline.

A critic learns from the same mini-batch. A reference takes the log-probs of the mini-batch after, which is why those of
the first one are taken before.

Which schedule a step runs is solved beside the loop (``fused_schedules``); on GPUs it goes by what operations take of
their memory (``fused_memory``), and where not even one micro-batch at a time fits, the models run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ultraep.layout import BatchLayout
from rl.config import RunConfig
from rl.config.fused_training import Partner, fused_partner
from rl.models.architecture import Architecture
from rl.orchestration.ahead import Pass
from rl.orchestration.critic import train_critic, value_objective
from rl.orchestration.fused_memory import GIB, FusedMemory, StepMemory
from rl.orchestration.fused_schedules import Chosen, FusedModel, FusedSchedules
from rl.planning.memory_by_stage import expected_memory
from rl.training.batch import MiniBatch, TrainSample
from rl.training.fused import FusedOutcome, Learning, TakingLogprobs
from rl.training.group import WholePart
from rl.training.objectives import Objective
from rl.training.offload import MemoryReport
from rl.training.spec import TrainerSpec

if TYPE_CHECKING:
    from rl.orchestration.setup import Run


class FusedTraining:
    """The fused steps of a run, whose configuration says that there are any; a context manager.

    Args:
        partner: who fills the bubbles.
        schedules: of its steps.
        memory: what its steps take and may take of GPUs; None on CPUs.
    """

    def __init__(self, partner: str, schedules: FusedSchedules, memory: FusedMemory | None = None) -> None:
        self.partner, self.schedules, self.memory = partner, schedules, memory
        self._taken: list[_Taken] = []
        self._off = ""  # why the last step was not fused

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
        memory = None
        if config.trainer.backend == "nccl":
            memory = FusedMemory(models, expected_memory(config, arch), margin=section.memory_margin)
        return FusedTraining(partner, FusedSchedules(models, solve_s=section.solve_s, drift=section.drift), memory)

    def begin(self, run: Run, batches: Sequence[Sequence[TrainSample]]) -> None:
        """Begin to solve for the mini-batches of an iteration, before anything runs."""
        if self.partner == "reference":
            batches = batches[: run.config.algorithm.mini_batches]  # later epochs have their log-probs
        reports = self._reports(run)
        for mine, theirs in self._pairs(batches):
            packed = self._both(run.packing.layout_of(mine), run.packing_of(self.partner).layout_of(theirs))
            memory = self._memory(packed, reports)
            if memory is None or not memory.complaint(self.schedules.models):
                self.schedules.begin(_microbatches(packed), memory)

    def with_critic(
        self, run: Run, samples: Sequence[TrainSample], planned: Pass, objective: Objective
    ) -> FusedOutcome:
        """One optimizer step of the actor and one of the critic, on the same samples; where not even one micro-batch at
        a time fits, without a schedule, one after the other.

        Args:
            run: whose trainer.
            samples: of the mini-batch, with advantages, values and returns.
            planned: the actor's pass.
            objective: the actor's loss.
        """
        both = self._step(run, samples, planned, objective, samples, Learning(value_objective(run)))
        if both is not None:
            return both
        critic = train_critic(run, samples)
        actor = run.trainer.train(MiniBatch.make(samples, planned.layout), objective, plans=planned.plans)
        return FusedOutcome({"actor": actor, "critic": critic}, {}, {}, 0.0)

    def with_reference(
        self,
        run: Run,
        samples: Sequence[TrainSample],
        planned: Pass,
        objective: Objective,
        following: Sequence[TrainSample],
    ) -> FusedOutcome:
        """One optimizer step of the actor, and the reference's log-probs of samples that train later; where not even
        one micro-batch at a time fits, without a schedule, one after the other.

        Args:
            run, samples, planned, objective: as for :meth:`with_critic`.
            following: samples without log-probs of the reference.
        """
        task = TakingLogprobs(run.settings(), run.config.algorithm.routes.reference if run.arch.is_moe else "own")
        both = self._step(run, samples, planned, objective, following, task)
        if both is not None:
            return both
        batch = run.packing_of("reference").mini_batch(following)
        logprobs, _ = run.trainer.logprobs(
            batch, "reference", "old_logprob", routes=task.routes, settings=task.settings
        )
        actor = run.trainer.train(MiniBatch.make(samples, planned.layout), objective, plans=planned.plans)
        return FusedOutcome({"actor": actor}, {"reference": logprobs}, {}, 0.0)

    def metrics(self) -> dict[str, float]:
        """Means over the fused steps since the last call; empty without any."""
        taken, self._taken = self._taken, []
        every = [each.chosen.metrics(each.makespan, each.peaks) for each in taken]
        names = dict.fromkeys(name for metrics in every for name in metrics)
        return {name: float(np.mean([m[name] for m in every if name in m])) for name in names}

    def to_json(self) -> dict[str, Any]:
        """For the ledger: what the last fused step ran; without any since :meth:`metrics` why, or nothing."""
        if not self._taken:
            return {"partner": self.partner, "steps": 0, "off": self._off} if self._off else {}
        last = self._taken[-1]
        chosen = last.chosen
        return {
            "partner": self.partner,
            "steps": len(self._taken),
            "schedule": chosen.schedule.digest(),
            "microbatches": {model.name: model.microbatches for model in chosen.schedule.problem.models},
            "makespan_s": last.makespan,
            **({} if chosen.guessed else {"predicted_s": chosen.makespan}),
            **last.memory_to_json(),
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

    def _both(self, of_actor: BatchLayout, of_partner: BatchLayout) -> dict[str, BatchLayout]:
        return {"actor": of_actor, self.partner: of_partner}

    def _reports(self, run: Run) -> list[MemoryReport]:
        """Of all ranks, now; none on CPUs."""
        return [] if self.memory is None else run.trainer.memory()

    def _memory(self, packed: Mapping[str, BatchLayout], reports: Sequence[MemoryReport]) -> StepMemory | None:
        """What a step may take now, and is expected to; None on CPUs."""
        if self.memory is None:
            return None
        rows = {name: max(m.rows for rank in layout.micro_batches for m in rank) for name, layout in packed.items()}
        return self.memory.of_step(rows, reports)

    def _fits(self, run: Run, memory: StepMemory | None) -> bool:
        """Whether the step can be fused; a change is told."""
        off = "" if memory is None else memory.complaint(self.schedules.models)
        if bool(off) != bool(self._off):
            run.say(f"fused training: {Partner(None, off) if off else fused_partner(run.config)}")
        self._off = off
        return not off

    def _step(
        self,
        run: Run,
        samples: Sequence[TrainSample],
        planned: Pass,
        objective: Objective,
        theirs: Sequence[TrainSample],
        task: Learning | TakingLogprobs,
    ) -> FusedOutcome | None:
        """None: it does not fit, and nothing was done."""
        mine, other = MiniBatch.make(samples, planned.layout), run.packing_of(self.partner).mini_batch(theirs)
        packed = self._both(mine.layout, other.layout)
        with run.phase("schedule"):
            memory = self._memory(packed, self._reports(run))
            if not self._fits(run, memory):
                return None
            chosen = self.schedules.get(_microbatches(packed), memory)
        parts = [
            WholePart("actor", mine, Learning(objective), planned.plans),
            WholePart(self.partner, other, task),
        ]
        outcome = run.trainer.train_fused(chosen.schedule, parts)
        self.schedules.observe(outcome.stages)
        if self.memory is not None:
            self.memory.observe(outcome)
        self._taken.append(_Taken(chosen, outcome.makespan, outcome.peaks, memory))
        return outcome


@dataclass(frozen=True)
class _Taken:
    """A fused step that was taken: its schedule, how long it took (s), and its memory: bytes by node, measured."""

    chosen: Chosen
    makespan: float
    peaks: tuple[int, ...]
    memory: StepMemory | None

    def memory_to_json(self) -> dict[str, list[float]]:
        """GiB by node of a rank, above what was allocated before the step: room, planned, measured; empty on CPUs."""
        if self.memory is None or self.chosen.peaks is None:
            return {}
        found = {"cap_gib": self.memory.free, "planned_peak_gib": self.chosen.peaks, "peak_gib": self.peaks}
        return {name: [round(value / GIB, 3) for value in values] for name, values in found.items()}


def _microbatches(packed: Mapping[str, BatchLayout]) -> dict[str, int]:
    return {name: layout.num_microbatches for name, layout in packed.items()}
