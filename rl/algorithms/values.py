"""The critic's loss, in the same additive form as the policy's; see ``rl.algorithms.losses``.

The value of a token is that of the state before it: an estimate of the return from this token on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.algorithms.losses import Normaliser, aggregate


@dataclass(frozen=True)
class ValueTokens:
    """One packed micro-batch, every field ``[tokens]``.

    Attributes:
        values: of the critic being trained, with gradient.
        old_values: of the critic before this iteration's updates, no gradient.
        returns: what values should be, no gradient.
        mask: bool, True for tokens to learn from.
    """

    values: Tensor
    old_values: Tensor
    returns: Tensor
    mask: Tensor


def value_loss(tokens: ValueTokens, clip: float | None, normaliser: Normaliser) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error ``0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)``, mean over tokens.

    Args:
        tokens: of the micro-batch.
        clip: c, how far a value may move from the old one before its gradient is cut, in units of return; > 0. None
            for the plain squared error.
        normaliser: counts of the whole mini-batch; sums over all its micro-batches give the mini-batch's loss.

    Returns:
        The loss, a scalar in sum form, and detached metric sums over unmasked tokens: ``loss_sum``, ``clipfrac`` (the
        clipped branch is larger: no gradient), ``abs_error``.

    Raises:
        ValueError: shapes differ, or a clip that is not positive.

    Source:
        Clipping of values: the code of PPO (arXiv:1707.06347); Engstrom et al., arXiv:2005.12729, section 3.
    """
    _check(tokens, clip)
    zero = torch.zeros_like(tokens.values)
    # Masked rows as zeros before any arithmetic: 0 x NaN in a backward pass would reach the weights.
    values = torch.where(tokens.mask, tokens.values, zero)
    old, returns = (torch.where(tokens.mask, x.detach(), zero) for x in (tokens.old_values, tokens.returns))
    plain = (values - returns).square()
    clipped = torch.zeros_like(tokens.mask)
    squared = plain
    if clip is not None:
        limited = (torch.maximum(torch.minimum(values, old + clip), old - clip) - returns).square()
        squared, clipped = torch.maximum(plain, limited), (limited > plain).detach()
    per_token = 0.5 * squared
    loss = aggregate(per_token, tokens.mask, "token_mean", normaliser)
    rows = {"loss_sum": per_token, "clipfrac": clipped, "abs_error": (values - returns).abs()}
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return loss, {name: row.detach().to(wide).masked_fill(~tokens.mask, 0).sum() for name, row in rows.items()}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """``1 - Var(R - v) / Var(R)``: 1 for perfect values, 0 for a constant, below 0 for worse ones; ``[tokens]`` each.

    0 where returns do not vary, or there are fewer than two.
    """
    if returns.numel() < 2:
        return 0.0
    returns, values = returns.to(torch.float64), values.to(torch.float64)
    variance = float(returns.var())
    return 1.0 - float((returns - values).var()) / variance if variance > 0 else 0.0


def _check(tokens: ValueTokens, clip: float | None) -> None:
    shape = tokens.values.shape
    for name in ("old_values", "returns", "mask"):
        row: Tensor = getattr(tokens, name)
        if row.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} like values, got {list(row.shape)}; pass the same tokens")
    if tokens.mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {tokens.mask.dtype}; pass True for tokens to learn from")
    if clip is not None and not clip > 0:
        raise ValueError(f"expected a clip > 0 or None, got {clip}; 0.2 is usual")
