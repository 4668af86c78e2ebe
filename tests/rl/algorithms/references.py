"""The algorithms once more, slowly and literally, one scalar at a time, from the papers' formulas.

Written apart from ``rl.algorithms``: nothing is imported from there. A batch is nested lists, ``[sample][token]``, of
scalar tensors (log-probs of the policy, whose gradients are compared too) and plain numbers (everything else).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Attributes: log-probs of the policy, of the policy before the update, of the reference; values of a critic;
    rewards and groups of samples; the longest response."""

    new: Sequence[Sequence[Tensor]]
    old: Sequence[Sequence[float]]
    reference: Sequence[Sequence[float]]
    values: Sequence[Sequence[float]]
    rewards: Sequence[float]
    groups: Sequence[int]
    longest: int
    beta: float


# ------------------------------------------------------------------ advantages


def group_of(batch: Batch, i: int) -> list[int]:
    return [j for j in range(len(batch.rewards)) if batch.groups[j] == batch.groups[i]]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """With n - 1 in the denominator."""
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def grpo_advantage(batch: Batch, rewards: Sequence[float], i: int) -> float:
    mine = [rewards[j] for j in group_of(batch, i)]
    return (rewards[i] - mean(mine)) / (deviation(mine) + 1e-6)


def dr_grpo_advantage(batch: Batch, rewards: Sequence[float], i: int) -> float:
    return rewards[i] - mean([rewards[j] for j in group_of(batch, i)])


def rloo_advantage(batch: Batch, rewards: Sequence[float], i: int) -> float:
    return rewards[i] - mean([rewards[j] for j in group_of(batch, i) if j != i])


def token_rewards(batch: Batch, i: int) -> list[float]:
    """Minus beta times k1 of the old policy to the reference, and the sample's reward at the end."""
    rewards = [-batch.beta * (o - r) for o, r in zip(batch.old[i], batch.reference[i], strict=True)]
    rewards[-1] += batch.rewards[i]
    return rewards


def kl_in_rewards(batch: Batch) -> list[float]:
    """One reward per sample: its own, less beta times the KL of all its tokens."""
    return [sum(token_rewards(batch, i)) for i in range(len(batch.rewards))]


def overlong(batch: Batch, buffer: int) -> list[float]:
    """DAPO, equation 13, added to the rewards; the longest response is that which is cut off."""
    shaped = []
    for i, reward in enumerate(batch.rewards):
        length, start = len(batch.new[i]), batch.longest - buffer
        if length <= start:
            shaped.append(reward)
        elif length <= batch.longest:
            shaped.append(reward + (start - length) / buffer)
        else:
            shaped.append(reward - 1)
    return shaped


