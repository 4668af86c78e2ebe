"""Importance weights for the gap between the policy that sampled and the policy that is trained.

The rollout engine and the trainer run different kernels, so the same weights give slightly different log-probs. The
sampled tokens then come from a policy other than the one whose gradient is taken; a weight per token corrects that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) = 4.9e8: far beyond any useful ratio, far below overflow.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights, and which of them were cut.

    Attributes:
        weights: ``[tokens]``, detached, in the dtype of the training log-probs.
        truncated: bool ``[tokens]``, True where the ratio was above the cap.
    """

    weights: Tensor
    truncated: Tensor


def safe_ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)`` with the exponent limited to +-20, so that one broken token cannot make the loss infinite."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def truncated_weights(train_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> ImportanceWeights:
    """Truncated importance sampling: ``min(pi_train / pi_rollout, cap)`` per token, without gradient.

    Args:
        train_logprobs: float ``[tokens]``, the trainer's log-probs under the weights that sampled ("old").
        rollout_logprobs: float ``[tokens]``, the engine's log-probs of the same tokens.
        cap: the largest weight, > 0; 2 is usual.

    Raises:
        ValueError: shapes differ or ``cap`` is not positive.

    Source:
        Truncation of importance weights: Ionides 2008, "Truncated Importance Sampling"; per token between rollout
        and training: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    if train_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"expected log-probs of the same tokens, got {list(train_logprobs.shape)} from training and "
            f"{list(rollout_logprobs.shape)} from rollout; pass both packed in the same order"
        )
    if not cap > 0:
        raise ValueError(f"expected an importance cap > 0, got {cap}; 2.0 is usual, None turns the weights off")
    train = train_logprobs.detach()
    ratio = safe_ratio(train - rollout_logprobs.detach().to(train.dtype))
    return ImportanceWeights(weights=ratio.clamp(max=cap), truncated=ratio > cap)
