"""Sections about prompts, rewards and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rl.config.base import ConfigPath, Seconds, Section
from rl.config.trainer import RewardModelSection


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


Files = Annotated[tuple[ConfigPath, ...], Field(strict=False), BeforeValidator(_as_list)]
"""One path, or a list of them."""

RewardPath = Annotated[str, Field(pattern=r"^([A-Za-z_][\w.]*[:.][A-Za-z_]\w*|.+\.py:[A-Za-z_]\w*)$")]
"""``package.module:function``, ``package.module.function`` or ``path/to/file.py:function``."""

FILE_ENDINGS = (".jsonl", ".parquet")


class SourceSection(Section):
    """One set of prompts: a reasoning-gym task, or JSONL and parquet files. Exactly one of both."""

    reasoning_gym: str | None = Field(None, description="Name of a reasoning-gym task.")
    args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the reasoning-gym task.")
    size: int | None = Field(None, ge=1, description="Problems of the task; of files the first so many (null: all).")
    seed: int | None = Field(None, ge=0, description="Generator seed; problem i of the task has seed `seed + i`.")
    files: Files | None = Field(
        None, description="A JSONL or parquet file, or a list of them, read in this order (`jsonl` is taken too)."
    )
    prompt_key: str = Field("prompt", min_length=1, description="Column of the prompt: text, or chat messages.")
    label_key: str | None = Field(
        None,
        min_length=1,
        description="Column of the label, dots for inner ones; null: `label`, or verl's `reward_model.ground_truth`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _jsonl(cls, raw: Any) -> Any:
        """`jsonl` was the name of the field when there was one file."""
        if isinstance(raw, dict) and raw.get("files") is None and "jsonl" in raw:
            return {key: value for key, value in raw.items() if key not in ("jsonl", "files")} | {"files": raw["jsonl"]}
        return raw


class DataSection(Section):
    """Prompts of training and evaluation, and how many each iteration takes."""

    train: SourceSection = Field(description="Prompts to train on.")
    eval: SourceSection | None = Field(None, description="Held-out prompts; null: no evaluation.")
    prompt_template: str = Field("{prompt}", description="Text around each prompt; must hold `{prompt}`.")
    chat: bool = Field(False, description="Apply the tokenizer's chat template; excludes `prompt_template`.")
    chat_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the chat template, e.g. `enable_thinking: false`."
    )
    prompts_per_step: int = Field(32, ge=1, description="Prompts of one rollout iteration.")
    samples_per_prompt: int = Field(8, ge=1, description="Responses sampled for each prompt: the group of GRPO.")
    shuffle: bool = Field(True, description="Shuffle the training prompts anew in each epoch, from `run.seed`.")
    max_prompt_tokens: int = Field(512, ge=1, description="Tokens; a longer prompt is a row that cannot be used.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="Rows that cannot be used: stop and name them, or leave them out and list them in "
        "`skipped_rows.jsonl` of the run directory.",
    )


class RewardSection(Section):
    """The reward function, and perhaps a reward model."""

    path: RewardPath = Field(
        description="`module:function`, sync or async: reward(sample, args) -> float, verl's compute_score, or slime's "
        "custom_rm(args, sample)."
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Given to the function as `args`. `reward_key`: the entry of the reward where the function "
        "returns a mapping (else `score`).",
    )
    needs_label: bool | None = Field(
        None,
        description="True: a row with a null label cannot be used. False: rows need no label column. Null: a column, "
        "and no nulls in it if the function says that it compares with the label, as those of rl.rewards do.",
    )
    timeout_s: Seconds = Field(30.0, description="Seconds for one call: one sample's reward, or a group's.")
    concurrency: int = Field(16, ge=1, description="Rewards computed at the same time.")
    on_error: Literal["zero", "drop"] = Field(
        "zero", description="A reward that raises or times out: give that sample 0, or leave it out of training."
    )
    model: RewardModelSection | None = Field(None, description=RewardModelSection.__doc__)


class SuccessSection(Section):
    """Thresholds on held-out accuracy; the command ends with code 3 when one is missed."""

    before_max: float | None = Field(None, ge=0, le=1, description="Highest accuracy before training; null: off.")
    after_min: float | None = Field(None, ge=0, le=1, description="Lowest accuracy after training; null: off.")


class EvaluationSection(Section):
    """Evaluation on held-out prompts."""

    every: int = Field(0, ge=0, description="Rollout iterations between evaluations; 0: only at start and end.")
    prompts: int = Field(128, ge=1, description="Held-out prompts, the first so many of `data.eval`.")
    samples: int = Field(
        1, ge=1, description="Responses to each; several give avg@n and pass@k for k = 1, 2, 4, ..., n."
    )
    greedy: bool = Field(True, description="Greedy decoding; false: sample as in training.")
    at_start: bool = Field(True, description="Evaluate before the first iteration (after the warm-up).")
    at_end: bool = Field(True, description="Evaluate after the last iteration.")
    correct_from: float = Field(1.0, description="Reward from which on a response counts as correct.")
    success: SuccessSection = Field(default_factory=SuccessSection, description="Thresholds of the exit code.")
