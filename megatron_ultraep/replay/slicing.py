"""Which rows of a micro-batch a rank's routers see, and the routes for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import MicroBatch, Segment
from megatron_ultraep.replay.padding import padding_routes


def router_rows(rows: int, *, tp_rank: int = 0, tp_size: int = 1, cp_rank: int = 0, cp_size: int = 1) -> range:
    """Rows of a micro-batch that a rank's routers see.

    With sequence parallelism, tensor-parallel rank t holds the t-th of ``tp_size`` equal consecutive parts.

    Args:
        rows: rows of the micro-batch, padding included; a multiple of ``tp_size``.
        tp_rank, tp_size: place in the sequence-parallel group (size 1 when sequence parallelism is off).
        cp_rank, cp_size: place in the context-parallel group; only size 1 is supported, since packed sequences are
            split per sequence under context parallelism and no test covers that here.

    Raises:
        ValueError: rows that do not divide, or context parallelism.
    """
    if cp_size != 1 or cp_rank != 0:
        raise ValueError(f"context parallelism is not supported, got cp_size={cp_size}: set it to 1")
    if rows % tp_size:
        raise ValueError(
            f"expected rows that the {tp_size} tensor-parallel ranks divide, got {rows}: pad micro-batches"
        )
    part = rows // tp_size
    return range(tp_rank * part, (tp_rank + 1) * part)


def overlap(segment: Segment, window: range) -> tuple[int, int, int] | None:
    """The part of a segment inside a window of micro-batch rows: ``(first sample row, rows, offset in the window)``."""
    low = max(segment.offset, window.start)
    high = min(segment.offset + segment.rows, window.stop)
    if low >= high:
        return None
    return segment.start + low - segment.offset, high - low, low - window.start


def assemble(
    micro_batch: MicroBatch,
    window: range,
    parts: Sequence[npt.NDArray[np.integer] | None],
    *,
    first_moe_layer: int,
    moe_layers: int,
    experts: int,
    topk: int,
) -> npt.NDArray[np.signedinteger]:
    """Routes of the rows in ``window``, padding included, for a range of layers.

    Args:
        micro_batch: the packed micro-batch.
        window: rows this rank's routers see, from :func:`router_rows`.
        parts: one entry per segment of ``micro_batch``: int ``[rows of the overlap, moe_layers, topk]``, or None where
            the segment lies outside the window.
        first_moe_layer: index of the first of the layers, for the routes of padding rows.
        moe_layers: number of layers in ``parts``.
        experts, topk: of the model.

    Returns:
        int16 (int32 for 32,768 experts and more) ``[moe_layers, len(window), topk]``: signed, since -1 asks the router,
        and small, since all micro-batches of a step are held at once.
    """
    dtype = np.int16 if experts <= 1 << 15 else np.int32
    out = np.full((moe_layers, len(window), topk), -1, dtype=dtype)
    for segment, part in zip(micro_batch.segments, parts, strict=True):
        place = overlap(segment, window)
        if place is None:
            continue
        _, rows, offset = place
        if part is None or part.shape != (rows, moe_layers, topk):
            raise ValueError(
                f"expected routes of shape {(rows, moe_layers, topk)} for sample {segment.sample}, "
                f"got {None if part is None else part.shape}"
            )
        out[:, offset : offset + rows] = np.swapaxes(part, 0, 1)
    padding = np.arange(max(micro_batch.used, window.start), window.stop, dtype=np.int64)
    for layer in range(moe_layers if len(padding) else 0):
        out[layer, padding - window.start] = padding_routes(padding, first_moe_layer + layer, experts, topk)
    return out
