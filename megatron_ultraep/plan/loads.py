"""Exact loads of a step, before it runs: from histograms of samples and the layout of the batch.

The loads are those that the routers of the step will have, token for token: rows as ``replay.slicing`` cuts them,
padding as ``replay.padding`` routes it.

Legend: ``M`` micro-batches, ``N`` MoE layers, ``G`` expert-parallel ranks, ``E`` logical experts, ``K`` experts of a
token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.plan.types import Array
from megatron_ultraep.replay.slicing import overlap, router_rows

Histogram = npt.NDArray[np.integer]

Rows = tuple[str, int, int]
"""Sample id, first row of the sample, number of rows."""

_Piece = tuple[str, int, int, bool]  # the same, and whether that is all of the sample


def needed_counts(batch: BatchLayout, sources: Sequence[tuple[int, int]], tp_size: int) -> list[Rows]:
    """Runs of rows whose histograms :func:`step_loads` needs beside those of whole samples; sorted, each once.

    Args:
        batch: which rows lie where.
        sources: data-parallel and tensor-parallel rank of each expert-parallel rank.
        tp_size: sequence-parallel size.

    Raises:
        ValueError: rows of a micro-batch that ``tp_size`` does not divide.
    """
    found = set()
    for of_source in _windows(batch, sources, tp_size):
        for pieces, _ in of_source:
            found |= {(sample, first, rows) for sample, first, rows, whole in pieces if not whole}
    return sorted(found)


def step_loads(
    batch: BatchLayout,
    histograms: Mapping[str, Histogram],
    sources: Sequence[tuple[int, int]],
    *,
    topk: int,
    tp_size: int = 1,
    counted: Mapping[Rows, Histogram] | None = None,
    threads: int | None = None,
) -> Array:
    """Tokens that each expert-parallel rank will route to each expert, in every micro-batch and MoE layer.

    Args:
        batch: which rows lie where.
        histograms: int ``[N, E]`` of every sample of the batch, over all its rows.
        sources: ``(data-parallel rank, tensor-parallel rank)`` of each expert-parallel rank.
        topk: experts per token, for padding.
        tp_size: sequence-parallel size; tensor-parallel rank t sees the t-th part of a micro-batch's rows.
        counted: int ``[N, E]`` of the runs of rows that :func:`needed_counts` names.
        threads: that add up side by side; None: one for each core of this process.

    Returns:
        int64 ``[M, N, G, E]``.

    Raises:
        ValueError: a histogram that is missing or does not fit, naming sample and rows; sources outside the batch.
    """
    if topk < 1:
        raise ValueError(f"expected topk >= 1, got {topk}")
    if not histograms:
        raise ValueError("expected a histogram of each sample, got none: capture routes with the samples")
    layers, experts = next(iter(histograms.values())).shape
    for name in batch.sample_ids:
        if name not in histograms:
            raise ValueError(
                f"expected a histogram of each sample, got none of sample {name}: a step with samples without routes "
                "is planned from exact loads"
            )
        _check(histograms[name], layers, experts, f"sample {name}")
    pieces_of = _windows(batch, sources, tp_size)
    out: Array = np.zeros((batch.num_microbatches, layers, len(sources), experts), dtype=np.int64)

    def add_source(source: int) -> None:
        for microbatch, (pieces, padding) in enumerate(pieces_of[source]):
            loads = out[microbatch, :, source]
            for sample, first, rows, whole in pieces:
                if whole:
                    loads += histograms[sample]
                    continue
                part = counted.get((sample, first, rows)) if counted else None
                if part is None:
                    data_rank, tensor_rank = sources[source]
                    raise ValueError(
                        f"expected counts of rows {first}..{first + rows - 1} of sample {sample}, which tensor-"
                        f"parallel rank {tensor_rank} of data-parallel rank {data_rank} sees in micro-batch "
                        f"{microbatch}, got none: count the rows that needed_counts names where they are held"
                    )
                _check(part, layers, experts, f"rows {first}..{first + rows - 1} of sample {sample}")
                loads += part
            if padding:
                loads += _padding_loads(padding, layers, experts, topk)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(add_source, range(len(sources))))
    return out


def _windows(
    batch: BatchLayout, sources: Sequence[tuple[int, int]], tp_size: int
) -> list[list[tuple[list[_Piece], range]]]:
    """What each expert-parallel rank sees in each micro-batch: pieces of samples, and padding rows."""
    found = []
    for source, (data_rank, tensor_rank) in enumerate(sources):
        if not (0 <= data_rank < batch.data_parallel and 0 <= tensor_rank < tp_size):
            raise ValueError(
                f"expected sources of {batch.data_parallel} data-parallel and {tp_size} tensor-parallel ranks, got "
                f"{(data_rank, tensor_rank)} for expert-parallel rank {source}"
            )
        of_source = []
        for content in batch.micro_batches[data_rank]:
            window = router_rows(content.rows, tp_rank=tensor_rank, tp_size=tp_size)
            pieces = []
            for segment in content.segments:
                place = overlap(segment, window)
                if place is not None:
                    first, rows, _ = place
                    whole = rows == batch.sample_rows[segment.sample]
                    pieces.append((batch.sample_ids[segment.sample], first, rows, whole))
            of_source.append((pieces, range(max(content.used, window.start), window.stop)))
        found.append(of_source)
    return found


def _padding_loads(rows: range, layers: int, experts: int, topk: int) -> Array:
    """int64 ``[N, E]``: tokens of padding rows, which take consecutive experts (``replay.padding``)."""
    if topk > experts:
        raise ValueError(f"expected topk <= experts, got topk={topk}, experts={experts}")
    each, more = divmod(len(rows) * topk, experts)
    first = (rows.start + np.arange(layers, dtype=np.int64)) * topk
    from_first = (np.arange(experts, dtype=np.int64)[None, :] - first[:, None]) % experts
    loads: Array = each + (from_first < more).astype(np.int64)
    return loads


def _check(histogram: Histogram, layers: int, experts: int, of: str) -> None:
    if histogram.shape != (layers, experts) or not np.issubdtype(histogram.dtype, np.integer):
        raise ValueError(
            f"expected integer histograms of shape [MoE layers, experts] = [{layers}, {experts}], got "
            f"{histogram.dtype} {list(histogram.shape)} of {of}"
        )
