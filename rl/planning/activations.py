"""What a rank's modules keep for backward, and what they need for a moment, in one micro-batch.

Counted tensor by tensor from the modules that ``rl.models.builder`` puts together on GPUs (Transformer Engine's linear
layers, norms, attention and grouped experts; Megatron's dispatcher, unfused activations and rotary embedding). The
method is that of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198), section 4, with Megatron's MoE layer added. Measured beside it: ``scripts/bench_memory.py``.

Legend: T rows of a micro-batch, T/tp those of a rank with sequence parallelism; b bytes of an element; h hidden size;
m rows that a rank's experts compute (top-k copies of tokens, times the imbalance where experts are not balanced).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture

FP32 = 4


@dataclass(frozen=True)
class Workload:
    """What a micro-batch is, for one rank.

    Attributes:
        tokens: rows of a micro-batch, before sequence parallelism cuts them.
        width: bytes of an element of the model's type.
        imbalance: tokens that the busiest rank's experts compute, over the mean.
        recompute: ``"none"``, ``"full"`` or ``"selective"``.
        modules: recomputed when selective.
        fused: Megatron's fused kernels, and weight gradients added by the kernels themselves; the RL loop has neither.
        logprob_chunk: rows whose logits become log-probs at once.
        stream: bytes of an element of the residual stream; None: ``width``.
    """

    tokens: int
    width: int = 2
    imbalance: float = 1.0
    recompute: str = "none"
    modules: tuple[str, ...] = ()
    fused: bool = False
    logprob_chunk: int = 1024
    stream: int | None = None

    @property
    def stream_width(self) -> int:
        return self.width if self.stream is None else self.stream

    def recomputes(self, module: str) -> bool:
        """Whether this module's activations are made again in backward."""
        return self.recompute == "selective" and module in self.modules


def kept_by_layer(arch: Architecture, parallel: ParallelSection, work: Workload, *, moe: bool) -> int:
    """Bytes that one transformer layer keeps from its forward to its backward."""
    rows = work.tokens // parallel.tp
    if work.recompute == "full":
        return rows * arch.hidden * work.stream_width
    return _attention(arch, parallel, work) + (_moe(arch, parallel, work) if moe else _mlp(arch, parallel, work))


