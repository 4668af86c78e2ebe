"""The matrix product of output layers: 16-bit factors, added up and handed out in float32."""

from __future__ import annotations

import torch


def float32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` in float32, without a gradient.

    Args:
        x: bf16 or fp16 ``[..., hidden]``.
        weight: of the same type, ``[vocab, hidden]``.

    Returns:
        float32 ``[..., vocab]``.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.is_cuda:
        logits = torch.mm(flat, weight.t(), out_dtype=torch.float32)
    else:
        logits = torch.mm(flat.float(), weight.float().t())
    return logits.view(*x.shape[:-1], weight.shape[0])
