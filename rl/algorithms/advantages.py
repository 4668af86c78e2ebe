"""Advantages: from one reward per sample to one number per response token.

Legend: N samples; R_i response tokens of sample i; "tokens" = sum of R_i, samples one after another.

An advantage estimator is an ``AdvantageFn``: it takes an ``AdvantageInput`` and gives an ``AdvantageResult`` with one
value per response token, so that the loop treats outcome estimators (GRPO: one value per sample, repeated) and
per-token estimators (GAE, REINFORCE++) alike. ``ADVANTAGES`` maps the name in a config file to the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        learnt: int ``[N]``, how many of the first tokens of each sample are learnt from; None: all R_i. Estimators per
            token see no others.
    """

    rewards: Tensor
    group_ids: Tensor
    lengths: Tensor
    values: Tensor | None = None
    token_rewards: Tensor | None = None
    learnt: Tensor | None = None


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of the estimators; each reads what concerns it.

    Attributes:
        normalize_std: divide by the standard deviation of the group (GRPO). False is the unbiased form of Dr. GRPO.
        eps: added to that standard deviation, in units of reward.
        gamma: discount per token (GAE, REINFORCE++), in [0, 1].
        lam: lambda of GAE, in [0, 1]: 0 trusts values (one step), 1 trusts rewards (Monte Carlo).
        whiten: of GAE, shift and scale the batch's advantages to mean 0 and standard deviation 1 over learnt tokens.
    """

    normalize_std: bool = True
    eps: float = 1e-6
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True


@dataclass(frozen=True)
class AdvantageResult:
    """What an estimator gives.

    Attributes:
        advantages: float32 ``[tokens]``.
        metrics: plain numbers for the log, for example ``"degenerate_groups"``.
        returns: float32 ``[tokens]``, what a critic's values should be; None of estimators without one.
    """

    advantages: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)
    returns: Tensor | None = None

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
    groups = _compare(rewards, group_ids)
    if not normalize_std:
        return groups.advantages(groups.centred)
    squares = torch.zeros_like(groups.size, dtype=torch.float64).index_add(0, groups.index, groups.centred.square())
    deviation = (squares / (groups.size - 1).clamp(min=1)).sqrt()
    return groups.advantages(groups.centred / (deviation + eps)[groups.index])


def rloo(rewards: Tensor, group_ids: Tensor) -> GroupAdvantages:
    """REINFORCE leave-one-out: ``r_i`` minus the mean reward of the other samples of its prompt.

    Of a group of n that is ``n / (n - 1) (r_i - mean)``, which is how it is computed. Groups of one sample have nothing
    to compare with, and get 0 as groups with equal rewards do. Worked in float64.

    Args:
        rewards: float or int ``[N]``, finite.
        group_ids: int ``[N]``.

    Raises:
        ValueError: shapes differ, or a reward is NaN or infinite.

    Source:
        Ahmadian et al., arXiv:2402.14740, equation 8; Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for
        Free!".
    """
    groups = _compare(rewards, group_ids)
    factor = groups.size / (groups.size - 1).clamp(min=1)
    return groups.advantages(groups.centred * factor[groups.index])


@dataclass(frozen=True)
class _Compared:
    """Samples beside those of their group. G groups.

    Attributes:
        centred: float64 ``[N]``, reward minus the group's mean.
        index: int64 ``[N]``, which group.
        size: int64 ``[G]``.
        degenerate: bool ``[G]``, all rewards of the group are equal.
    """

    centred: Tensor
    index: Tensor
    size: Tensor
    degenerate: Tensor

    def advantages(self, values: Tensor) -> GroupAdvantages:
        """``values`` ``[N]``, with 0 in degenerate groups."""
        single = int((self.size == 1).sum())
        return GroupAdvantages(
            advantages=torch.where(self.degenerate[self.index], torch.zeros_like(values), values).to(torch.float32),
            groups=self.size.numel(),
            single_groups=single,
            equal_groups=int(self.degenerate.sum()) - single,
        )


def _compare(rewards: Tensor, group_ids: Tensor) -> _Compared:
    _check_rewards(rewards, group_ids)
    _, index, size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    reward = rewards.to(torch.float64)
    zeros = torch.zeros(size.numel(), dtype=torch.float64, device=reward.device)
    mean = zeros.index_add(0, index, reward) / size
    # By comparison, not by variance: the mean of equal numbers may differ from them in the last bit.
    highest = zeros.scatter_reduce(0, index, reward, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, index, reward, "amin", include_self=False)
    return _Compared(reward - mean[index], index, size, highest == lowest)


def repeat_over_tokens(per_sample: Tensor, lengths: Tensor) -> Tensor:
    """``[N]`` values to ``[tokens]``: the value of sample i for each of its R_i tokens."""
    return torch.repeat_interleave(per_sample, lengths)


def grpo_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """``grpo`` as an ``AdvantageFn``: every token of a sample gets the advantage of the sample.

    Raises:
        ValueError: see ``grpo``; or ``token_rewards`` are given, which an outcome estimator would ignore.
    """
    _refuse_token_rewards("grpo", batch)
    return _of_samples(batch, grpo(batch.rewards, batch.group_ids, config.normalize_std, config.eps))


def dr_grpo_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """``grpo`` without the division by the standard deviation, whatever ``normalize_std`` says.

    The other half of Dr. GRPO is the loss's aggregation, ``sequence_sum``.

    Raises:
        ValueError: see ``grpo_advantages``.

    Source:
        Liu et al., arXiv:2503.20783, section 3.1.
    """
    _refuse_token_rewards("dr_grpo", batch)
    return _of_samples(batch, grpo(batch.rewards, batch.group_ids, normalize_std=False))


def rloo_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """``rloo`` as an ``AdvantageFn``: every token of a sample gets the advantage of the sample.

    Raises:
        ValueError: see ``rloo``; or ``token_rewards`` are given, which an outcome estimator would ignore.
    """
    _refuse_token_rewards("rloo", batch)
    return _of_samples(batch, rloo(batch.rewards, batch.group_ids))


def reinforce_plus_plus_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """REINFORCE++: the discounted sum of the rewards from a token on, whitened over the batch's learnt tokens.

    With ``r_t`` the token reward (a KL penalty), to which the last learnt token adds the sample's reward,
    ``A_t = r_t + gamma A_{t+1}``: GAE of a critic that says 0, with lambda 1. No group is needed.

    Raises:
        ValueError: see ``gae_advantages``.

    Source:
        Hu et al., arXiv:2501.03262, section 3.
    """
    zeros = torch.zeros(int(batch.lengths.sum()), dtype=torch.float64, device=batch.rewards.device)
    result = gae_advantages(replace(batch, values=zeros), replace(config, lam=1.0, whiten=True))
    return replace(result, returns=None)


def reinforce_plus_plus_baseline_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """REINFORCE++ with the group's mean as baseline: ``r - mean``, whitened over the batch's learnt tokens.

    The scale is the batch's where GRPO takes each group's, so groups that nearly agree are not blown up. Groups of one
    sample and of equal rewards are 0 before whitening; tokens that are not learnt stay 0.

    Raises:
        ValueError: see ``grpo``; or ``token_rewards`` are given, which an outcome estimator would ignore.

    Source:
        Hu et al., arXiv:2501.03262 (REINFORCE++-baseline).
    """
    _refuse_token_rewards("reinforce++_baseline", batch)
    result = _of_samples(batch, grpo(batch.rewards, batch.group_ids, normalize_std=False))
    mask = learnt_tokens(batch)
    raw = result.advantages.to(torch.float64)
    metrics = {"advantage_mean": _mean(raw[mask]), "advantage_std": _std(raw[mask])}
    whitened = torch.where(mask, whiten(raw, mask), torch.zeros_like(raw))
    return AdvantageResult(whitened.to(torch.float32), {**result.metrics, **metrics})


def _refuse_token_rewards(name: str, batch: AdvantageInput) -> None:
    if batch.token_rewards is not None:
        raise ValueError(
            f"{name} takes one reward per sample, but token_rewards were given and would be ignored; "
            "put the KL penalty in the loss instead, or choose an estimator with per-token rewards"
        )


def _of_samples(batch: AdvantageInput, result: GroupAdvantages) -> AdvantageResult:
    return AdvantageResult(
        advantages=repeat_over_tokens(result.advantages, batch.lengths),
        metrics={
            "groups": float(result.groups),
            "single_groups": float(result.single_groups),
            "equal_groups": float(result.equal_groups),
            "degenerate_groups": float(result.single_groups + result.equal_groups),
        },
    )


def learnt_tokens(batch: AdvantageInput) -> Tensor:
    """Which response tokens are learnt from, bool ``[tokens]``."""
    lengths = batch.lengths.to(torch.int64)
    learnt = lengths if batch.learnt is None else batch.learnt.to(torch.int64)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    position = torch.arange(int(lengths.sum()), device=lengths.device) - starts
    return position < torch.repeat_interleave(learnt, lengths)


def zero_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """All zeros: the control run, in which nothing may be learned from rewards."""
    _check_rewards(batch.rewards, batch.group_ids)
    total = int(batch.lengths.sum())
    return AdvantageResult(torch.zeros(total, dtype=torch.float32, device=batch.rewards.device))


def gae_advantages(batch: AdvantageInput, config: AdvantageConfig) -> AdvantageResult:
    """Generalised advantage estimation over the tokens of each sample: a token is a step, its value the state's before.

    With ``r_t`` the token reward, to which the last learnt token adds the sample's reward, and ``V`` the values,

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    return_t = A_t + V_t

    where ``V`` and ``A`` are 0 after the last learnt token. That is so for responses cut off at their longest length
    too: no value is bootstrapped for what would have followed (as in TRL and verl), because no row of the batch sees
    the last token; a reward of a response cut off is all there is of it.

    Whitening changes advantages, never returns. Worked in float64; tokens that are not learnt get 0.

    Raises:
        ValueError: shapes differ, values are missing, a number is not finite, or gamma or lambda is outside [0, 1].

    Source:
        Schulman et al., arXiv:1506.02438, equations 11-16; whitening and the reward at the last token: Ziegler et al.,
        arXiv:1909.08593.
    """
    values, token_rewards, learnt = _check_gae(batch, config)
    device = batch.rewards.device
    lengths = batch.lengths.to(torch.int64)
    starts = lengths.cumsum(0) - lengths
    longest = int(lengths.max()) if len(lengths) else 0
    # [N, longest], column t being token t of each sample: one short scan for all samples.
    column = torch.arange(longest, device=device)
    is_learnt = column[None] < learnt[:, None]
    index = (starts[:, None] + column[None]).clamp(max=max(0, len(values) - 1))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    value = torch.where(is_learnt, values.to(torch.float64)[index], zero)
    reward = torch.where(is_learnt, token_rewards.to(torch.float64)[index], zero)
    ends_here = column[None] == (learnt - 1)[:, None]
    reward = reward + torch.where(ends_here, batch.rewards.to(torch.float64)[:, None], zero)

    padded = torch.zeros_like(value)
    following_value = following = torch.zeros(len(lengths), dtype=torch.float64, device=device)
    for t in range(longest - 1, -1, -1):
        delta = reward[:, t] + config.gamma * following_value - value[:, t]
        following = torch.where(is_learnt[:, t], delta + config.gamma * config.lam * following, zero)
        following_value = value[:, t]
        padded[:, t] = following

    is_token = column[None] < lengths[:, None]
    advantages, returns, mask = padded[is_token], (padded + value)[is_token], is_learnt[is_token]
    metrics = {"advantage_mean": _mean(advantages[mask]), "advantage_std": _std(advantages[mask])}
    if config.whiten:
        advantages = torch.where(mask, whiten(advantages, mask), zero)
    return AdvantageResult(advantages.to(torch.float32), metrics, returns.to(torch.float32))


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and (sample) standard deviation 1 over the unmasked, ``[tokens]`` each.

    Fewer than two of them, or all equal: shifted only.
    """
    chosen = values[mask]
    deviation = _std(chosen)
    return (values - _mean(chosen)) / (deviation + 1e-8 if deviation > 0 else 1.0)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0


