"""Importance weights for the gap between the policy that sampled and the policy that is trained.

The rollout engine and the trainer run different kernels, so the same weights give slightly different log-probs; and
samples may be of older weights. The sampled tokens then come from a policy other than the one whose gradient is taken;
a weight corrects that.

Each token's ratio is taken against the log-prob it was sampled with, so the behaviour policy of a sample that began
under one weight version and went on under another is exactly what each token says, at every ``level``.

Legend: "tokens" of one packed micro-batch; a sequence is never split over micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "sequence_mean"]
LEVELS = ("token", "sequence", "sequence_mean")

# exp(20) = 4.9e8: far beyond any useful ratio, far below overflow.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights, and which of them were cut.

    Attributes:
        weights: ``[tokens]``, detached, in the dtype of the training log-probs.
        truncated: bool ``[tokens]``, True where the ratio was above the cap.
        dropped: bool ``[tokens]``, True where the ratio was outside the band, so that the weight is 0; None: no band.
    """

    weights: Tensor
    truncated: Tensor
    dropped: Tensor | None = field(default=None)


def safe_ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)`` with the exponent limited to +-20, so that one broken token cannot make the loss infinite."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def ratio_at(log_ratio: Tensor, level: Level, mask: Tensor, sample_index: Tensor) -> Tensor:
    """Importance ratio of every token at a level, ``[tokens]``, with the gradient of ``log_ratio``.

    ===============  ==================================================================================
    level            ratio of a token
    ===============  ==================================================================================
    token            its own: ``exp(x_t)``; low variance, biased: tokens before it are not corrected
    sequence         that of its sequence: ``exp(sum x)``; unbiased, its variance grows with the length
    sequence_mean    their geometric mean: ``exp(mean x)``, as in GSPO; comparable over lengths
    ===============  ==================================================================================

    Sums and means are over unmasked tokens; a masked token gets the ratio of its sequence. Exponents are limited to
    +-20.

    Args:
        log_ratio: x, ``[tokens]``, finite at unmasked tokens.
        level: see above.
        mask: bool ``[tokens]``.
        sample_index: int64 ``[tokens]``, the sequence of each token, from 0.

    Raises:
        ValueError: unknown level.

    Source:
        Geometric mean: GSPO, arXiv:2507.18071, equation 7.
    """
    if level == "token":
        return safe_ratio(log_ratio)
    if level not in LEVELS:
        raise ValueError(f"unknown importance level {level!r}; choose {', '.join(LEVELS)}")
    # There are no more sequences than tokens: sizing by tokens keeps the device from being asked for the largest index.
    masked = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    total = torch.zeros_like(masked).index_add(0, sample_index, masked)
    if level == "sequence_mean":
        tokens = torch.zeros_like(masked).index_add(0, sample_index, mask.to(masked.dtype))
        total = total / tokens.clamp(min=1)
    return safe_ratio(total)[sample_index]


def importance_weights(
    train_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sample_index: Tensor,
    *,
    level: Level = "token",
    cap: float | None = None,
    band: tuple[float, float] | None = None,
) -> ImportanceWeights:
    """Importance weights between rollout and training, truncated and masked, without gradient.

    With ``w`` the ratio at ``level``: a weight is ``min(w, cap)``, and 0 where ``w`` is outside ``band``, so that the
    token (at the levels of sequences: the whole sequence) is not learnt from. Denominators of the loss stay what they
    are: a dropped token counts as one with loss 0.

    Args:
        train_logprobs: float ``[tokens]``, the trainer's log-probs under the weights before the update ("old").
        rollout_logprobs: float ``[tokens]``, the engine's log-probs of the same tokens.
        mask, sample_index, level: see ``ratio_at``.
        cap: the largest weight, > 0; None: none.
        band: lowest and highest ratio that is learnt from, ``0 <= low < high``; None: all.

    Raises:
        ValueError: shapes differ, or a cap, band or level that is none.

    Source:
        Truncation: Ionides 2008, "Truncated Importance Sampling"; per token between rollout and training: Yao et al.
        2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training". Masked, per token and with a
        band on both sides: IcePop, arXiv:2510.18855. Sequence-level, truncated and masked: Liu, Li et al. 2025, "When
        Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch".
    """
    if train_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"expected log-probs of the same tokens, got {list(train_logprobs.shape)} from training and "
            f"{list(rollout_logprobs.shape)} from rollout; pass both packed in the same order"
        )
    if cap is not None and not cap > 0:
        raise ValueError(f"expected an importance cap > 0, got {cap}; 2.0 is usual, None turns it off")
    if band is not None and not 0 <= band[0] < band[1]:
        raise ValueError(f"expected an importance band 0 <= low < high, got {band}; (0.5, 5.0) is IcePop's")
    train = train_logprobs.detach()
    ratio = ratio_at(train - rollout_logprobs.detach().to(train.dtype), level, mask, sample_index)
    weights, truncated = ratio, torch.zeros_like(mask)
    if cap is not None:
        weights, truncated = ratio.clamp(max=cap), ratio > cap
    if band is None:
        return ImportanceWeights(weights, truncated)
    dropped = (ratio < band[0]) | (ratio > band[1])
    return ImportanceWeights(weights.masked_fill(dropped, 0.0), truncated & ~dropped, dropped)
