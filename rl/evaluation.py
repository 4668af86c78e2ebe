"""Evaluation samples on disk: written by the loop, read by the report, scored again by ``ultraep-rl verify-eval``.

``<run>/eval/step_00012.jsonl`` holds one JSON object per line and sample, after 12 completed steps: sample_id, uid (of
the held-out prompt; several samples may share it), ordinal, epoch, prompt (text), prompt_tokens, label, metadata,
response (text), response_tokens, finish_reason, reward, reward_error.
"""

from __future__ import annotations

import math
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
        accuracy: avg@n: the fraction of a prompt's samples with a reward of at least `evaluation.correct_from`, mean
            over prompts; a missing reward is wrong.
        reward_mean: mean reward; a missing reward counts 0.
        samples: n, of each prompt.
        pass_at: (k, pass@k) for k = 1, 2, 4, ..., n; empty for n = 1, where it is the accuracy.
    """

    step: int
    count: int
    accuracy: float
    reward_mean: float
    samples: int = 1
    pass_at: tuple[tuple[int, float], ...] = ()


def summarize(
    step: int, rewards: Sequence[float | None], correct_from: float = 1.0, uids: Sequence[str] | None = None
) -> EvalResult:
    """Accuracy and mean reward of one evaluation, and pass@k where prompts were answered several times.

    Args:
        step: completed steps.
        rewards: of samples, in any order.
        correct_from: reward from which on a sample is correct.
        uids: of the prompt of each sample; None: each has a prompt of its own.

    Raises:
        ValueError: there are no rewards.
    """
    if not rewards:
        raise ValueError(
            f"evaluation after step {step}: expected at least one sample, came none; set evaluation.prompts."
        )
    correct: dict[object, list[bool]] = {}
    for key, reward in zip(uids or range(len(rewards)), rewards, strict=True):
        correct.setdefault(key, []).append(reward is not None and reward >= correct_from - TOLERANCE)
    groups = list(correct.values())
    accuracy = sum(sum(group) / len(group) for group in groups) / len(groups)
    reward_mean = sum(0.0 if reward is None else reward for reward in rewards) / len(rewards)
    samples = min(map(len, groups))
    pass_at = tuple(
        (k, sum(pass_at_k(len(group), sum(group), k) for group in groups) / len(groups)) for k in ks(samples)
    )
    return EvalResult(step, len(groups), accuracy, reward_mean, samples, pass_at)


def summarize_samples(step: int, samples: Sequence[Sample], correct_from: float = 1.0) -> EvalResult:
    """``summarize`` of scored samples."""
    return summarize(step, [s.reward for s in samples], correct_from, [s.prompt.uid for s in samples])


def ks(samples: int) -> tuple[int, ...]:
    """Which k are of interest: powers of two below the number of samples, and that number; none for one sample."""
    if samples < 2:
        return ()
    return (*(2**power for power in range(samples.bit_length()) if 2**power < samples), samples)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from all, is correct.

    ``1 - C(samples - correct, k) / C(samples, k)``: the unbiased estimator of the probability that k new samples have a
    correct one.

    Args:
        samples: of one prompt.
        correct: of these.
        k: 1 to ``samples``.

    Source:
        Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    Raises:
        ValueError: numbers out of range.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"expected 0 <= correct <= samples and 1 <= k <= samples, got {correct}, {samples}, k = {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def eval_metrics(result: EvalResult) -> dict[str, float]:
    """Of one evaluation, under the names of ``rl.metrics``."""
    metrics = {"eval/accuracy": result.accuracy, "eval/reward/mean": result.reward_mean}
    if result.samples > 1:
        metrics[f"eval/avg@{result.samples}"] = result.accuracy
        metrics |= {f"eval/pass@{k}": value for k, value in result.pass_at}
    return metrics


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