def gae(batch: Batch, i: int, gamma: float, lam: float) -> list[float]:
    rewards, values = token_rewards(batch, i), [*batch.values[i], 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def whitened(advantages: Sequence[Sequence[float]]) -> list[list[float]]:
    every = [a for row in advantages for a in row]
    return [[(a - mean(every)) / (deviation(every) + 1e-8) for a in row] for row in advantages]


# ------------------------------------------------------------------ losses


def clipped(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """Minus the minimum of r A and clip(r, 1 - low, 1 + high) A."""
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(new: Tensor, reference: float) -> Tensor:
    return torch.exp(reference - new) - (reference - new) - 1


def token_losses(
    batch: Batch, advantages: Sequence[Sequence[float]], low: float, high: float, beta: float = 0.0
) -> list[list[Tensor]]:
    """Clipped loss of every token, plus beta times k3."""
    return [
        [
            clipped(torch.exp(new - batch.old[i][t]), advantages[i][t], low, high)
            + beta * k3(new, batch.reference[i][t])
            for t, new in enumerate(row)
        ]
        for i, row in enumerate(batch.new)
    ]


def over_tokens(losses: Sequence[Sequence[Tensor]]) -> Tensor:
    return sum(sum(row) for row in losses) / sum(len(row) for row in losses)


def over_sequences(losses: Sequence[Sequence[Tensor]]) -> Tensor:
    return sum(sum(row) / len(row) for row in losses) / len(losses)


def repeated(batch: Batch, advantages: Sequence[float]) -> list[list[float]]:
    return [[a] * len(row) for a, row in zip(advantages, batch.new, strict=True)]


def grpo(batch: Batch) -> Tensor:
    """DeepSeekMath, equation 3 with the advantage of section 4.1.2."""
    advantages = [grpo_advantage(batch, batch.rewards, i) for i in range(len(batch.rewards))]
    return over_sequences(token_losses(batch, repeated(batch, advantages), 0.2, 0.2, batch.beta))


def dr_grpo(batch: Batch) -> Tensor:
    """Understanding R1-Zero-like training, section 3.2: neither deviation nor length; the constant is the longest."""
    advantages = [dr_grpo_advantage(batch, batch.rewards, i) for i in range(len(batch.rewards))]
    losses = token_losses(batch, repeated(batch, advantages), 0.2, 0.2, batch.beta)
    return sum(sum(row) for row in losses) / (len(losses) * batch.longest)


def dapo(batch: Batch) -> Tensor:
    """DAPO, equation 8, with soft overlong punishment over a fifth of the longest length."""
    rewards = overlong(batch, max(1, batch.longest // 5))
    advantages = [grpo_advantage(batch, rewards, i) for i in range(len(rewards))]
    return over_tokens(token_losses(batch, repeated(batch, advantages), 0.2, 0.28, batch.beta))


def gspo(batch: Batch) -> Tensor:
    """GSPO, equation 5: one ratio for a response, its gradient through the mean over all tokens."""
    losses = []
    for i, row in enumerate(batch.new):
        ratio = torch.exp(sum(new - batch.old[i][t] for t, new in enumerate(row)) / len(row))
        policy = clipped(ratio, grpo_advantage(batch, batch.rewards, i), 3e-4, 4e-4)
        losses.append([policy + batch.beta * k3(new, batch.reference[i][t]) for t, new in enumerate(row)])
    return over_sequences(losses)


def cispo(batch: Batch) -> Tensor:
    """MiniMax-M1, equation 4, without a lower bound and with 5 as the upper one."""
    losses = []
    for i, row in enumerate(batch.new):
        advantage = grpo_advantage(batch, batch.rewards, i)
        weights = [min(math.exp(new.item() - batch.old[i][t]), 5.0) for t, new in enumerate(row)]
        policy = [-w * advantage * new for w, new in zip(weights, row, strict=True)]
        losses.append([p + batch.beta * k3(n, r) for p, n, r in zip(policy, row, batch.reference[i], strict=True)])
    return over_tokens(losses)


def rloo(batch: Batch) -> Tensor:
    """Back to Basics, equation 8, a response being one action; with PPO's clipped ratio of whole responses."""
    rewards = kl_in_rewards(batch)
    losses = []
    for i, row in enumerate(batch.new):
        ratio = torch.exp(sum(new - batch.old[i][t] for t, new in enumerate(row)))
        losses.append(clipped(ratio, rloo_advantage(batch, rewards, i), 0.2, 0.2))
    return sum(losses) / len(losses)


def reinforce_plus_plus(batch: Batch) -> Tensor:
    """REINFORCE++, section 3: rewards to come, normalised over the batch's tokens."""
    returns = []
    for i in range(len(batch.rewards)):
        rewards = token_rewards(batch, i)
        returns.append([sum(rewards[t:]) for t in range(len(rewards))])
    return over_tokens(token_losses(batch, whitened(returns), 0.2, 0.2))


def reinforce_plus_plus_baseline(batch: Batch) -> Tensor:
    """The same with the group's mean as baseline, and the KL in the loss."""
    advantages = [dr_grpo_advantage(batch, batch.rewards, i) for i in range(len(batch.rewards))]
    return over_tokens(token_losses(batch, whitened(repeated(batch, advantages)), 0.2, 0.2, batch.beta))


def ppo(batch: Batch) -> Tensor:
    """PPO, equation 7, with GAE of lambda 0.95 and whitened advantages."""
    advantages = [gae(batch, i, 1.0, 0.95) for i in range(len(batch.rewards))]
    return over_tokens(token_losses(batch, whitened(advantages), 0.2, 0.2))


REFERENCES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "ppo": ppo,
}