def _std(values: Tensor) -> float:
    return float(values.std()) if values.numel() > 1 else 0.0


ADVANTAGES: dict[str, AdvantageFn] = {
    "dr_grpo": dr_grpo_advantages,
    "gae": gae_advantages,
    "grpo": grpo_advantages,
    "reinforce++": reinforce_plus_plus_advantages,
    "reinforce++_baseline": reinforce_plus_plus_baseline_advantages,
    "rloo": rloo_advantages,
    "zero": zero_advantages,
}

PER_TOKEN = frozenset({"gae", "reinforce++"})
"""Estimators that take rewards of single tokens, such as a KL penalty; the others take one reward per sample."""


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


def _check_gae(batch: AdvantageInput, config: AdvantageConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(values, token rewards, learnt tokens of each sample), as GAE needs them."""
    _check_rewards(batch.rewards, batch.group_ids)
    for name in ("gamma", "lam"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {getattr(config, name)}")
    if batch.values is None:
        raise ValueError("gae needs a critic's values [tokens], got none; run the critic's pass first")
    total = int(batch.lengths.sum())
    token_rewards = torch.zeros_like(batch.values) if batch.token_rewards is None else batch.token_rewards
    learnt = batch.lengths if batch.learnt is None else batch.learnt
    for name, given in (("values", batch.values), ("token_rewards", token_rewards)):
        if given.shape != (total,):
            raise ValueError(f"expected {name} [{total}], one for each response token, got {list(given.shape)}")
    if learnt.shape != batch.lengths.shape or bool(((learnt < 0) | (learnt > batch.lengths)).any()):
        raise ValueError(f"expected learnt tokens between 0 and {batch.lengths.tolist()}, got {learnt.tolist()}")
    learnt = learnt.to(torch.int64)
    is_learnt = learnt_tokens(batch)
    for name, given in (("values", batch.values), ("token_rewards", token_rewards)):
        bad = torch.nonzero(is_learnt & ~torch.isfinite(given)).flatten().tolist()
        if bad:
            raise ValueError(
                f"expected finite {name}, got NaN or infinity at {bad[:20]} ({len(bad)} of {total} tokens); look at "
                "what the critic or the reference was given"
            )
    return batch.values, token_rewards, learnt
