"""From prompts to mini-batches: generate, reward, advantages; and what the samples were like."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.algorithms.advantages import PER_TOKEN, AdvantageConfig, AdvantageInput, get_advantage_fn
from rl.algorithms.losses import PolicyLossConfig, kl
from rl.algorithms.shaping import overlong_penalty
from rl.algorithms.values import explained_variance
from rl.config import RunConfig
from rl.rollout.config import Sampling
from rl.rollout.service import GenerationService
from rl.rollout.validation import RefusedSample
from rl.training.batch import MiniBatch, TrainSample
from rl.types import Prompt, Sample


class RefusedSamples(RuntimeError):
    """Samples whose routes stayed invalid after every regeneration; names each with its reason."""


def generate(
    service: GenerationService, prompts: Sequence[Prompt], samples_per_prompt: int, sampling: Sampling, seed: int
) -> list[Sample]:
    """All samples of all prompts, in the order of prompts; a prompt's samples are neighbours.

    Raises:
        RefusedSamples: an engine gave up on a sample.
    """
    groups: dict[str, list[Sample]] = {}
    refused: list[RefusedSample] = []
    with service.generate(prompts, samples_per_prompt, sampling, seed) as stream:
        for group in stream:
            for sample in group:
                if isinstance(sample, RefusedSample):
                    refused.append(sample)
                else:
                    groups.setdefault(sample.prompt.uid, []).append(sample)
    if refused:
        raise refuse(refused)
    return [sample for prompt in prompts for sample in groups[prompt.uid]]


def with_length(prompt: Prompt, median: float, sigma: float, most: int) -> Prompt:
    """The prompt with a response length of its own, log-normal, the same for the same uid; see ``ForcedLengths``."""
    seed = int.from_bytes(hashlib.blake2b(prompt.uid.encode(), digest_size=8).digest(), "little")
    length = median * np.exp(sigma * np.random.Generator(np.random.PCG64(seed)).standard_normal())
    return replace(prompt, metadata={**prompt.metadata, "max_tokens": int(np.clip(round(length), 1, most))})


def refuse(refused: Sequence[RefusedSample]) -> RefusedSamples:
    """The error that names refused samples."""
    shown = "; ".join(f"{r.sample_id}: {r.reason}" for r in refused[:3])
    return RefusedSamples(
        f"{len(refused)} samples were refused after every regeneration (rollout.max_regenerations), first: {shown}"
    )


def rewarded(samples: Sequence[Sample]) -> list[Sample]:
    """Samples to train on: those with a reward and at least one token."""
    return [s for s in samples if s.reward is not None and len(s.response_tokens)]


def train_samples(samples: Sequence[Sample]) -> list[TrainSample]:
    """The samples in the trainer's form, without advantages."""
    return [TrainSample.from_sample(s) for s in samples]


def policy_loss_config(config: RunConfig) -> PolicyLossConfig:
    """The actor's loss, as the run says."""
    section = config.algorithm
    return PolicyLossConfig(
        name=section.loss,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
        aggregation=section.aggregation,
        sequence_length=float(config.sampling.max_tokens),
        kl_coef=section.kl.coef if section.kl.apply_in == "loss" else 0.0,
        kl_estimator=section.kl.estimator,
        kl_weighted=section.kl.weighted,
        entropy_coef=section.entropy_coef,
        importance_cap=config.importance_cap,
        importance_band=section.importance.band,
        importance_level=section.importance.level,
    )


def with_advantages(
    samples: Sequence[Sample],
    given: Sequence[TrainSample],
    config: RunConfig,
    old: Mapping[str, np.ndarray] | None,
    reference: Mapping[str, np.ndarray] | None,
    values: Mapping[str, np.ndarray] | None = None,
) -> tuple[list[TrainSample], dict[str, float]]:
    """Add advantages (with a critic: values and returns too) and log-probs of the old policy and the reference.

    With the KL in the reward, each token's reward loses ``coef`` times its estimate; estimators that know one reward
    per sample take the sum of them. ``algorithm.overlong`` takes from rewards of long responses, and may leave those
    that were cut off out of what is learnt; their rewards count in their groups all the same.

    Args:
        samples: rewarded.
        given: the same in the trainer's form.
        config: of the run.
        old, reference, values: of tokens, ``[T]`` by sample id, None where the pass did not run.
    """
    algorithm = config.algorithm
    rewards = torch.tensor([float(s.reward or 0.0) for s in samples], dtype=torch.float64)
    rewards, given, overlong_metrics = _overlong(samples, given, config, rewards)
    per_token = algorithm.advantage in PER_TOKEN
    penalties = None
    if reference is not None and algorithm.kl.apply_in == "reward":
        penalties = [-algorithm.kl.coef * _kl(train, config, old, reference) for train in given]
        if not per_token:
            rewards += torch.tensor([penalty.sum() for penalty in penalties])
    _, group_ids = np.unique([s.prompt.uid for s in samples], return_inverse=True)
    lengths = torch.tensor([len(s.response_tokens) for s in samples])

    def packed(rows: Sequence[np.ndarray]) -> torch.Tensor:
        """``[T]`` of each sample to ``[tokens]`` of responses."""
        parts = [row[sample.prompt_length :] for row, sample in zip(rows, samples, strict=True)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)

    batch = AdvantageInput(
        rewards=rewards,
        group_ids=torch.from_numpy(group_ids),
        lengths=lengths,
        values=None if values is None else packed([values[s.sample_id] for s in samples]),
        token_rewards=packed(penalties) if penalties is not None and per_token else None,
        learnt=torch.tensor([int(train.loss_mask.sum()) for train in given]),
    )
    settings = AdvantageConfig(
        normalize_std=algorithm.normalize_std,
        gamma=algorithm.gae.gamma,
        lam=algorithm.gae.lam,
        whiten=algorithm.gae.whiten,
    )
    result = get_advantage_fn(algorithm.advantage)(batch, settings)
    if algorithm.zero_advantages:  # a critic still learns
        result = replace(result, advantages=torch.zeros_like(result.advantages))
    metrics = {f"train/{name}": value for name, value in result.metrics.items()} | overlong_metrics
    aligned = _aligned(samples, result.split(lengths))
    returns = None
    if result.returns is not None and batch.values is not None:
        returns = _aligned(samples, torch.split(result.returns, lengths.tolist()))
        learnt = packed([train.loss_mask for train in given])
        metrics |= value_metrics(batch.values[learnt], result.returns[learnt])
    out = []
    for i, (sample, train) in enumerate(zip(samples, given, strict=True)):
        out.append(
            replace(
                train,
                advantages=aligned[i],
                old_logprobs=None if old is None else old[sample.sample_id],
                ref_logprobs=None if reference is None else reference.get(sample.sample_id),
                values=None if values is None else values[sample.sample_id],
                returns=None if returns is None else returns[i],
            )
        )
    return out, metrics


