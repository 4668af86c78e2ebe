"""Core attention and norm for the CPU layer spec: packed sequences in plain PyTorch.

Megatron's local ``DotProductAttention`` asserts that there are no packed sequences, and its local RMSNorm refuses the
sequence parallelism that MoE with tensor parallelism demands. On GPUs Transformer Engine's modules do both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class PackedAttention(torch.nn.Module):
    """Causal attention inside each packed sequence; takes the place of Megatron's core attention.

    Shapes: t rows of a micro-batch, n query heads and g key/value heads of this tensor-parallel rank, d head size.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if attention_type != "self" or config.context_parallel_size != 1:
            raise ValueError(
                f"PackedAttention is causal self-attention without context parallelism, got {attention_type!r} "
                f"attention and context_parallel_size={config.context_parallel_size}"
            )
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"PackedAttention has no dropout, got {dropout}: set attention_dropout to 0")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> Tensor:
        """Attend within each sequence of ``packed_seq_params.cu_seqlens_q``.

        Args:
            query: ``[t, n, d]``.
            key, value: ``[t, g, d]``; g divides n.
            packed_seq_params: Megatron's ``PackedSeqParams``, format ``thd``.

        Returns:
            ``[t, n * d]``.
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention takes packed sequences only: pass packed_seq_params to the model")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        out = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            # [1, heads, rows, d], the layout of scaled_dot_product_attention.
            attended = functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            )
            out.append(attended[0].transpose(0, 1))
        return torch.cat(out).flatten(1)


class RMSNorm(torch.nn.Module):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks under sequence parallelism.

    The weight's ``sequence_parallel`` attribute is what Megatron's gradient finalisation looks for.
    """

    # 0.19 asks a norm whether it returns the residual as well.
    returns_residual = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class WholeQueryNorm(torch.nn.Module):
    """RMSNorm over all heads of the queries together (OLMoE); without tensor parallelism.

    Megatron gives it heads, ``[..., heads, head size]``, and one head's size.
    """

    returns_residual = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        if config.tensor_model_parallel_size != 1:
            raise ValueError("a norm over all heads needs all heads: set tp to 1")
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(self._heads(config) * hidden_size, dtype=config.params_dtype))

    @staticmethod
    def _heads(config: Any) -> int:
        return int(config.num_attention_heads)

    def forward(self, x: Tensor) -> Tensor:
        whole = x.flatten(-2)
        return functional.rms_norm(whole, whole.shape[-1:], self.weight, self.eps).view(x.shape)


class WholeKeyNorm(WholeQueryNorm):
    """The same over all heads of the keys."""

    @staticmethod
    def _heads(config: Any) -> int:
        return int(config.num_query_groups)
