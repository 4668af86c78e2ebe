"""Surrogate losses: what one token's log-prob is worth, before tokens are added up; see ``losses``.

Legend: "tokens" of one packed micro-batch, many sequences one after another; r the ratio new / old, A the advantage,
sg() stops the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.algorithms.importance import ratio_at, safe_ratio


@dataclass(frozen=True)
class TokenLoss:
    """What a policy loss gives: ``loss`` with gradient and ``clipped`` (bool, gradient cut), both ``[tokens]``."""

    loss: Tensor
    clipped: Tensor


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """PPO's clipped surrogate, ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`` with ``r = exp(new - old)``.

    All tensors ``[tokens]``; the result has a gradient towards ``logprobs`` only. ``clipped`` marks tokens whose
    gradient is zero: the clipped branch is strictly larger, or, with ``dual_clip``, A < 0 and the loss is at its limit
    ``-dual_clip A``.

    Source:
        PPO, arXiv:1707.06347, equation 7; two-sided bounds: DAPO, arXiv:2503.14476, section 3.1; dual clip: Ye et al.,
        arXiv:1912.09729, section 4.2.
    """
    ratio = safe_ratio(logprobs - old_logprobs.detach())
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> TokenLoss:
    advantage = advantages.detach()
    plain = -advantage * ratio
    limited = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, clipped = torch.maximum(plain, limited), limited > plain
    if dual_clip is not None:
        most = -advantage * dual_clip
        at_most = (advantage < 0) & (loss > most)
        loss, clipped = torch.where(at_most, most, loss), clipped | at_most
    return TokenLoss(loss=loss, clipped=clipped.detach())


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sample_index: Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """PPO's clipped surrogate of the sequence's ratio ``s = exp(mean over its tokens of (new - old))``.

    The form per token (GSPO-token) of the same value: ``s_t = sg(s) exp(new_t - sg(new_t))``, whose gradient goes to
    the token's own log-prob. With one advantage per sequence and the aggregation ``sequence_mean`` its gradient is that
    of GSPO; advantages may also differ over tokens. A sequence is clipped as a whole, as far as their signs agree.

    All tensors ``[tokens]``, ``mask`` bool, ``sample_index`` int64; unmasked log-probs must be finite.

    Source:
        GSPO, arXiv:2507.18071, equations 5-7 and 13-14.
    """
    ratio = ratio_at((logprobs - old_logprobs).detach(), "sequence_mean", mask, sample_index)
    return _clipped_surrogate(ratio * torch.exp(logprobs - logprobs.detach()), advantages, clip_low, clip_high)


def ppo_sequence(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sample_index: Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """PPO's clipped surrogate with a whole response as one action: ``r = exp(sum over its tokens of (new - old))``.

    Every token has the value and gradient of its sequence, so the aggregation is ``sequence_mean``. On-policy the
    gradient is that of REINFORCE, ``-A sum_t grad log pi``: every token counts in full, however long the response is.

    All tensors ``[tokens]``, ``mask`` bool, ``sample_index`` int64; unmasked log-probs must be finite.

    Source:
        A response as one action: RLOO, arXiv:2402.14740, section 3.2; with the clipped ratio: TRL's RLOO trainer.
    """
    ratio = ratio_at(logprobs - old_logprobs.detach(), "sequence", mask, sample_index)
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high)


def cispo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> TokenLoss:
    """REINFORCE with a clipped importance weight: ``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi``.

    No token loses its gradient; ``clipped`` marks those whose weight was. ``clip_low`` of 1 is no lower bound. All
    tensors ``[tokens]``; the result has a gradient towards ``logprobs`` only.

    Source:
        CISPO: MiniMax-M1, arXiv:2506.13585, equations 4 and 5.
    """
    ratio = safe_ratio((logprobs - old_logprobs).detach())
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLoss(loss=-weight * advantages.detach() * logprobs, clipped=weight != ratio)