def _overlong(
    samples: Sequence[Sample], given: Sequence[TrainSample], config: RunConfig, rewards: torch.Tensor
) -> tuple[torch.Tensor, Sequence[TrainSample], dict[str, float]]:
    """Rewards ``[N]`` less the penalty of length; samples, those that were cut off with nothing to learn; metrics."""
    overlong, longest = config.algorithm.overlong, config.sampling.max_tokens
    metrics: dict[str, float] = {}
    if buffer := overlong.buffer_tokens(longest):
        lengths = torch.tensor([len(s.response_tokens) for s in samples])
        penalty = overlong_penalty(lengths, longest, buffer, overlong.penalty)
        rewards = rewards + penalty
        metrics["train/overlong_penalty"] = float(penalty.mean()) if len(samples) else 0.0
    if overlong.filter:
        cut = [s.finish_reason == "length" for s in samples]
        given = [
            replace(train, loss_mask=np.zeros_like(train.loss_mask)) if left_out else train
            for train, left_out in zip(given, cut, strict=True)
        ]
        metrics["train/overlong_filtered_fraction"] = float(np.mean(cut)) if cut else 0.0
    return rewards, given, metrics


def _kl(
    train: TrainSample,
    config: RunConfig,
    old: Mapping[str, np.ndarray] | None,
    reference: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Estimate of the KL to the reference at every learnt token, float64 ``[T]`` aligned with tokens."""
    policy = old[train.sample_id] if old is not None else train.rollout_logprobs
    estimate = kl(torch.tensor(policy), torch.tensor(reference[train.sample_id]), config.algorithm.kl.estimator)
    return np.where(train.loss_mask, estimate.double().numpy(), 0.0)


def _aligned(samples: Sequence[Sample], rows: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """``[R]`` of each sample to float32 ``[T]``, aligned with tokens."""
    return [
        np.concatenate([np.zeros(sample.prompt_length, np.float32), row.numpy()])
        for sample, row in zip(samples, rows, strict=True)
    ]


def value_metrics(values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """How values were before the update; ``[tokens]`` each, of learnt tokens; zeros where there are none."""
    return {
        "critic/values/mean": float(values.mean()) if len(values) else 0.0,
        "critic/returns/mean": float(returns.mean()) if len(returns) else 0.0,
        "critic/explained_variance": explained_variance(values, returns),
    }


@dataclass(frozen=True)
class Packing:
    """How samples become micro-batches: the trainer's layout and its token budget."""

    layout: ParallelLayout
    tokens_per_micro_batch: int

    @property
    def arguments(self) -> dict[str, int]:
        """As ``BatchLayout.pack`` and ``plan.compose.compose`` take them."""
        return {
            "data_parallel": self.layout.dp,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "row_multiple": self.layout.tp,
            "micro_batch_multiple": self.layout.pp if self.layout.vpp else 1,
        }

    def layout_of(self, samples: Sequence[TrainSample]) -> BatchLayout:
        """The layout of one mini-batch of these samples, packed by length."""
        return BatchLayout.pack([s.sample_id for s in samples], [s.rows for s in samples], **self.arguments)

    def mini_batch(self, samples: Sequence[TrainSample]) -> MiniBatch:
        """One mini-batch of these samples."""
        return MiniBatch.make(samples, self.layout_of(samples))


def rollout_metrics(samples: Sequence[Sample], max_tokens: int) -> dict[str, float]:
    """What the samples of an iteration were like, under the names of ``rl.metrics``."""
    rewards = np.array([0.0 if s.reward is None else s.reward for s in samples])
    lengths = np.array([len(s.response_tokens) for s in samples])
    metrics = {
        "rollout/reward/mean": float(rewards.mean()),
        "rollout/reward/std": float(rewards.std()),
        "rollout/reward_errors": float(sum(s.reward_error is not None for s in samples)),
        "rollout/response_length/mean": float(lengths.mean()),
        "rollout/response_length/max": float(lengths.max()),
        "rollout/truncated_fraction": float(np.mean([s.finish_reason == "length" for s in samples])),
    }
    histograms = [s.histogram for s in samples if s.histogram is not None]
    if histograms:
        load = np.sum(histograms, axis=0, dtype=np.int64)  # [MoE layers, experts]
        metrics["moe/max_vio"] = float((load.max(1) / load.mean(1) - 1).mean())
    return metrics
