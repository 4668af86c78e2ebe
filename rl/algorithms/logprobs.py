"""Log-probs and entropy from logits that are split over the vocabulary, without a second copy of the logits.

Legend: tokens rows; V_local columns of this rank; V true vocabulary; T temperature; ``z = (logits - max) / T``.

1. Per row, the maximum over all ranks (one all-reduce of ``[tokens]``).
2. In chunks of rows: ``sum exp z``, the target's ``z`` and, for entropy, ``sum exp(z) z``; one all-reduce of
   ``[2 or 3, tokens]``.
3. ``logprob = z_target - log sum exp z`` and ``entropy = log sum exp z - sum exp(z) z / sum exp z``.
4. Backward computes the softmax again, chunk by chunk, from the logits and the saved per-row values; it needs no
   communication, and its only large tensor is the gradient itself.

The number of collectives does not depend on ``chunk_tokens``, and results of a row do not depend on other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp of it is 0 in fp64 too, and products with it stay finite in fp32.
LOWEST_Z = -1e30


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and the entropy of each row, under ``softmax(logits / temperature)``.

    Every rank of ``tp_group`` calls this with its columns and gets the same result. The gradient reaching a rank's
    logits is right when every rank has the same loss (Megatron's convention for its vocabulary-parallel loss).

    Args:
        logits: bf16, fp16, fp32 or fp64 ``[tokens, V_local]``; not changed.
        targets: int64 ``[tokens]``, ids in ``0..V-1``; rows to be ignored may hold any valid id.
        tp_group: the ranks that hold the other columns; None when all columns are here.
        vocab_start: the id of this rank's first column.
        temperature: what the logits are divided by, as in sampling; > 0.
        chunk_tokens: rows worked on at a time; the extra memory is a few ``[chunk_tokens, V_local]`` in fp32.
        vocab_size: V; columns of ids beyond it are padding: outside the softmax, gradient zero. None: no padding
            (with a ``tp_group``, V must be given).
        with_entropy: also return the entropy, in nats. Its gradient costs nothing unless it is used.

    Returns:
        ``(logprobs [tokens], entropy [tokens] or None)``, float64 for float64 logits, else float32.

    Raises:
        ValueError: wrong shapes or settings; or, on CPU, a target outside the vocabulary. On other devices such a
            row's log-prob is NaN, so that no step waits for the device.

    Source:
        The split into maximum, sum and target: Megatron-LM, arXiv:1909.08053, section 3.
    """
    if vocab_size is None and tp_group is None:
        vocab_size = vocab_start + logits.shape[-1]
    _check(logits, targets, vocab_start, temperature, chunk_tokens, vocab_size)
    logprobs, entropy = _VocabParallelLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, targets, tp_group, vocab_start, temperature, chunk_tokens, vocab_size, with_entropy
    )
    return logprobs, entropy


