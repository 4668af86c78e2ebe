"""The residual stream of a 16-bit model in float32: what each layer adds is added without rounding the sum.

Rounding the stream to bfloat16 after every attention and every MLP, in the engine and in the trainer from values that
differ in their last bits, is half of what is left of the difference between their log-probs once logits are not
rounded (``rl.models.float32_head``); the engine's half of this is ``rl.rollout.residual``. Matrix products and what
they read stay 16-bit: norms read float32 and hand out 16 bits. Costs two bytes more per hidden unit, token and norm in
kept activations, and twice the bytes of what pipeline stages send each other.

Megatron's ``fp32_residual_connection`` alone does not do it: 0.16 casts the stream back in every addition, 0.19 hands
float32 to Transformer Engine's layers, which refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ultraep.megatron import compat
from rl.models.attention import RMSNorm


class Float32InputNorm(RMSNorm):
    """RMSNorm of a float32 stream, computed in float32, handed out in the type of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)


def add_to_stream(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """In the place of Megatron's ``get_bias_dropout_add``: the sum has the type of the stream."""

    def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_and_bias
        if dropout:
            raise ValueError(f"a float32 residual stream is for models without dropout, got hidden_dropout={dropout}")
        stream = residual.float() + output
        return stream if bias is None else stream + bias

    return add


def use_in_layer(spec: Any, *, moe: bool, transformer_engine: bool) -> None:
    """Change a layer's spec: norms that read float32, additions that keep it.

    Args:
        spec: ``ModuleSpec`` of a GPT layer, as from ``compat.layer_spec``.
        moe: its MLP is a mixture.
        transformer_engine: its linear layers are Transformer Engine's, which may contain the norm before them.
    """
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Float32InputNorm
    layer.self_attn_bda = layer.mlp_bda = add_to_stream
    if transformer_engine:
        compat.separate_norms(spec, moe=moe)


def configured(dtype: torch.dtype) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` for a stream in float32; none where the model has no 16-bit weights."""
    if dtype not in (torch.bfloat16, torch.float16):
        return {}
    return {"fp32_residual_connection": True, "pipeline_dtype": torch.float32}
