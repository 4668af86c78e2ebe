"""What fused steps may take of the devices, and what their operations are expected to take; on GPUs.

    memory = FusedMemory(models, expected, margin=0.05)
    step = memory.of_step({"actor": 4096, "critic": 4096}, trainer.memory())    # rows of the largest micro-batches
    step.caps, step.activations                                                # what the schedule goes by, in bytes
    step.complaint(models)                                                     # not even one micro-batch at a time
    memory.observe(outcome)                                                    # what operations really took

Before anything was measured, ``rl.planning`` counts what operations take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.training.fused import FusedOutcome, StageMemory, by_node, most_of
from rl.training.offload import MemoryReport

if TYPE_CHECKING:
    from rl.orchestration.fused_schedules import FusedModel

GIB = 2**30
Expected = Callable[[str, int, int], tuple[float, float]]


@dataclass(frozen=True)
class StepMemory:
    """Of one fused step, in bytes of a rank.

    Attributes:
        activations: of each model by stage: what a micro-batch holds.
        passing: by node, what passes beside it at most, see ``megatron_ultraep.pipeline.memory``.
        free: by node, of its fullest rank before the step, less the margin.
        measured: none of it is only counted from the models.
    """

    activations: Mapping[str, tuple[float, ...]]
    passing: tuple[float, ...]
    free: tuple[float, ...]
    measured: bool

    @property
    def caps(self) -> tuple[float, ...]:
        """By node: the most that micro-batches may hold at once."""
        return tuple(free - passing for free, passing in zip(self.free, self.passing, strict=True))

    def complaint(self, models: Mapping[str, FusedModel]) -> str:
        """Why not even one micro-batch at a time fits, with what to change; empty if it does."""
        tight: list[tuple[float, str]] = []
        for name, model in models.items():
            for replica in model.nodes:
                for stage, node in enumerate(replica):
                    held, passing, free = self.activations[name][stage], self.passing[node], self.free[node]
                    if held > self.caps[node]:
                        tight.append(
                            (
                                held - self.caps[node],
                                f"one micro-batch of the {name} takes {held / GIB:.2f} GiB on ranks of pipeline stage "
                                f"{node}, and {passing / GIB:.2f} GiB pass beside it "
                                f"({'measured' if self.measured else 'counted from the models'}), but "
                                f"{free / GIB:.2f} GiB are free; lower trainer.tokens_per_micro_batch or "
                                "fuse.training.memory_margin, or recompute more (trainer.recompute)",
                            )
                        )
        return max(tight, key=lambda each: each[0])[1] if tight else ""


class FusedMemory:
    """Keeps what operations of a run's fused steps took.

    Args:
        models: of the steps by name, the one whose stages are the nodes first.
        expected: (held, passing) bytes of a model's stage and the rows of its largest micro-batch, before anything was
            measured.
        margin: fraction of a device that stays free.
    """

    def __init__(self, models: Mapping[str, FusedModel], expected: Expected, *, margin: float) -> None:
        self._models, self._expected, self._margin = dict(models), expected, margin
        self._nodes = next(iter(self._models.values())).layout.pp
        self._found: dict[str, tuple[StageMemory, ...]] = {}
        self._steps = 0

    def observe(self, outcome: FusedOutcome) -> None:
        """Take what operations of a step took: the most so far, without the first step once there is a second one,
        since it also made what is made once.

        Of steps whose micro-batches have less than half the rows of others, nothing is learnt: what does not depend on
        rows would make each of theirs seem large.
        """
        self._steps += 1
        for name, stages in outcome.memory.items():
            before = self._found.get(name)
            if before is not None and 2 * stages[0].rows < before[0].rows:
                continue
            if before is None or self._steps == 2 or stages[0].rows > 2 * before[0].rows:
                self._found[name] = stages
            else:
                self._found[name] = tuple(most_of(pair) for pair in zip(before, stages, strict=True))

    def of_step(self, rows: Mapping[str, int], reports: Sequence[MemoryReport]) -> StepMemory | None:
        """What a step may take, and is expected to.

        Args:
            rows: of each model's largest micro-batch.
            reports: of the ranks, right before the step; None where they are no GPUs.
        """
        free = []
        for report in reports:
            if report.torch_free is None or report.device_total is None:
                return None
            free.append(round(report.torch_free - self._margin * report.device_total))
        activations: dict[str, tuple[float, ...]] = {}
        passing = [0.0] * self._nodes
        for name, model in self._models.items():
            taken = [self._stage(name, stage, rows[name]) for stage in range(model.layout.pp)]
            activations[name] = tuple(held for held, _ in taken)
            for replica in model.nodes:
                for node, (_, passes) in zip(replica, taken, strict=True):
                    passing[node] = max(passing[node], passes)
        return StepMemory(
            activations,
            tuple(passing),
            tuple(float(min(some)) for some in by_node(free, self._nodes)),
            measured=all(name in self._found for name in self._models),
        )

    def _stage(self, name: str, stage: int, rows: int) -> tuple[float, float]:
        """(held, passing) of a micro-batch."""
        if name not in self._found:
            return self._expected(name, stage, rows)
        found = self._found[name][stage]
        # What does not depend on rows does not shrink with them either.
        counted = max(rows, found.rows / 2)
        return found.held * counted, found.passing * counted