@torch.no_grad()
def is_most_likely(
    logits: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """Whether each target is what greedy decoding would choose, bool ``[tokens]``; arguments as above.

    A response all of whose tokens are most likely, each after the ones before it, is the greedy response. Of equally
    likely tokens all count.
    """
    if vocab_size is None and tp_group is None:
        vocab_size = vocab_start + logits.shape[-1]
    _check(logits, targets, vocab_start, 1.0, 1, vocab_size)
    assert vocab_size is not None
    real = _real_columns(logits, vocab_start, vocab_size)
    best = _row_max(logits, real, logits.dtype)
    column = targets - vocab_start
    here = (column >= 0) & (column < logits.shape[1])
    value = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    both = torch.stack([best, torch.where(here, value, torch.full_like(value, -torch.inf))])
    _all_reduce(both, dist.ReduceOp.MAX, tp_group)
    return both[1] >= both[0]


class _VocabParallelLogprobs(torch.autograd.Function):
    """The steps of the module docstring; saves the logits and per-row values only."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        vocab_start: int,
        temperature: float,
        chunk_tokens: int,
        vocab_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        real = _real_columns(logits, vocab_start, vocab_size)
        column = targets - vocab_start
        here = (column >= 0) & (column < real)
        column = torch.where(here, column, 0)

        row_max = _row_max(logits, real, dtype)
        _all_reduce(row_max, dist.ReduceOp.MAX, tp_group)

        # Rows: sum exp z; target z; sum exp(z) z.
        sums = torch.zeros(3 if with_entropy else 2, len(targets), dtype=dtype, device=logits.device)
        if real > 0:
            for rows in _chunks(len(targets), chunk_tokens):
                z = _scaled(logits[rows, :real], row_max[rows], temperature)
                sums[1, rows] = z.gather(1, column[rows, None]).squeeze(1) * here[rows]
                if with_entropy:
                    exp = z.exp()
                    sums[0, rows] = exp.sum(dim=1)
                    sums[2, rows] = exp.mul_(z).sum(dim=1)
                else:
                    sums[0, rows] = z.exp_().sum(dim=1)
        _all_reduce(sums, dist.ReduceOp.SUM, tp_group)

        log_sum = sums[0].log()
        in_vocabulary = (targets >= 0) & (targets < vocab_size)
        logprobs = torch.where(in_vocabulary, sums[1] - log_sum, torch.nan)
        entropy = log_sum - sums[2] / sums[0] if with_entropy else None

        ctx.save_for_backward(logits, column, here, row_max, log_sum, entropy)
        ctx.set_materialize_grads(False)
        ctx.real, ctx.temperature, ctx.chunk_tokens, ctx.dtype = real, temperature, chunk_tokens, dtype
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        logits, column, here, row_max, log_sum, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        grad = torch.zeros_like(logits)
        if ctx.real > 0:
            for rows in _chunks(len(column), ctx.chunk_tokens):
                log_p = _scaled(logits[rows, : ctx.real], row_max[rows], ctx.temperature)
                log_p -= log_sum[rows, None]
                grad[rows, : ctx.real] = _chunk_gradient(
                    log_p,
                    column[rows],
                    here[rows],
                    None if grad_logprobs is None else grad_logprobs[rows] / ctx.temperature,
                    None if grad_entropy is None else grad_entropy[rows] / ctx.temperature,
                    None if entropy is None else entropy[rows],
                )
        return (grad,) + (None,) * 7


def _chunk_gradient(
    log_p: Tensor,
    column: Tensor,
    here: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """Gradient with respect to z, ``[rows, columns]``; uses up ``log_p``.

    d logprob / d z_j = [j = target] - p_j;  d entropy / d z_j = -p_j (log p_j + entropy).
    """
    p = log_p.exp()
    factor = torch.zeros_like(log_p[:, :1])
    if grad_logprobs is not None:
        factor = factor - grad_logprobs[:, None]
    if grad_entropy is not None and entropy is not None:
        # factor_j = -(g_logprob + g_entropy (log p_j + entropy)), in the memory of log_p.
        gradient = log_p.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).add_(factor).mul_(p)
    else:
        gradient = p.mul_(factor)
    if grad_logprobs is not None:
        gradient.scatter_add_(1, column[:, None], (grad_logprobs * here)[:, None])
    return gradient


def _scaled(logits: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """``(logits - max) / T``, a new tensor; -inf becomes a finite number, so that exp(z) z is 0, not NaN."""
    z = logits.to(row_max.dtype) - row_max[:, None]
    return z.div_(temperature).clamp_(min=LOWEST_Z)


def _row_max(logits: Tensor, real: int, dtype: torch.dtype) -> Tensor:
    """Largest real logit of each row, ``[tokens]``; -inf where this rank has padding columns only."""
    if real == 0:
        return torch.full((len(logits),), -torch.inf, dtype=dtype, device=logits.device)
    return logits[:, :real].amax(dim=1).to(dtype)


def _real_columns(logits: Tensor, vocab_start: int, vocab_size: int) -> int:
    return max(0, min(logits.shape[1], vocab_size - vocab_start))


def _chunks(rows: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_tokens, rows)) for start in range(0, rows, chunk_tokens))


def _all_reduce(values: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)


def _check(
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    temperature: float,
    chunk_tokens: int,
    vocab_size: int | None,
) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [tokens, columns] and targets [tokens], got {list(logits.shape)} and "
            f"{list(targets.shape)}; flatten batch and sequence first"
        )
    if not temperature > 0:
        raise ValueError(f"expected a temperature > 0, got {temperature}; use 1.0 for greedy evaluation")
    if chunk_tokens < 1 or vocab_start < 0:
        raise ValueError(f"expected chunk_tokens >= 1 and vocab_start >= 0, got {chunk_tokens} and {vocab_start}")
    if vocab_size is None:
        raise ValueError("expected vocab_size with a tp_group: the padding of the last rank cannot be guessed")
    if targets.device.type == "cpu" and targets.numel() > 0:
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(
                f"expected targets in 0..{vocab_size - 1}, got {lowest}..{highest}; "
                "give rows to be ignored any valid id and mask their log-probs"
            )
