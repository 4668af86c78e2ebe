"""Micro-batch composition: which samples share a micro-batch, chosen so that its expert loads balance.

Replicas even out the ranks of one node, so a micro-batch is as slow as its busiest node allows, and which samples meet
in it decides how busy that is. Routes being known, :func:`compose` starts from ``BatchLayout.pack`` and exchanges
samples between micro-batches as long as the sum of :func:`objective` falls.

Invariants, whatever the samples:

1. The same samples, each whole, in one optimizer step: the gradient changes in the order of its summation only.
2. As many micro-batches as ``pack`` makes, none above the token budget, and no more rows in all (padding included), up
   to ``extra_rows_ppm``.
3. The objective is never above that of ``pack``.
4. The same arguments give the same layout, on any rank and any machine: integers, a fixed amount of work, no clock.

The idea is that of ReLibra; the search (random exchanges, those that improve are kept) is our own.

Legend: ``S`` samples, ``N`` MoE layers, ``E`` logical experts, ``D`` ranks of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import BatchLayout, ExpertLayout
from megatron_ultraep.plan import compose_search
from megatron_ultraep.plan.types import Array

Histogram = npt.NDArray[np.integer]

DEFAULT_WORK = 400_000_000
"""Most numbers that the search looks at: one to two seconds on one core."""

_SEED = 20_011


@dataclass(frozen=True)
class Objective:
    """What balancing inside nodes leaves of a batch.

    Attributes:
        tokens: sum over (micro-batch, MoE layer, expert-parallel group) of the tokens of the busiest *part*:

            - of the busiest node, where there are several nodes and slots: no plan can bring it down;
            - of the busiest rank, where there are no slots;
            - of the busiest rank without its ``slots`` hottest experts, on one node with slots: the cheap estimate is
              that every rank can hand that many experts' tokens to others.
        ideal: the same sum with the mean of all parts, below which no packing goes.
    """

    tokens: int
    ideal: int

    @property
    def imbalance(self) -> float:
        """``tokens / ideal``; 1.0 is ideal, and what an empty batch has."""
        return self.tokens / self.ideal if self.ideal else 1.0


@dataclass(frozen=True)
class Gain:
    """What composition alone adds: the objective of the packing by length, and of the composed one."""

    before: Objective
    after: Objective

    @property
    def fewer_tokens(self) -> float:
        """Share of the busiest parts' tokens that composition took away, in [0, 1)."""
        return 1.0 - self.after.tokens / self.before.tokens if self.before.tokens else 0.0


