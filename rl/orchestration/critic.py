"""The critic's half of an iteration, and the reward model's pass: what GAE needs besides the actor.

    values = values_of(run, given)                       # before any update; None without a critic
    given, metrics = with_advantages(..., values)
    outcome = train_critic(run, mini_batch)              # beside the actor's step on the same mini-batch

In the first ``critic.warmup_steps`` iterations the critic learns alone. The actor's weights are then those that engines
have already, so they are not sent: engines go on with their version, which stands for the newer step too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rl.training.batch import TrainSample
from rl.training.group import StepOutcome
from rl.training.worker import ValueObjective
from rl.types import Sample

if TYPE_CHECKING:
    from rl.orchestration.setup import Run


def values_of(run: Run, samples: Sequence[TrainSample], offset: int = 0) -> Mapping[str, np.ndarray] | None:
    """Values before every learnt token, ``[T]`` by sample id; None without a critic.

    ``offset`` micro-batches of this pass ran before, on other samples of the iteration.
    """
    if run.config.critic is None:
        return None
    with run.phase("values"):
        return run.trainer.values(run.packing_of("critic").mini_batch(samples), first_micro_batch=offset)


def value_objective(run: Run) -> ValueObjective:
    """The critic's loss."""
    assert run.config.critic is not None
    return ValueObjective(run.config.critic.clip)


def train_critic(run: Run, samples: Sequence[TrainSample]) -> StepOutcome:
    """One optimizer step of the critic.

    Args:
        run: that has a critic.
        samples: of the mini-batch, with values and returns.
    """
    with run.phase("train_critic"):
        batch = run.packing_of("critic").mini_batch(samples)
        return run.trainer.train(batch, value_objective(run), model="critic")


def critic_metrics(outcomes: Sequence[StepOutcome]) -> dict[str, float]:
    """Of the critic's steps of an iteration; empty without any."""
    if not outcomes:
        return {}
    tokens = max(1, sum(outcome.tokens for outcome in outcomes))
    return {
        "critic/loss": float(np.mean([outcome.loss for outcome in outcomes])),
        "critic/grad_norm": float(np.mean([outcome.grad_norm for outcome in outcomes])),
        "critic/lr": outcomes[-1].lr,
        "critic/clipfrac": sum(outcome.sums.get("clipfrac", 0.0) for outcome in outcomes) / tokens,
        "critic/abs_error": sum(outcome.sums.get("abs_error", 0.0) for outcome in outcomes) / tokens,
    }


def with_model_scores(
    run: Run, samples: Sequence[Sample], offset: int = 0, values: Mapping[str, np.ndarray] | None = None
) -> tuple[list[Sample], dict[str, float]]:
    """Add the reward model's scores to the samples' rewards, if there is one.

    The score is that of the last learnt token's row: the model sees the whole response, its end included.

    Args:
        run: the run.
        samples: rewarded by the reward function.
        offset: see :func:`values_of`.
        values: what the model's pass over the samples gave, if it ran before.
    """
    section = run.config.reward.model
    if section is None:
        return list(samples), {}
    if values is None:
        with run.phase("reward_model"):
            batch = run.packing_of("scorer").mini_batch([scored_sample(sample) for sample in samples])
            values = run.trainer.values(batch, model="scorer", first_micro_batch=offset)
    scores = [float(values[sample.sample_id][-1]) for sample in samples]
    rewards = [
        float(sample.reward or 0.0) + section.weight * score for sample, score in zip(samples, scores, strict=True)
    ]
    return (
        [replace(sample, reward=reward) for sample, reward in zip(samples, rewards, strict=True)],
        {"rollout/reward_model/mean": float(np.mean(scores)), "rollout/reward_model/std": float(np.std(scores))},
    )


def scored_sample(sample: Sample) -> TrainSample:
    """A sample whose last row is fed with its last learnt token: a token that nobody looks at follows."""
    learnt = len(sample.response_tokens) if sample.learnt_tokens is None else sample.learnt_tokens
    tokens = sample.tokens[: sample.prompt_length + learnt]
    padded = np.concatenate([tokens, np.zeros(1, tokens.dtype)])
    return TrainSample(sample.sample_id, padded, np.arange(len(padded)) == len(padded) - 1)
