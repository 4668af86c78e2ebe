"""``ultraep-rl`` whose trainer says that its ranks are GPUs with little memory at first, then with much.

Micro-batches of fused steps are expected to take a GiB; ranks have none for the first ``FULL`` questions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rl.cli import app
from rl.orchestration import fused
from rl.orchestration.fused_memory import GIB, FusedMemory
from rl.training.group import Trainer
from rl.training.offload import MemoryReport

FULL = 3


def main() -> None:
    of_run, memory, asked = fused.FusedTraining.of_run, Trainer.memory, [0]

    def with_memory(*args: Any) -> fused.FusedTraining | None:
        made = of_run(*args)
        if made is not None:
            made.memory = FusedMemory(made.schedules.models, lambda name, stage, rows: (GIB, GIB), margin=0.0)
        return made

    def made_up(trainer: Trainer) -> list[MemoryReport]:
        asked[0] += 1
        free = 0 if asked[0] <= FULL else 80 * GIB
        return [replace(report, device_total=80 * GIB, torch_free=free) for report in memory(trainer)]

    fused.FusedTraining.of_run, Trainer.memory = staticmethod(with_memory), made_up  # type: ignore[method-assign]
    app()


if __name__ == "__main__":
    main()
