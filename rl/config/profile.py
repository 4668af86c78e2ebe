"""The section of profiled iterations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rl.config.base import Section

Counts = Annotated[tuple[int, ...], Field(strict=False)]


class ProfileSection(Section):
    """Iterations that are profiled; `steps` is the one flag, the others say how. Traces go to `profile/` of the run."""

    steps: Counts = Field((), description="Iterations, counted from 1 like those of the ledger; none: no profiling.")
    tool: Literal["torch", "nsys"] = Field(
        "torch", description="torch: a Chrome trace of every process. nsys: NVTX ranges, and capture begins and ends "
        "with the iteration, for a command started under `nsys profile --capture-range=cudaProfilerApi`.",
    )  # fmt: skip
    ranks: Counts | None = Field((0,), description="Trainer ranks that are profiled; null: all.")
    engines: bool = Field(False, description="Profile the engines too.")
    shapes: bool = Field(False, description="Record shapes of operators' inputs (torch).")
    stacks: bool = Field(False, description="Record Python's stack at every operator (torch); slow, large traces.")
    memory: bool = Field(False, description="Record allocations (torch).")
