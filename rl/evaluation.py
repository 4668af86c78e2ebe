"""Evaluation samples on disk: written by the loop, read by the report, scored again by ``ultraep-rl verify-eval``.

``<run>/eval/step_00012.jsonl`` holds one JSON object per line and held-out prompt, after 12 completed steps:
uid, ordinal, epoch, prompt (text), prompt_tokens, label, metadata, response (text), response_tokens, finish_reason,
reward, reward_error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl.files import read_json_lines, write_json_lines
from rl.types import Prompt, Sample

TOLERANCE = 1e-9


@dataclass(frozen=True)
class EvalResult:
    """Evaluation after a step.

    Attributes:
        step: completed steps.
        count: held-out prompts.
        accuracy: fraction of them with a reward of at least `evaluation.correct_from`; a missing reward is wrong.
        reward_mean: mean reward; a missing reward counts 0.
    """

    step: int
    count: int
    accuracy: float
    reward_mean: float


def summarize(step: int, rewards: Sequence[float | None], correct_from: float = 1.0) -> EvalResult:
    """Accuracy and mean reward of one evaluation.

    Raises:
        ValueError: there are no rewards.
    """
    if not rewards:
        raise ValueError(
            f"evaluation after step {step}: expected at least one sample, came none; set evaluation.prompts."
        )
    values = [0.0 if reward is None else reward for reward in rewards]
    correct = sum(reward is not None and reward >= correct_from - TOLERANCE for reward in rewards)
    return EvalResult(step, len(values), correct / len(values), sum(values) / len(values))


@dataclass(frozen=True)
class Judgement:
    """Whether the accuracy after a step is what `evaluation.success` asks for."""

    step: int
    wanted: str
    met: bool


def judge(results: Sequence[EvalResult], before_max: float | None, after_min: float | None) -> list[Judgement]:
    """Compare the first evaluation with ``before_max`` and the last with ``after_min``; None asks for nothing.

    Args:
        results: by step; the first one is from before training. Without a later one, ``after_min`` is missed.
    """
    judgements = []
    if before_max is not None:
        met = bool(results) and results[0].accuracy <= before_max + TOLERANCE
        judgements.append(Judgement(results[0].step if results else 0, f"at most {before_max:.1%}", met))
    if after_min is not None:
        met = len(results) > 1 and results[-1].accuracy >= after_min - TOLERANCE
        judgements.append(Judgement(results[-1].step if results else 0, f"at least {after_min:.1%}", met))
    return judgements


def eval_path(run_directory: Path, step: int) -> Path:
    """Where the samples of the evaluation after a step are."""
    return run_directory / "eval" / f"step_{step:05d}.jsonl"


def write_eval(run_directory: Path, step: int, samples: Iterable[Sample]) -> Path:
    """Save the samples of an evaluation; an earlier file of the same step is replaced."""
    path = eval_path(run_directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, map(_to_json, samples))
    return path


def read_eval(path: Path) -> list[Sample]:
    """The samples of one evaluation, without routes and log-probs."""
    return [_from_json(value) for value in read_json_lines(path).values]


def eval_files(run_directory: Path) -> dict[int, Path]:
    """Files of all evaluations, by step."""
    found = {}
    for path in sorted((run_directory / "eval").glob("step_*.jsonl")):
        match = re.fullmatch(r"step_(\d+)\.jsonl", path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def drop_evals_after(run_directory: Path, step: int) -> None:
    """Remove evaluations of steps that a resume rolled back, so that nothing judges a model that is gone."""
    for later, path in eval_files(run_directory).items():
        if later > step:
            path.unlink()


def _to_json(sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "uid": sample.prompt.uid,
        "ordinal": sample.prompt.ordinal,
        "epoch": sample.prompt.epoch,
        "prompt": sample.prompt.text,
        "prompt_tokens": sample.prompt.tokens.tolist(),
        "label": sample.prompt.label,
        "metadata": dict(sample.prompt.metadata),
        "response": sample.response_text,
        "response_tokens": sample.response_tokens.tolist(),
        "finish_reason": sample.finish_reason,
        "reward": sample.reward,
        "reward_error": sample.reward_error,
    }


def _from_json(value: Mapping[str, Any]) -> Sample:
    prompt = Prompt(
        uid=value["uid"],
        ordinal=value["ordinal"],
        epoch=value["epoch"],
        text=value["prompt"],
        tokens=np.asarray(value["prompt_tokens"], dtype=np.int32),
        label=value["label"],
        metadata=value["metadata"],
    )
    return Sample(
        sample_id=value["sample_id"],
        prompt=prompt,
        response_tokens=np.asarray(value["response_tokens"], dtype=np.int32),
        rollout_logprobs=np.zeros(0, dtype=np.float32),
        weight_versions=(),
        finish_reason=value["finish_reason"],
        routes=None,
        histogram=None,
        response_text=value["response"],
        reward=value["reward"],
        reward_error=value["reward_error"],
    )
