"""Policy losses on packed tokens, in a form that adds up exactly over micro-batches and ranks.

Legend: "tokens" are the rows of one packed micro-batch, many samples one after another; "sequences" its samples.

1. Each loss gives one number per token; ``aggregate`` sums the unmasked ones, each weighted by a denominator of the
   whole mini-batch (``Normaliser``), which the caller counts once over all micro-batches and data-parallel ranks.
2. So the sum of ``policy_loss`` over all micro-batches of all ranks is the loss of the full batch, for any packing.
   Gradients must therefore be summed, not averaged, over micro-batches and data-parallel ranks.
3. Masked tokens contribute nothing, to value or gradient, whatever is in their rows (NaN included).
4. Metrics are sums over unmasked tokens; the caller adds them up and divides by the total number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from rl.algorithms.importance import LEVELS, MAX_LOG_RATIO, Level, importance_weights, safe_ratio
from rl.algorithms.surrogates import TokenLoss, cispo, gspo, ppo_clip, ppo_sequence

KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]
KL_ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of ``policy_loss``.

    Attributes:
        name: which of ``POLICY_LOSSES``.
        clip_low: the ratio is clipped below ``1 - clip_low``; >= 0.
        clip_high: and above ``1 + clip_high``; >= 0. Larger than ``clip_low`` is DAPO's clip-higher.
        dual_clip: of ``ppo_clip``: of a negative advantage A the loss is at most ``-dual_clip A``; > 1. None: no limit.
        aggregation: ``"token_mean"``: every token weighs the same; ``"sequence_mean"``: every sequence does;
            ``"sequence_sum"``: every token does, and the denominator is a constant (Dr. GRPO).
        sequence_length: of ``sequence_sum``, tokens that a sequence counts for, > 0; the longest response is usual.
        kl_coef: weight of the KL to the reference in the loss; 0 needs no reference.
        kl_estimator: see ``kl``.
        kl_weighted: multiply the KL of a token by its ratio new / old; of k1 and k3, see ``kl``.
        entropy_coef: weight of the entropy bonus (subtracted from the loss).
        importance_cap: cap of the importance weight between rollout and training; None for none.
        importance_band: lowest and highest ratio between them that is learnt from; None for all.
        importance_level: of those two; see ``rl.algorithms.importance.ratio_at``. Without both there are no weights.
    """

    name: str = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: Aggregation = "token_mean"
    sequence_length: float = 1.0
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_weighted: bool = False
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    importance_band: tuple[float, float] | None = None
    importance_level: Level = "token"

    @property
    def weighs(self) -> bool:
        """Whether tokens have importance weights."""
        return self.importance_cap is not None or self.importance_band is not None

    def violations(self) -> list[str]:
        """Everything wrong with the settings, a sentence each; empty when all is well."""
        found: list[str] = []
        if self.name not in POLICY_LOSSES:
            found.append(f"name: expected one of {', '.join(sorted(POLICY_LOSSES))}, got {self.name!r}")
        if not self.clip_low >= 0:
            found.append(f"clip_low: expected >= 0, got {self.clip_low}; the ratio is clipped below 1 - clip_low")
        if not self.clip_high >= 0:
            found.append(f"clip_high: expected >= 0, got {self.clip_high}; the ratio is clipped above 1 + clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            found.append(f"dual_clip: expected > 1 or null, got {self.dual_clip}; 3.0 is usual")
        if self.dual_clip is not None and self.name != "ppo_clip":
            found.append(f"dual_clip: only ppo_clip has it, and the loss is {self.name}; set it to null")
        for name, known in (
            ("aggregation", AGGREGATIONS),
            ("kl_estimator", KL_ESTIMATORS),
            ("importance_level", LEVELS),
        ):
            if getattr(self, name) not in known:
                found.append(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.kl_weighted and self.kl_estimator not in ("k1", "k3"):
            found.append(f"kl_weighted: unbiased with k1 and k3 only, got {self.kl_estimator!r}; choose one of them")
        if not self.sequence_length > 0:
            found.append(f"sequence_length: expected > 0 tokens, got {self.sequence_length}")
        if self.importance_cap is not None and not self.importance_cap > 0:
            found.append(f"importance_cap: expected > 0 or null, got {self.importance_cap}; 2.0 is usual")
        if self.importance_band is not None and not 0 <= self.importance_band[0] < self.importance_band[1]:
            found.append(f"importance_band: expected 0 <= low < high or null, got {self.importance_band}")
        return found


@dataclass(frozen=True)
class PolicyTokens:
    """One packed micro-batch, every field ``[tokens]``.

    Attributes:
        logprobs: of the policy being trained, with gradient.
        advantages: no gradient.
        mask: bool, True for response tokens to learn from.
        sample_index: int64, which of the micro-batch's sequences the token belongs to, from 0.
        old_logprobs: of the policy before this mini-batch step, computed by the trainer, no gradient. None: they
            were not recomputed, and the ratio is taken against ``rollout_logprobs``.
        rollout_logprobs: of the engine that sampled.
        ref_logprobs: of the reference policy.
        entropy: of the policy being trained; with gradient when it is to be rewarded.
    """

    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sample_index: Tensor
    old_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Normaliser:
    """Denominators of a whole mini-batch: over all its micro-batches on all data-parallel ranks.

    Attributes:
        total_tokens: unmasked tokens of the mini-batch.
        total_sequences: sequences of the mini-batch with at least one unmasked token.
        sequence_tokens: ``[sequences]`` of this micro-batch, unmasked tokens of each whole sequence, indexed by
            ``sample_index``; needed for ``sequence_mean`` only.
    """

    total_tokens: float
    total_sequences: float
    sequence_tokens: Tensor | None = None


class PolicyLossFn(Protocol):
    """A policy loss per token.

    It gets masked tokens as zeros and ``old_logprobs`` always set; a sequence is never split over micro-batches, so
    sequence-level ratios can be taken with ``mask`` and ``sample_index``.
    """

    def __call__(self, tokens: PolicyTokens, old_logprobs: Tensor, config: PolicyLossConfig) -> TokenLoss: ...


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator, weight: Tensor | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) at sampled tokens, ``[tokens]``, with gradient to ``logprobs``.

    With ``x = logprobs - ref_logprobs`` and tokens sampled from the policy:

    ==== ===================== ================== ==========================================================
    name value                 d value/d logprobs as a loss, on-policy
    ==== ===================== ================== ==========================================================
    k1   ``x``                 1                  value unbiased, any sign; gradient has mean 0: for logs only
    k2   ``x^2 / 2``           ``x``              value biased; gradient is that of KL(policy || reference)
    k3   ``exp(-x) - 1 + x``   ``1 - exp(-x)``    value unbiased, >= 0; gradient is that of KL(reference || policy)
    k1+  ``x``                 ``x``              value and gradient unbiased, of KL(policy || reference)
    k3+  ``exp(-x) - 1 + x``   ``x``              value and gradient unbiased, and the value >= 0
    ==== ===================== ================== ==========================================================

    ``weight`` is the ratio ``pi / pi_old`` with its gradient: the product is unbiased for tokens that the old policy
    sampled, and so is its gradient with k1 and k3 (that of the weight makes it so). The exponent of k3 is limited to
    +-20.

    Raises:
        ValueError: unknown estimator.

    Source:
        Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html); k3 in the loss: DeepSeekMath,
        arXiv:2402.03300, equation 4; gradients, and that of k2 under other values: Tang and Munos, arXiv:2506.09477;
        weighted: DeepSeek-V3.2, arXiv:2512.02556, section 3.1.
    """
    log_ratio = logprobs - ref_logprobs.detach()
    if estimator == "k1":
        value = log_ratio
    elif estimator == "k2":
        value = 0.5 * log_ratio.square()
    elif estimator == "k3":
        value = safe_ratio(-log_ratio) - 1 + log_ratio
    elif estimator in ("k1+", "k3+"):
        of_gradient = 0.5 * log_ratio.square()
        of_value = log_ratio if estimator == "k1+" else safe_ratio(-log_ratio) - 1 + log_ratio
        value = of_value.detach() + of_gradient - of_gradient.detach()
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose {', '.join(KL_ESTIMATORS)}")
    return value if weight is None else value * weight


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    mode: Aggregation,
    normaliser: Normaliser,
    sample_index: Tensor | None = None,
    sequence_length: float = 1.0,
) -> Tensor:
    """This micro-batch's additive share of the mini-batch mean, a scalar.

    ``token_mean``: sum over unmasked tokens / ``total_tokens``. ``sequence_mean``: sum over unmasked tokens, each /
    (tokens of its sequence x ``total_sequences``). ``sequence_sum``: sum over unmasked tokens / (``sequence_length`` x
    ``total_sequences``), so that no response's length changes what its tokens count. Summed over all micro-batches and
    ranks this is the full-batch mean, whatever the packing.

    Args:
        per_token: ``[tokens]``.
        mask: bool ``[tokens]``.
        mode: see above; token-level mean: DAPO, arXiv:2503.14476, section 3.3; sequence-level: DeepSeekMath,
            arXiv:2402.03300, equation 3; sum over a constant: Dr. GRPO, arXiv:2503.20783, section 3.2.
        normaliser: counts of the whole mini-batch.
        sample_index: int64 ``[tokens]``, for ``sequence_mean``.
        sequence_length: for ``sequence_sum``, tokens; 1 sums over the tokens of a sequence.

    Raises:
        ValueError: unknown mode, or ``sequence_mean`` without the counts it needs.
    """
    masked = torch.where(mask, per_token, torch.zeros_like(per_token))
    if mode == "token_mean":
        return masked.sum() / normaliser.total_tokens
    if mode == "sequence_mean":
        if normaliser.sequence_tokens is None or sample_index is None:
            raise ValueError(
                "sequence_mean needs Normaliser.sequence_tokens [sequences] and sample_index [tokens]; "
                "count them with sequence_token_counts"
            )
        length = normaliser.sequence_tokens.to(masked.dtype).clamp(min=1)[sample_index]
        return (masked / length).sum() / normaliser.total_sequences
    if mode == "sequence_sum":
        return masked.sum() / (sequence_length * normaliser.total_sequences)
    raise ValueError(f"unknown aggregation {mode!r}; choose {', '.join(AGGREGATIONS)}")


def sequence_token_counts(mask: Tensor, sample_index: Tensor, sequences: int) -> Tensor:
    """Unmasked tokens of each sequence of a micro-batch, int64 ``[sequences]``.

    Add ``.sum()`` and ``(counts > 0).sum()`` over micro-batches and ranks for the totals of a ``Normaliser``.
    """
    counts = torch.zeros(sequences, dtype=torch.int64, device=mask.device)
    return counts.index_add(0, sample_index, mask.to(torch.int64))


def sample_index_of(cu_seqlens: Tensor) -> Tensor:
    """From cumulative lengths ``[sequences + 1]`` (0 first) to the sequence of each token, int64 ``[tokens]``."""
    lengths = cu_seqlens.diff().to(torch.int64)
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)


def policy_loss(
    tokens: PolicyTokens, config: PolicyLossConfig, normaliser: Normaliser
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient x importance weight + KL to the reference - entropy bonus, of one micro-batch.

    Returns:
        The loss, a scalar in sum form (see the module's point 2), and detached metric sums over unmasked tokens:
        ``pg_loss``, ``pg_clipfrac``, ``ppo_kl`` (k1 of old against new), ``ratio``; where the inputs are there also
        ``kl``, ``entropy``, ``rollout_logprob_abs_diff``, ``rollout_kl`` (k3 of rollout against training),
        ``importance_weight``, ``importance_weight_squared`` (the squared mean weight over its mean is the effective
        fraction of samples), ``importance_truncated`` and, with a band, ``importance_dropped``. Which keys there are
        depends on config and on which fields are None, so it is the same for every micro-batch.

    Raises:
        ValueError: shapes differ, or a setting needs a field that is None.
    """
    _check_tokens(tokens, config)
    tokens = _zero_masked(tokens)
    old = tokens.old_logprobs if tokens.old_logprobs is not None else tokens.rollout_logprobs
    assert old is not None  # _check_tokens
    token_loss = POLICY_LOSSES[config.name](tokens, old, config)
    per_token = token_loss.loss
    log_ratio = tokens.logprobs.detach() - old
    rows = {
        "pg_clipfrac": token_loss.clipped,
        "ppo_kl": -log_ratio,
        "ratio": safe_ratio(log_ratio),
    }

    if tokens.rollout_logprobs is not None:
        trained = tokens.old_logprobs if tokens.old_logprobs is not None else tokens.logprobs
        difference = trained.detach() - tokens.rollout_logprobs
        rows["rollout_logprob_abs_diff"] = difference.abs()
        # Not safe_ratio(...) - 1: engines and trainer agree to digits that it would round away.
        rows["rollout_kl"] = torch.expm1(difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - difference
    if config.weighs and tokens.rollout_logprobs is not None:
        importance = importance_weights(
            old,
            tokens.rollout_logprobs,
            tokens.mask,
            tokens.sample_index,
            level=config.importance_level,
            cap=config.importance_cap,
            band=config.importance_band,
        )
        per_token = per_token * importance.weights
        rows["importance_weight"] = importance.weights
        rows["importance_weight_squared"] = importance.weights.square()
        rows["importance_truncated"] = importance.truncated
        if importance.dropped is not None:
            rows["importance_dropped"] = importance.dropped
    rows["pg_loss"] = per_token

    if tokens.ref_logprobs is not None:
        weight = safe_ratio(tokens.logprobs - old) if config.kl_weighted else None
        kl_row = kl(tokens.logprobs, tokens.ref_logprobs, config.kl_estimator, weight)
        rows["kl"] = kl_row
        if config.kl_coef != 0:
            per_token = per_token + config.kl_coef * kl_row
    if tokens.entropy is not None:
        rows["entropy"] = tokens.entropy
        if config.entropy_coef != 0:
            per_token = per_token - config.entropy_coef * tokens.entropy

    loss = aggregate(
        per_token, tokens.mask, config.aggregation, normaliser, tokens.sample_index, config.sequence_length
    )
    return loss, {name: _masked_sum(row, tokens.mask) for name, row in rows.items()}


def _ppo_clip_loss(tokens: PolicyTokens, old_logprobs: Tensor, config: PolicyLossConfig) -> TokenLoss:
    return ppo_clip(
        tokens.logprobs, old_logprobs, tokens.advantages, config.clip_low, config.clip_high, config.dual_clip
    )


def _cispo_loss(tokens: PolicyTokens, old_logprobs: Tensor, config: PolicyLossConfig) -> TokenLoss:
    return cispo(tokens.logprobs, old_logprobs, tokens.advantages, config.clip_low, config.clip_high)


def _of_sequences(loss: Callable[..., TokenLoss]) -> PolicyLossFn:
    def of_tokens(tokens: PolicyTokens, old_logprobs: Tensor, config: PolicyLossConfig) -> TokenLoss:
        return loss(
            tokens.logprobs,
            old_logprobs,
            tokens.advantages,
            tokens.mask,
            tokens.sample_index,
            config.clip_low,
            config.clip_high,
        )

    return of_tokens


POLICY_LOSSES: dict[str, PolicyLossFn] = {
    "cispo": _cispo_loss,
    "gspo": _of_sequences(gspo),
    "ppo_clip": _ppo_clip_loss,
    "ppo_sequence": _of_sequences(ppo_sequence),
}


def _masked_sum(row: Tensor, mask: Tensor) -> Tensor:
    """Sum over unmasked tokens, at least float32."""
    dtype = torch.float64 if row.dtype == torch.float64 else torch.float32
    return row.detach().to(dtype).masked_fill(~mask, 0).sum()


def _zero_masked(tokens: PolicyTokens) -> PolicyTokens:
    """Masked rows as zeros before any arithmetic: 0 x NaN in a backward pass would reach the weights."""

    def zeroed(row: Tensor | None) -> Tensor | None:
        return None if row is None else torch.where(tokens.mask, row, torch.zeros_like(row))

    return replace(
        tokens,
        logprobs=torch.where(tokens.mask, tokens.logprobs, torch.zeros_like(tokens.logprobs)),
        advantages=torch.where(tokens.mask, tokens.advantages, torch.zeros_like(tokens.advantages)),
        old_logprobs=zeroed(tokens.old_logprobs),
        rollout_logprobs=zeroed(tokens.rollout_logprobs),
        ref_logprobs=zeroed(tokens.ref_logprobs),
        entropy=zeroed(tokens.entropy),
    )


def _check_tokens(tokens: PolicyTokens, config: PolicyLossConfig) -> None:
    problems: list[str] = list(config.violations())
    shape = tokens.logprobs.shape
    for name in ("advantages", "mask", "sample_index", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy"):
        row: Tensor | None = getattr(tokens, name)
        if row is not None and row.shape != shape:
            problems.append(f"{name}: expected {list(shape)} like logprobs, got {list(row.shape)}")
    if tokens.mask.dtype != torch.bool:
        problems.append(f"mask: expected bool, got {tokens.mask.dtype}")
    if tokens.old_logprobs is None and tokens.rollout_logprobs is None:
        problems.append("old_logprobs: expected them or rollout_logprobs to take the ratio against, got neither")
    if config.kl_coef != 0 and tokens.ref_logprobs is None:
        problems.append(f"ref_logprobs: needed because kl_coef is {config.kl_coef}; pass them or set kl_coef to 0")
    if config.weighs and (tokens.old_logprobs is None or tokens.rollout_logprobs is None):
        problems.append(
            "importance_cap, importance_band: compare old_logprobs with rollout_logprobs, but one of them is missing; "
            "recompute old log-probs in the trainer or set both to null"
        )
    if config.entropy_coef != 0:
        if tokens.entropy is None:
            problems.append(f"entropy: needed because entropy_coef is {config.entropy_coef}")
        elif tokens.logprobs.requires_grad and not tokens.entropy.requires_grad:
            problems.append("entropy: has no gradient, so its bonus would do nothing; do not detach it")
    if problems:
        raise ValueError("policy_loss cannot be computed:\n  " + "\n  ".join(problems))
