"""The section that ``ultraep-rl plan`` reads; a run does not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rl.config.base import ConfigPath, Section


class PlanSection(Section):
    """What `ultraep-rl plan` assumes of the machine and the samples; a run does not read it."""

    gpu: Literal["a100", "h100", "h200", "b200"] = Field("h100", description="Kind of the GPUs.")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of a node, joined by NVLink.")
    network_gbs: float = Field(
        50.0, gt=0, description="From one GPU to other nodes, one direction (GB/s); 50 is 400 Gbit/s a GPU."
    )
    dimensions: ConfigPath | None = Field(
        None, description="config.json of the model, read where `model.path` has none yet."
    )
    mean_prompt: int | None = Field(
        None, ge=1, description="Mean prompt length in tokens; null: half of `data.max_prompt_tokens`."
    )
    mean_response: int | None = Field(
        None, ge=1, description="Mean response length in tokens; null: half of `sampling.max_tokens`."
    )
    imbalance: float = Field(
        1.5, ge=1.0, description="Tokens of the busiest expert-parallel rank over the mean where nothing balances them."
    )
    margin: float = Field(
        0.05, ge=0.0, lt=0.5, description="Share of a GPU's memory that must stay free for a plan to fit."
    )
