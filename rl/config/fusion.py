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
        "twice the time of one with a single sample, by `stream.latency_profile`; without one `rollout.max_num_seqs`.",
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


class FuseSection(Section):
    """Stages of an iteration that run into each other (RLHFuse)."""

    tail: TailSection = Field(default_factory=TailSection, description=TailSection.__doc__)