def needed_by_layer(arch: Architecture, parallel: ParallelSection, work: Workload, *, moe: bool) -> int:
    """Bytes that the backward of one layer takes beside what is kept, at its fullest."""
    whole = dataclasses.replace(work, recompute="none", modules=())
    again = 0
    if work.recompute == "full":
        again = kept_by_layer(arch, parallel, whole, moe=moe)
    elif moe and work.recomputes("moe"):
        again = _moe_inside(arch, parallel, whole)
    elif moe and work.recomputes("moe_act"):
        again = _activations(arch, parallel, whole)
    b, h = work.width, arch.hidden
    if not moe:
        rows = work.tokens // parallel.tp
        return again + work.tokens * (3 * arch.ffn // parallel.tp) * b + 3 * rows * h * b
    m, f = expert_rows(arch, parallel, work), arch.moe_ffn // parallel.etp
    # The gradient of the experts' output, of the activation and of its input; unfused, two of them in float32.
    gradients = m * (2 * h * b + 3 * f * b + (0 if work.fused else 2 * f * FP32))
    weights = 0 if work.fused else arch.experts // parallel.ep * 2 * f * h * b
    return again + gradients + weights


def expert_rows(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    """m: rows that the busiest rank's experts compute. Expert tensor parallelism gathers them over its ranks."""
    return round(work.tokens // parallel.tp * arch.topk * work.imbalance) * parallel.etp


def kept_by_routes(arch: Architecture, parallel: ParallelSection, rows: int, moe_layers: int) -> int:
    """Bytes of replayed routes of a whole mini-batch: what was captured, and what routers took, for the digests.

    Args:
        rows: of the mini-batch on a data-parallel rank, all its micro-batches.
        moe_layers: of the rank.
    """
    captured, taken = 2, 8  # int16 and int64, on the device
    return rows // parallel.tp * moe_layers * arch.topk * (captured + taken)


def logits(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    """Bytes of logits, their gradients and the chunks that log-probs are taken in, on the last stage.

    Megatron hands logits of 16-bit models over in float32: two of those and, for the output layer, one of the model's
    type are there at the beginning of backward.
    """
    if arch.scalar_head:
        return work.tokens * 3 * FP32
    columns = -(-arch.vocab // parallel.tp)
    each = 2 * max(FP32, work.width) + (work.width if work.width < FP32 else 0)
    return columns * (work.tokens * each + 3 * min(work.logprob_chunk, work.tokens) * FP32)


def logits_forward(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    """The same of a pass without backward."""
    if arch.scalar_head:
        return work.tokens * FP32
    columns = -(-arch.vocab // parallel.tp)
    each = max(FP32, work.width) + (work.width if work.width < FP32 else 0)
    return columns * (work.tokens * each + 3 * min(work.logprob_chunk, work.tokens) * FP32)


def before_head(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    """Bytes that the last stage keeps between its last layer and the logits: what the final norm gets and gives."""
    return (work.tokens // parallel.tp) * arch.hidden * (work.stream_width + work.width)


def in_flight(parallel: ParallelSection, stage: int, micro_batches: int) -> int:
    """Micro-batches (of one model chunk each) whose activations a stage holds at its fullest.

    Source: Narayanan et al., arXiv 2104.04473, sections 2.2.1 and 2.2.2 (1F1B and its interleaved form).
    """
    if parallel.vpp > 1:
        warm_up = (parallel.pp - stage - 1) * 2 + (parallel.vpp - 1) * parallel.pp
        return min(warm_up + 1, micro_batches * parallel.vpp)
    return min(parallel.pp - stage, micro_batches)


def _attention(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    tokens, b, tp = work.tokens, work.width, parallel.tp
    rows = tokens // tp
    norms = 2 * rows * FP32
    # The input, what the norm makes of it, and the sum that goes on to the MLP.
    hidden = rows * arch.hidden * (2 * work.stream_width + (0 if work.recomputes("layernorm") else b))
    heads = tokens * arch.heads // tp
    statistics = 0 if work.recomputes("core_attn") else heads * FP32
    latent = arch.latent
    if latent is not None:
        head = latent.plain_dim + latent.rotary_dim
        # Latents before and after their norms; queries, keys and values as projected and with positions; the output.
        latents = rows * (2 * latent.q_rank + 2 * latent.kv_rank + latent.rotary_dim) * b
        projected = heads * (head + latent.plain_dim + latent.value_dim)
        with_positions = heads * (2 * head + latent.value_dim)
        return hidden + norms + statistics + latents + (projected + with_positions + heads * latent.value_dim) * b
    keys = tokens * arch.kv_heads // tp
    # The fused projection; queries and keys with positions; the output.
    columns = (heads + 2 * keys) + (heads + keys) + heads
    if arch.qk_norm and arch.kv_heads < arch.heads:
        columns += heads  # queries are copied out of the fused projection, and the norm keeps the copy
    return hidden + norms + statistics + columns * arch.head_dim * b


def _mlp(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    rows, b = work.tokens // parallel.tp, work.width
    norm = 0 if work.recomputes("layernorm") else rows * arch.hidden * b
    if work.recomputes("mlp"):
        return norm + rows * FP32
    columns = (3 if work.fused else 4) * arch.ffn // parallel.tp
    return norm + rows * FP32 + work.tokens * columns * b


def _moe(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    rows, b = work.tokens // parallel.tp, work.width
    norm = 0 if work.recomputes("layernorm") else rows * arch.hidden * b
    if work.recomputes("moe"):
        return rows * arch.hidden * b + rows * FP32
    return norm + rows * FP32 + _moe_inside(arch, parallel, work)


def _moe_inside(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    rows, b = work.tokens // parallel.tp, work.width
    m, f = expert_rows(arch, parallel, work), arch.moe_ffn // parallel.etp
    # Logits, their softmax, and probabilities and choices laid out over all experts.
    router = rows * arch.experts * (3 * FP32 + 1)
    dispatched = m * arch.hidden * b + m * (FP32 + 8)
    activations = 0 if work.recomputes("moe_act") else _activations(arch, parallel, work)
    shared = arch.shared_ffn
    columns = 0 if work.recomputes("shared_experts") else (3 if work.fused else 4) * shared // parallel.tp
    return router + dispatched + m * 2 * f * b + activations + work.tokens * columns * b


def _activations(arch: Architecture, parallel: ParallelSection, work: Workload) -> int:
    """Between the experts' two linear layers: fused, one tensor; else the gate's, the product and its scaled form."""
    m, f = expert_rows(arch, parallel, work), arch.moe_ffn // parallel.etp
    return m * f * work.width * (1 if work.fused else 3)