def compose(
    sample_ids: Sequence[str],
    sample_rows: Sequence[int],
    histograms: Sequence[Histogram],
    layouts: Sequence[ExpertLayout],
    *,
    data_parallel: int,
    tokens_per_micro_batch: int,
    row_multiple: int = 1,
    micro_batch_multiple: int = 1,
    group_ranks: int | None = None,
    extra_rows_ppm: int = 0,
    work: int = DEFAULT_WORK,
) -> BatchLayout:
    """Pack samples into micro-batches whose expert loads balance.

    Padding rows are left out of the loads: their routes are spread evenly over experts.

    Args:
        sample_ids, sample_rows, data_parallel, tokens_per_micro_batch, row_multiple, micro_batch_multiple: as for
            ``BatchLayout.pack``.
        histograms: int ``[N, E]`` of each sample: tokens per MoE layer and expert.
        layouts: of each MoE layer, of one shape; homes may differ.
        group_ranks: consecutive data-parallel ranks that make one expert-parallel group (expert-parallel size x expert
            tensor-parallel size / tensor-parallel size); None: all of them.
        extra_rows_ppm: rows that may be computed beyond those of ``pack`` (parts per million of them).
        work: most numbers to look at, see :data:`DEFAULT_WORK`; 0 gives ``pack``'s layout.

    Raises:
        ValueError: see ``BatchLayout.pack``; histograms or layouts that do not fit each other or the samples.
    """
    packed = BatchLayout.pack(
        sample_ids,
        sample_rows,
        data_parallel=data_parallel,
        tokens_per_micro_batch=tokens_per_micro_batch,
        row_multiple=row_multiple,
        micro_batch_multiple=micro_batch_multiple,
    )
    group_ranks = _check_group(group_ranks, data_parallel)
    if extra_rows_ppm < 0 or work < 0:
        raise ValueError(f"expected extra_rows_ppm and work >= 0, got {extra_rows_ppm} and {work}")
    cells, parts, drop = _cells(histograms, layouts, len(sample_rows))
    before = _objective(packed, cells, parts, drop, group_ranks)
    if before.tokens == before.ideal:  # nothing can improve
        return packed
    bins = packed.num_microbatches * data_parallel
    per_rank = sum(m.rows for m in packed.micro_batches[0])
    rows = np.asarray(sample_rows, dtype=np.int64)
    bin_of, made = compose_search.compiled()(
        cells,
        rows,
        _bin_of(packed),
        np.argsort(-rows, kind="stable").astype(np.int64),
        bins,
        data_parallel,
        group_ranks,
        parts,
        drop,
        row_multiple,
        tokens_per_micro_batch // row_multiple * row_multiple,
        per_rank * extra_rows_ppm // 1_000_000,
        work,
        _SEED,
    )
    if not made:
        return packed
    contents: list[list[list[int]]] = [[[] for _ in range(packed.num_microbatches)] for _ in range(data_parallel)]
    for sample, item in enumerate(bin_of.tolist()):
        contents[item % data_parallel][item // data_parallel].append(sample)
    return BatchLayout.of_contents(sample_ids, sample_rows, contents, row_multiple=row_multiple)


def objective(
    batch: BatchLayout,
    histograms: Sequence[Histogram],
    layouts: Sequence[ExpertLayout],
    *,
    group_ranks: int | None = None,
) -> Objective:
    """The objective of a layout whose samples are whole.

    Args:
        batch: which samples share a micro-batch.
        histograms, layouts, group_ranks: as for :func:`compose`.

    Raises:
        ValueError: histograms or layouts that do not fit each other or the samples.
    """
    group_ranks = _check_group(group_ranks, batch.data_parallel)
    cells, parts, drop = _cells(histograms, layouts, len(batch.sample_rows))
    return _objective(batch, cells, parts, drop, group_ranks)


def gain(
    packed: BatchLayout,
    composed: BatchLayout,
    histograms: Sequence[Histogram],
    layouts: Sequence[ExpertLayout],
    *,
    group_ranks: int | None = None,
) -> Gain:
    """What composition alone adds; arguments as for :func:`objective`."""
    before, after = (objective(b, histograms, layouts, group_ranks=group_ranks) for b in (packed, composed))
    return Gain(before, after)


def _check_group(group_ranks: int | None, data_parallel: int) -> int:
    group_ranks = data_parallel if group_ranks is None else group_ranks
    if group_ranks < 1 or data_parallel % group_ranks:
        raise ValueError(
            f"expected group_ranks that divide the {data_parallel} data-parallel ranks, got {group_ranks}: give the "
            "number of data-parallel ranks of one expert-parallel group"
        )
    return group_ranks


def _cells(
    histograms: Sequence[Histogram], layouts: Sequence[ExpertLayout], samples: int
) -> tuple[npt.NDArray[np.int32], int, int]:
    """Tokens of each sample as the objective sees them: int32 ``[S, N, C]``, number of parts, cells to leave out."""
    if len(histograms) != samples:
        raise ValueError(f"expected one histogram per sample, got {len(histograms)} for {samples} samples")
    if not layouts:
        raise ValueError(
            "expected one layout per MoE layer, got none: a model without MoE layers has nothing to balance"
        )
    first = layouts[0]
    shape = (first.experts, first.ranks, first.node_size, first.slots)
    for layer, layout in enumerate(layouts):
        if (layout.experts, layout.ranks, layout.node_size, layout.slots) != shape:
            raise ValueError(f"expected layouts of one shape, got {layouts[0]} for MoE layer 0, {layout} for {layer}")
    for i, histogram in enumerate(histograms):
        if histogram.shape != (len(layouts), first.experts) or not np.issubdtype(histogram.dtype, np.integer):
            raise ValueError(
                f"expected integer histograms of shape [MoE layers, experts] = [{len(layouts)}, {first.experts}], got "
                f"{histogram.dtype} {list(histogram.shape)} for sample {i}"
            )
    parts, drop, width = _parts(first)
    per_cell = first.experts // (parts * width)
    at_home = np.array([layout.expert_at for layout in layouts], dtype=np.int64)  # [N, E]
    cells = np.empty((samples, len(layouts), parts * width), dtype=np.int32)
    for i, histogram in enumerate(histograms):
        by_home = np.take_along_axis(histogram, at_home, axis=1)
        cells[i] = by_home.reshape(len(layouts), parts * width, per_cell).sum(axis=2)
    return cells, parts, drop


def _parts(layout: ExpertLayout) -> tuple[int, int, int]:
    """Parts of a layer, cells of each that are left out, cells of a part; see :class:`Objective`."""
    nodes = layout.ranks // layout.node_size
    if not layout.slots:
        return layout.ranks, 0, 1
    if nodes > 1:
        return nodes, 0, 1
    return layout.ranks, min(layout.slots, layout.experts_per_rank), layout.experts_per_rank


def _bin_of(batch: BatchLayout) -> Array:
    """int64 ``[S]``: micro-batch * data-parallel ranks + rank of each sample."""
    out = np.zeros(len(batch.sample_rows), dtype=np.int64)
    for rank in range(batch.data_parallel):
        for micro_batch, segment in batch.segments(rank):
            if segment.rows != batch.sample_rows[segment.sample]:
                raise ValueError(
                    f"expected samples that are not split, got rows {segment.start}.."
                    f"{segment.start + segment.rows - 1} of sample {batch.sample_ids[segment.sample]} alone"
                )
            out[segment.sample] = micro_batch * batch.data_parallel + rank
    return out


def _objective(batch: BatchLayout, cells: npt.NDArray[np.int32], parts: int, drop: int, group_ranks: int) -> Objective:
    item = _bin_of(batch)
    groups = batch.data_parallel // group_ranks
    column = item // batch.data_parallel * groups + item % batch.data_parallel // group_ranks
    loads = np.zeros((batch.num_microbatches * groups, *cells.shape[1:]), dtype=np.int64)
    np.add.at(loads, column, cells)
    by_part = loads.reshape(*loads.shape[:2], parts, -1)
    kept = np.sort(by_part, axis=3)[..., : by_part.shape[3] - drop].sum(axis=3)
    mean = -(-by_part.sum(axis=(2, 3)) // parts)
    return Objective(int(np.maximum(kept.max(axis=2), mean).sum()), int(mean.sum()))
