"""Logits in float32 from an output layer of a 16-bit model: products are added up in float32 and never rounded.

A bfloat16 logit of 20 is rounded by up to 0.06, in the engine and in the trainer each in its own way, and a log-prob
with it: of a model that is sure of its tokens this is most of what rollout's and training's log-probs differ by. The
weights stay 16-bit, the matrix product runs at its usual speed, and only what comes out is wider. Megatron hands
logits of 16-bit models over in float32 anyway; with sequence parallelism the layer's whole input is kept for backward.

Source:
    MiniMax-M1 (arXiv:2506.13585, section 3.2) traces the difference to the output head and computes it in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from rl.float32 import float32_product

_NARROW = (torch.bfloat16, torch.float16)


class _Product(torch.autograd.Function):
    """:func:`float32_product`, whose gradient goes back in the type of the weights, as without it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return float32_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.matmul(weight)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t().matmul(x.flatten(0, -2))
        return of_x, of_weight


class Float32Head(ColumnParallelLinear):
    """Megatron's output layer, with :func:`float32_product` for its matrix product."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self.sequence_parallel:
            rows = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=self.tp_group)
        elif self.allreduce_dgrad:
            rows = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        else:
            rows = input
        return cast(torch.Tensor, _Product.apply(rows, weight))  # type: ignore[no-untyped-call]


def install(chunk: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Have a chunk's output layer give float32; False where it has none, or is no 16-bit one.

    Args:
        chunk: a Megatron ``GPTModel``; its parameters keep their names and places.
        dtype: of its weights.

    Raises:
        TypeError: an output layer of another kind, or with a bias.
    """
    layer = getattr(chunk, "output_layer", None)
    if layer is None or dtype not in _NARROW:
        return False
    if type(layer) is not ColumnParallelLinear or layer.bias is not None:
        raise TypeError(f"expected Megatron's ColumnParallelLinear without a bias as output layer, got {layer}")
    layer.__class__ = Float32Head
    return True
