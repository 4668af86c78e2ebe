"""Counting a rank's tokens, and sending each (token, logical expert) pair to one copy of the expert, as kernels.

The same numbers as ``runtime.reroute``, bit for bit, without its sort (so rows may have any number of experts) and
without a word to the host.

Legend: ``T`` tokens, ``E`` logical experts, ``P`` physical experts, ``C`` most copies of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultraep.kernels.build import current_stream, library_of

CHUNK_ROWS = 32  # csrc/reroute.h has the same number
TABLE_HEADER = 3

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Counts(NamedTuple):
    """How many tokens each logical expert has on this rank.

    Attributes:
        loads: int64 ``[E]``: tokens of each expert.
        before: int32 ``[ceil(T / 32), E]``: tokens of each expert in the chunks of 32 rows before.
    """

    loads: Tensor
    before: Tensor


def count(routing_map: Tensor, loads: Tensor | None = None) -> Counts:
    """Tokens of each expert, in all and before each chunk of rows.

    Args:
        routing_map: bool ``[T, E]``; T may be 0.
        loads: int64 ``[E]``, contiguous, to be written; a fresh tensor by default.

    Raises:
        ValueError: a map of another type or shape.
    """
    _check_map(routing_map)
    tokens, experts = routing_map.shape
    device = routing_map.device
    before = torch.empty((-(-tokens // CHUNK_ROWS), experts), dtype=torch.int32, device=device)
    if loads is None:
        loads = torch.empty(experts, dtype=torch.int64, device=device)
    library_of(device)("count", routing_map.contiguous(), before, loads, tokens, experts, stream=current_stream(device))
    return Counts(loads, before)


def reroute(probs: Tensor, routing_map: Tensor, before: Tensor, table: Tensor, physical: int) -> tuple[Tensor, Tensor]:
    """Send every (token, expert) pair to one copy of the expert.

    The i-th token (in row order) of expert e has the number ``i * stride % tokens`` and goes to the first copy with
    ``number < quota sum``.

    Args:
        probs: float16, bfloat16, float32 or float64 ``[T, E]``; differentiable once.
        routing_map: bool ``[T, E]``; every True is served.
        before: :attr:`Counts.before` of the map.
        table: int32 ``[E, 3 + 2 C]``: number of copies, max(1, tokens), stride, quota sums ``[C]``, physical ids
            ``[C]`` in ``0..P-1``. What lies beyond an expert's number of copies is not read.
        physical: number of physical experts P.

    Returns:
        ``(probs [T, P], routing_map bool [T, P])``; zero and False where no pair goes.

    Raises:
        ValueError: tensors of other types or shapes, or of different devices.
    """
    _check_map(routing_map)
    tokens, experts = routing_map.shape
    if probs.dtype not in _DTYPES or probs.shape != routing_map.shape:
        raise ValueError(
            f"expected probs of {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)} in the shape of the map, "
            f"{tuple(routing_map.shape)}, got {probs.dtype} {tuple(probs.shape)}"
        )
    chunks = -(-tokens // CHUNK_ROWS)
    if before.dtype != torch.int32 or before.shape != (chunks, experts):
        raise ValueError(
            f"expected before of count(routing_map), int32 {(chunks, experts)}, got {before.dtype} "
            f"{tuple(before.shape)}"
        )
    width = table.shape[-1] - TABLE_HEADER
    if table.dtype != torch.int32 or table.shape[:-1] != (experts,) or width < 2 or width % 2:
        raise ValueError(f"expected a table int32 [{experts}, 3 + 2 * copies], got {table.dtype} {tuple(table.shape)}")
    if not probs.device == routing_map.device == before.device == table.device:
        devices = [str(t.device) for t in (probs, routing_map, before, table)]
        raise ValueError(f"expected probs, map, before and table of one device, got {', '.join(devices)}")
    if physical < 1:
        raise ValueError(f"expected at least one physical expert, got {physical}")
    out: tuple[Tensor, Tensor] = _Reroute.apply(  # type: ignore[no-untyped-call]
        probs, routing_map.contiguous(), before.contiguous(), table.contiguous(), physical
    )
    return out


class _Reroute(torch.autograd.Function):
    """Saves what targets follow from, not the targets: backward finds them again."""

    @staticmethod
    def forward(
        ctx: Any, probs: Tensor, routing_map: Tensor, before: Tensor, table: Tensor, physical: int
    ) -> tuple[Tensor, Tensor]:
        tokens, experts = routing_map.shape
        out = probs.new_empty((tokens, physical))
        out_map = routing_map.new_empty((tokens, physical))
        ctx.save_for_backward(routing_map, before, table)
        ctx.mark_non_differentiable(out_map)
        ctx.set_materialize_grads(False)
        if tokens:
            values = probs.contiguous()
            library_of(probs.device)(
                "reroute", values, routing_map, before, table, out, out_map, tokens, experts, physical,
                _copies(table), values.element_size(), stream=current_stream(probs.device),
            )  # fmt: skip
        return out, out_map

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        gradient = gradients[0]
        if gradient is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        routing_map, before, table = ctx.saved_tensors
        tokens, experts = routing_map.shape
        physical = gradient.shape[1]
        out = gradient.new_empty((tokens, experts))
        if tokens:
            values = gradient.contiguous()
            library_of(values.device)(
                "reroute_backward", values, routing_map, before, table, out, tokens, experts, physical,
                _copies(table), values.element_size(), stream=current_stream(values.device),
            )  # fmt: skip
        return out, None, None, None, None


def _check_map(routing_map: Tensor) -> None:
    if routing_map.dtype != torch.bool or routing_map.dim() != 2 or routing_map.shape[1] < 1:
        raise ValueError(
            f"expected a routing map bool [tokens, experts], got {routing_map.dtype} {tuple(routing_map.shape)}"
        )


def _copies(table: Tensor) -> int:
    return (table.shape[1] - TABLE_HEADER) // 2
