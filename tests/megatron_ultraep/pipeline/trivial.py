"""A stage that only adds up what passes through it, so that schedules are run for their communication alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from megatron_ultraep.pipeline.problem import PipelineModel, Schedule

SIZE = 4


@dataclass
class Counting:
    """Work whose values tell where they have been; checks them as it goes.

    A forward of stage s hands on ``[base(microbatch), number of stages so far, ...]``, a backward likewise.
    """

    model: PipelineModel
    index: int
    replica: int
    stage: int
    fail_at: tuple[int, bool] | None = None
    sleep_at: tuple[int, bool, float] | None = None
    seen: list[tuple[int, bool]] = field(default_factory=list)

    @classmethod
    def of(cls, schedule: Schedule, node: int, **kwargs: object) -> list[Counting | None]:
        found: list[Counting | None] = []
        for i, model in enumerate(schedule.problem.models):
            place = model.place(node)
            found.append(None if place is None else cls(model, i, *place, **kwargs))  # type: ignore[arg-type]
        return found

    dtype = torch.float32

    def complaints(self, schedule: Schedule, model: int, node: int) -> list[str]:
        return []

    def begin(self) -> Counting:
        self.seen.clear()
        return self

    def shape(self, microbatch: int) -> tuple[int, ...]:
        return (SIZE + microbatch,)  # micro-batches differ in length

    def _value(self, microbatch: int, backward: bool, stages: int) -> torch.Tensor:
        base = 1000 * self.index + 100 * self.replica + microbatch + (0.5 if backward else 0.0)
        return torch.full(self.shape(microbatch), base) + 10_000 * stages

    def _pass(self, microbatch: int, backward: bool, received: torch.Tensor | None) -> torch.Tensor | None:
        if self.fail_at == (microbatch, backward):
            raise ValueError("this stage was told to fail")
        if self.sleep_at is not None and self.sleep_at[:2] == (microbatch, backward):
            time.sleep(self.sleep_at[2])
        last = self.model.stages - 1
        before = last - self.stage if backward else self.stage
        if before == 0:
            assert received is None
            received = self._value(microbatch, backward, 0)
        assert received is not None
        assert torch.equal(received, self._value(microbatch, backward, before)), (microbatch, backward, received)
        self.seen.append((microbatch, backward))
        return None if before == last else received + 10_000

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        return self._pass(microbatch, False, received)

    def backward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        return self._pass(microbatch, True, received)

    def finish(self) -> list[tuple[int, bool]]:
        return list(self.seen)
