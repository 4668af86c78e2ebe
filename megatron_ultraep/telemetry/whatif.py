"""Loads of a routing trace or of load records on a chosen layout, and plans for them.

A trace is split as training would split it: ``BatchLayout.pack`` with one data-parallel rank per expert-parallel rank,
padding rows included. Load records keep tokens per expert and not who sent them, so on another layout the same
micro-batches are spread evenly over the source ranks; which replicas a plan makes does not depend on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import BatchLayout, ExpertLayout, MicroBatch, MicroBatchKey
from megatron_ultraep.plan.types import NodeDecision, Plan, PlanSettings
from megatron_ultraep.replay import RoutingTrace, histogram, padding_routes
from megatron_ultraep.telemetry.blocks import Block, Row, Shape, pack, row, row_nbytes
from megatron_ultraep.telemetry.records import LoadRecord, Records, has_records, read

IntArray = npt.NDArray[np.int64]
DEFAULT_TOKENS = 8192
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Case:
    """Loads of one micro-batch of one layer: int64 ``[G, E]``; ``home_slot`` where it is known to be no identity."""

    key: MicroBatchKey
    layer: int
    loads: IntArray
    home_slot: tuple[int, ...] = ()


def open_input(path: str | Path) -> RoutingTrace | Records:
    """A routing trace, or the load records of a run.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: neither of the two, or empty; says what to do.
    """
    path = Path(path)
    if path.is_dir():
        if not has_records(path):
            traces = sorted(path.rglob("*.safetensors"))[:1]
            hint = f"; to look at routes, give a trace such as {traces[0]}" if traces else ""
            raise ValueError(
                f"expected load records (*.loads.npz) in {path} or below it, found none: set the record directory of "
                f"the balancing configuration and run again{hint}"
            )
        return read(path)
    if path.name.endswith(".loads.npz"):
        raise ValueError(f"{path} is one chunk of load records: give the directory that holds it, {path.parent}")
    try:
        trace = RoutingTrace.load(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; give a routing trace (*.safetensors) or the directory of a run with load records"
        ) from error
    if not any(len(sample.routes) for sample in trace.samples):
        raise ValueError(f"{path}: expected a trace with routes, got {len(trace.samples)} samples without any")
    return trace


def pack_trace(trace: RoutingTrace, ranks: int, tokens_per_micro_batch: int | None = None) -> BatchLayout:
    """How training would pack the samples of a trace over ``ranks`` data-parallel ranks; samples without rows are left
    out. Tokens per micro-batch default to 8192, or the longest sample if that is more.

    Raises:
        ValueError: a sample that fits into no micro-batch.
    """
    samples = [s for s in trace.samples if len(s.routes)]
    rows = [len(s.routes) for s in samples]
    return BatchLayout.pack(
        [s.sample_id for s in samples],
        rows,
        data_parallel=ranks,
        tokens_per_micro_batch=tokens_per_micro_batch or max(DEFAULT_TOKENS, *rows),
    )


def trace_cases(trace: RoutingTrace, batch: BatchLayout) -> Iterator[Case]:
    """Loads of every micro-batch of every MoE layer; ``batch`` from :func:`pack_trace`.

    Layers are numbered from 0 over the MoE layers, as the trace has them.
    """
    routes = {s.sample_id: s.routes for s in trace.samples}
    for index in range(batch.num_microbatches):
        loads = np.stack(
            [_rank_loads(trace, batch, routes, rank[index]) for rank in batch.micro_batches]
        )  # [G, moe_layers, E]
        for layer in range(trace.moe_layers):
            yield Case(MicroBatchKey("trace", "train", 0, index), layer, loads[:, layer])


def _rank_loads(
    trace: RoutingTrace,
    batch: BatchLayout,
    routes: dict[str, npt.NDArray[np.unsignedinteger]],
    micro_batch: MicroBatch,
) -> IntArray:
    """int64 ``[moe_layers, E]``: what one rank sends in one micro-batch."""
    loads = np.zeros((trace.moe_layers, trace.experts), dtype=np.int64)
    for segment in micro_batch.segments:
        rows = routes[batch.sample_ids[segment.sample]][segment.start : segment.start + segment.rows]
        loads += histogram(rows, trace.experts)
    padding = np.arange(micro_batch.used, micro_batch.rows)
    for layer in range(trace.moe_layers if len(padding) else 0):
        experts = padding_routes(padding, layer, trace.experts, trace.topk)
        loads[layer] += np.bincount(experts.ravel(), minlength=trace.experts)
    return loads


def record_cases(records: Iterable[LoadRecord], ranks: int) -> Iterator[Case]:
    """The recorded micro-batches, their tokens spread evenly over ``ranks`` source ranks."""
    for found in records:
        share, rest = np.divmod(found.tokens, ranks)
        # Remainders start where the last expert's ended, so that no source rank gets all of them.
        first = np.concatenate([[0], np.cumsum(rest)[:-1]])
        place = (np.arange(ranks)[:, None] - first) % ranks
        yield Case(found.key, found.layer, share + (place < rest), found.layout.home_slot)


def unbalanced(loads: IntArray, layout: ExpertLayout) -> Plan:
    """The plan that makes no replica: every token goes to its expert's home."""
    per_rank, ranks, size = layout.experts_per_rank, layout.ranks, layout.node_size
    quota = np.zeros((ranks, ranks, per_rank + layout.slots), dtype=np.int64)
    quota[:, :, :per_rank] = loads[:, list(layout.expert_at)].reshape(ranks, ranks, per_rank)
    tokens = quota.sum(axis=(0, 2)).reshape(-1, size)
    decisions = tuple(
        NodeDecision("no_replica_possible" if node.any() else "empty", int(node.max()), int(node.max()), bound)
        for node, bound in zip(tokens, (-(-tokens.sum(axis=1) // size)).tolist(), strict=True)
    )
    return Plan(layout, np.full((ranks, layout.slots), -1, dtype=np.int64), quota.reshape(ranks, -1), decisions)


def make_plan(loads: IntArray, layout: ExpertLayout, settings: PlanSettings) -> Plan:
    """The planner's plan; without slots, the plan that makes no replica."""
    if not layout.slots:
        return unbalanced(loads, layout)
    from megatron_ultraep.plan import solve

    return solve(loads, layout, settings)


def plan_blocks(
    cases: Iterable[Case], layout: ExpertLayout, settings: PlanSettings, group: str = "trace"
) -> tuple[Block, ...]:
    """Plan every case, and keep what load records keep."""
    shape = Shape.of(layout)
    blocks: list[Block] = []
    rows: list[Row] = []
    for case in cases:
        rows.append(row(case.key, case.layer, make_plan(case.loads, layout, settings)))
        if len(rows) * row_nbytes(shape) > _BLOCK_BYTES:
            blocks.append(pack(rows, shape, group=group))
            rows = []
    if rows:
        blocks.append(pack(rows, shape, group=group))
    return tuple(blocks)


def evenly(total: int, most: int) -> npt.NDArray[np.bool_]:
    """bool ``[total]``: at most ``most`` true, evenly spaced, the first and the last among them."""
    chosen = np.zeros(total, dtype=bool)
    chosen[np.linspace(0, total - 1, min(most, total)).round().astype(int)] = True
    return chosen
