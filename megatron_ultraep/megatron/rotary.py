"""Rotary embeddings of packed sequences, all at once.

Megatron-core's unfused rotary embedding takes packed sequences apart and goes over them in Python, for queries and
keys of every layer, after asking the GPU for their lengths; in 0.19 each is written into a slice of the result, whose
backward copies the whole of it again: time that grows with the square of the number of sequences. Here the row of the
table is looked up for every token: the same numbers, in a few kernels, and the host does not wait.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_ultraep.megatron import compat


def install() -> None:
    """Replace Megatron-core's in this process; with context-parallel ranks, which cut sequences, stock is called."""
    module = compat.rotary_module()
    stock = module._apply_rotary_pos_emb_thd
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def packed(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, **settings: Any) -> torch.Tensor:
        group = settings.pop("cp_group", None)
        if group is None or group.size() > 1:
            return stock(t, cu_seqlens, freqs, cp_group=group, **settings)
        table = freqs[positions(cu_seqlens, len(t))]
        return module._apply_rotary_pos_emb_bshd(t.unsqueeze(1), table, **settings).squeeze(1)

    module._apply_rotary_pos_emb_thd = packed


def positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Position of each token in its sequence, int64 ``[tokens]``.

    Args:
        cu_seqlens: int ``[sequences + 1]``, from 0 to ``tokens``.
        tokens: of all sequences; given, so that a GPU need not be asked.
    """
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - starts
