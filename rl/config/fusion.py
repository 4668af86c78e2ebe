"""The section `fuse`: stages of an iteration that run into each other (RLHFuse)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rl.config.base import Section


class TailSection(Section):
    """Inference on finished samples while the tail of generation runs. With `stream.colocated`, the tail is gathered on
    few engines, and the freed ones make room for trainer ranks."""

    enabled: bool = Field(
        False, description="Take log-probs (and values) of finished samples before the last ones are generated."
    )
    threshold: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Unfinished samples at which the tail is gathered; auto: chosen by simulating recent lengths "
        "(`stream.latency_profile`), again when they drift; only gathers with `stream.colocated`.",
    )
    seats: int | None = Field(
        None, ge=1, description="Most samples that one engine takes of the tail; null: as many as leave a step within "
        "twice the time of one with a single sample, by `stream.latency_profile`, or `rollout.max_num_seqs`, whichever "
        "simulation prefers with `threshold: auto`; without a profile `rollout.max_num_seqs`.",
    )  # fmt: skip
    chunk_tokens: int = Field(
        0, ge=0, description="Tokens of finished samples for which a pass runs; 0: as many as fill one micro-batch on "
        "every data-parallel rank (times pipeline stages).",
    )  # fmt: skip
    window: int = Field(3, ge=1, description="Iterations whose lengths `threshold: auto` goes by.")
    drift: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Kolmogorov-Smirnov distance of lengths, beyond chance, above which a threshold is chosen anew.",
    )
    margin: float = Field(
        0.02, ge=0, description="Fraction of generation and inference that another threshold must save."
    )


class FusedTrainingSection(Section):
    """Actor and partner in one pipeline schedule: a critic, or a reference that takes log-probs of the mini-batch after
    it, works in the bubbles that the actor's pipeline leaves. Gradients are those of one after the other."""

    mode: Literal["auto", "on", "off"] = Field(
        "auto", description="auto: where there is a partner and a pipeline; the run says at its start which, or why "
        "not. on: refuse to run without.",
    )  # fmt: skip
    solve_s: float = Field(4.0, gt=0, description="Seconds to search for a schedule, beside the loop.")
    drift: float = Field(
        0.2,
        gt=0,
        description="Relative change of a stage's share of time, or growth of free memory, above which a schedule is "
        "searched anew.",
    )
    memory_margin: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="On GPUs: fraction of a device that schedules leave free. They hold no more micro-batches at once "
        "than fit beside it, by what operations took so far.",
    )


class FuseSection(Section):
    """Stages of an iteration that run into each other (RLHFuse)."""

    training: FusedTrainingSection = Field(
        default_factory=FusedTrainingSection, description=FusedTrainingSection.__doc__
    )
    tail: TailSection = Field(default_factory=TailSection, description=TailSection.__doc__)
