"""Advantages: from one reward per sample to one number per response token.

Legend: N samples; R_i response tokens of sample i; "tokens" = sum of R_i, samples one after another.

An advantage estimator is an ``AdvantageFn``: it takes an ``AdvantageInput`` and gives an ``AdvantageResult`` with one
value per response token, so that the loop treats outcome estimators (GRPO: one value per sample, repeated) and
per-token estimators (GAE) alike. ``ADVANTAGES`` maps the name in a config file to the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageInput:
    """What an estimator may use.

    Attributes:
        rewards: float ``[N]``, one per sample, finite.
        group_ids: int ``[N]``; samples of one prompt share an id. Any integers, in any order.
        lengths: int ``[N]``, response tokens R_i of each sample.
        values: float ``[tokens]``, a critic's estimates; only for estimators that need one.
        token_rewards: float ``[tokens]``, added to the outcome reward (for example a KL penalty); None for none.
    """

    rewards: Tensor
    group_ids: Tensor
    lengths: Tensor
    values: Tensor | None = None
    token_rewards: Tensor | None = None


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of the estimators; each reads what concerns it.

    Attributes:
        normalize_std: divide by the standard deviation of the group (GRPO). False is the unbiased form of Dr. GRPO.
        eps: added to that standard deviation, in units of reward.
    """

    normalize_std: bool = True
    eps: float = 1e-6


@dataclass(frozen=True)
class AdvantageResult:
    """What an estimator gives.

    Attributes:
        advantages: float32 ``[tokens]``.
        metrics: plain numbers for the log, for example ``"degenerate_groups"``.
    """

    advantages: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)

    def split(self, lengths: Tensor) -> tuple[Tensor, ...]:
        """One float32 ``[R_i]`` per sample."""
        return torch.split(self.advantages, [int(length) for length in lengths])


class AdvantageFn(Protocol):
    """An advantage estimator. Pure: same input, same output, nothing changed in place."""

    def __call__(self, batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult: ...


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of samples compared inside their group.

    Attributes:
        advantages: float32 ``[N]``.
        groups: number of groups.
        single_groups: groups of one sample: nothing to compare with, advantage 0.
        equal_groups: groups of two or more whose rewards are all equal: advantage 0, no gradient.
    """

    advantages: Tensor
    groups: int
    single_groups: int
    equal_groups: int


def grpo(rewards: Tensor, group_ids: Tensor, normalize_std: bool = True, eps: float = 1e-6) -> GroupAdvantages:
    """Group-relative advantage ``(r - mean) / (std + eps)`` over the samples of one prompt.

    ``std`` is the sample standard deviation (n - 1 in the denominator), as in TRL and verl. Groups of one sample and
    groups with equal rewards get exactly 0. Worked in float64.

    Args:
        rewards: float or int ``[N]``, finite.
        group_ids: int ``[N]``.
        normalize_std: False leaves out the division (Dr. GRPO, arXiv:2503.20783, section 3.1).
        eps: added to the standard deviation.

    Raises:
        ValueError: shapes differ, or a reward is NaN or infinite.

    Source:
        DeepSeekMath, arXiv:2402.03300, section 4.1.2 (outcome supervision).
    """
    _check_rewards(rewards, group_ids)
    _, group, size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    reward = rewards.to(torch.float64)
    groups = size.numel()

    zeros = torch.zeros(groups, dtype=torch.float64, device=reward.device)
    mean = zeros.index_add(0, group, reward) / size
    centred = reward - mean[group]
    if normalize_std:
        variance = zeros.index_add(0, group, centred.square()) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[group]

    # By comparison, not by variance: the mean of equal numbers may differ from them in the last bit.
    highest = zeros.scatter_reduce(0, group, reward, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, reward, "amin", include_self=False)
    degenerate = highest == lowest
    advantages = torch.where(degenerate[group], torch.zeros_like(centred), centred)
    single = int((size == 1).sum())
    return GroupAdvantages(
        advantages=advantages.to(torch.float32),
        groups=groups,
        single_groups=single,
        equal_groups=int(degenerate.sum()) - single,
    )


def repeat_over_tokens(per_sample: Tensor, lengths: Tensor) -> Tensor:
    """``[N]`` values to ``[tokens]``: the value of sample i for each of its R_i tokens."""
    return torch.repeat_interleave(per_sample, lengths)


def grpo_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """``grpo`` as an ``AdvantageFn``: every token of a sample gets the advantage of the sample.

    Raises:
        ValueError: see ``grpo``; or ``token_rewards`` are given, which an outcome estimator would ignore.
    """
    if batch.token_rewards is not None:
        raise ValueError(
            "grpo takes one reward per sample, but token_rewards were given and would be ignored; "
            "put the KL penalty in the loss instead, or choose an estimator with per-token rewards"
        )
    result = grpo(batch.rewards, batch.group_ids, config.normalize_std, config.eps)
    return AdvantageResult(
        advantages=repeat_over_tokens(result.advantages, batch.lengths),
        metrics={
            "groups": float(result.groups),
            "single_groups": float(result.single_groups),
            "equal_groups": float(result.equal_groups),
            "degenerate_groups": float(result.single_groups + result.equal_groups),
        },
    )


def zero_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """All zeros: the control run, in which nothing may be learned from rewards."""
    _check_rewards(batch.rewards, batch.group_ids)
    total = int(batch.lengths.sum())
    return AdvantageResult(torch.zeros(total, dtype=torch.float32, device=batch.rewards.device))


ADVANTAGES: dict[str, AdvantageFn] = {
    "grpo": grpo_advantages,
    "zero": zero_advantages,
}


def get_advantage_fn(name: str) -> AdvantageFn:
    """The estimator of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"unknown advantage estimator {name!r}; choose one of {', '.join(sorted(ADVANTAGES))}")
    return ADVANTAGES[name]


def _check_rewards(rewards: Tensor, group_ids: Tensor) -> None:
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"expected rewards [N] and group_ids [N], got {list(rewards.shape)} and {list(group_ids.shape)}; "
            "pass one reward and one group id for each sample"
        )
    finite = torch.isfinite(rewards)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(
            f"expected finite rewards, got NaN or infinity at {bad[:20]} ({len(bad)} of {len(rewards)} samples); "
            "leave samples without a reward out before computing advantages"
        )
