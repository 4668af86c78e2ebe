"""How many parameters each rank holds, tensor by tensor, as ``rl.models.builder`` builds them.

Tested against really built Megatron models of every family and several layouts (``tests/rl/planning``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture
from rl.models.stages import stage_layers

_PARAMETER_ALIGNMENT = 64  # elements: where a parameter begins in Megatron's buffers with the distributed optimizer
_BUFFER_ALIGNMENT = 128  # elements: what the end of such a buffer is a multiple of, besides of its ranks

WHOLE = ParallelSection.model_validate({})
"""The layout of one rank that holds everything."""


@dataclass(frozen=True)
class Sizes:
    """Elements of each parameter of a rank.

    Attributes:
        dense: of those that data-parallel ranks share.
        experts: of routed experts, which expert-data-parallel ranks share.
    """

    dense: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return sum(self.dense) + sum(self.experts)

    def in_buffers(self, parallel: ParallelSection) -> Sizes:
        """As Megatron's gradient buffers hold them: without expert parallelism experts are with all others."""
        return self if parallel.ep > 1 else Sizes(self.dense + self.experts)


@dataclass(frozen=True)
class Sharing:
    """Ranks that hold the same parameters.

    Attributes:
        dense, experts: data-parallel sizes of either kind.
    """

    dense: int
    experts: int

    @staticmethod
    def of(ranks: int, parallel: ParallelSection) -> Sharing:
        """In a layout of so many ranks."""
        return Sharing(
            dense=max(1, ranks // (parallel.tp * parallel.pp)),
            experts=max(1, ranks // (parallel.etp * parallel.ep * parallel.pp)),
        )


def chunks_of_stage(arch: Architecture, parallel: ParallelSection, stage: int) -> tuple[range, ...]:
    """Layers of each model chunk of a pipeline stage (0-based), cut as ``rl.models.builder`` does."""
    sizes = stage_layers(arch.layers, parallel.pp, parallel.vpp)
    starts = (0, *itertools.accumulate(sizes))
    parts = range(stage, parallel.pp * parallel.vpp, parallel.pp)
    return tuple(range(starts[part], starts[part + 1]) for part in parts)


def stage_sizes(arch: Architecture, parallel: ParallelSection, stage: int) -> tuple[Sizes, ...]:
    """Parameters of a rank of a pipeline stage, by model chunk."""
    return tuple(
        chunk_sizes(arch, parallel, layers, first=layers.start == 0, last=layers.stop == arch.layers)
        for layers in chunks_of_stage(arch, parallel, stage)
    )


def chunk_sizes(arch: Architecture, parallel: ParallelSection, layers: range, *, first: bool, last: bool) -> Sizes:
    """Parameters of one model chunk of a rank.

    Args:
        layers: 0-based.
        first, last: whether it has the embedding, and the final norm and output layer.
    """
    sizes = Sizes()
    words = -(-arch.vocab // parallel.tp) * arch.hidden
    if first:
        sizes += Sizes((words,))
    for layer in layers:
        sizes += layer_sizes(arch, parallel, moe=layer in arch.moe_layers)
    if last:
        sizes += Sizes((arch.hidden,))
        if arch.scalar_head:
            sizes += Sizes((arch.hidden,))
        elif not (arch.tied and first):  # a tied output layer on another stage is a copy
            sizes += Sizes((words,))
    return sizes


def layer_sizes(arch: Architecture, parallel: ParallelSection, *, moe: bool) -> Sizes:
    """Parameters of one transformer layer of a rank: attention, its norms, and MLP or MoE."""
    h = arch.hidden
    dense = (h, *_attention(arch, parallel.tp), h)
    if not moe:
        return Sizes((*dense, *_mlp(h, arch.ffn, parallel.tp)))
    router: tuple[int, ...] = (arch.experts * h,)
    shared = arch.shared_ffn
    if shared:
        router += _mlp(h, shared, parallel.tp) + ((h,) if arch.shared_gate else ())
    each = _mlp(h, arch.moe_ffn, parallel.etp)
    return Sizes(dense + router, each * (arch.experts // parallel.ep))


def _mlp(hidden: int, ffn: int, cut: int) -> tuple[int, ...]:
    return (2 * ffn // cut * hidden, ffn // cut * hidden)


def _attention(arch: Architecture, tp: int) -> tuple[int, ...]:
    h, heads = arch.hidden, arch.heads
    latent = arch.latent
    if latent is not None:
        head = latent.plain_dim + latent.rotary_dim
        return (
            heads * latent.value_dim // tp * h,
            latent.q_rank * h,
            heads * head // tp * latent.q_rank,
            (latent.kv_rank + latent.rotary_dim) * h,
            heads * (latent.plain_dim + latent.value_dim) // tp * latent.kv_rank,
            latent.q_rank,
            latent.kv_rank,
        )
    rows = (heads + 2 * arch.kv_heads) * arch.head_dim // tp
    sizes: tuple[int, ...] = (heads * arch.head_dim // tp * h, rows * h)
    if arch.attention_bias:
        sizes += (rows,)
    if arch.qk_norm:
        whole = arch.qk_norm_whole
        sizes += (heads * arch.head_dim, arch.kv_heads * arch.head_dim) if whole else (arch.head_dim, arch.head_dim)
    return sizes


def total_parameters(arch: Architecture) -> int:
    """Of the whole model."""
    return stage_sizes(arch, WHOLE, 0)[0].total


def active_parameters(arch: Architecture) -> int:
    """Parameters that one token meets, the embedding left out and the output layer counted."""
    count = 0 if arch.scalar_head else arch.vocab * arch.hidden
    for layer in range(arch.layers):
        sizes = layer_sizes(arch, WHOLE, moe=layer in arch.moe_layers)
        count += sum(sizes.dense)
        if sizes.experts:
            count += sum(sizes.experts) * arch.topk // arch.experts
    return count


def buffer_elements(sizes: Iterable[int], sharing: int, *, distributed_optimizer: bool) -> int:
    """Elements of Megatron's gradient buffer of these parameters, padding included.

    Args:
        sizes: of the parameters.
        sharing: data-parallel ranks of the buffer.
        distributed_optimizer: pads so that ranks can share it.
    """
    if not distributed_optimizer:
        return sum(sizes)
    whole = sum(_padded(size, _PARAMETER_ALIGNMENT) for size in sizes)
    return _padded(whole, math.lcm(sharing, _BUFFER_ALIGNMENT))


def _padded(count: int, to: int) -> int:
    return -(-count // to) * to
