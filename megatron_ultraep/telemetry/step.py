"""What planning a whole step ahead comes to: experts reordered for the batch, then replicas in every micro-batch.

Loads come from a routing trace, packed as training would pack it; nothing is trained and nothing is timed.

Legend: ``M`` micro-batches, ``N`` MoE layers, ``G`` expert-parallel ranks, ``E`` logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_ultraep.layout import BatchLayout, ExpertLayout, MicroBatchKey
from megatron_ultraep.plan import search
from megatron_ultraep.plan.compose import Gain, compose, gain
from megatron_ultraep.plan.foresight import StepPlan, solve_step
from megatron_ultraep.plan.loads import step_loads
from megatron_ultraep.plan.reorder import MovePlan, ReorderSettings, reorder
from megatron_ultraep.plan.types import Array, PlanSettings
from megatron_ultraep.replay import RoutingTrace, histogram
from megatron_ultraep.telemetry.blocks import Block, Shape, pack, row
from megatron_ultraep.telemetry.whatif import DEFAULT_TOKENS

HOMES_KEPT, REORDERED = "homes as they are", "experts reordered"
_BLOCK_RECORDS = 512


@dataclass(frozen=True)
class LayerFigures:
    """One MoE layer in one step. Imbalances are sums over micro-batches of max, over sums of mean, tokens per rank.

    Attributes:
        layer: counted over the MoE layers.
        before: imbalance with homes as they are, without replicas.
        kept: with homes as they are, after replication.
        reordered: after reordering, without replicas.
        after: after reordering and replication.
        bound: below which no replicas bring the reordered layer: its busiest node in every micro-batch.
        moved: experts that change their rank.
        bytes_in_node, bytes_across: that moving them takes, inside nodes and between.
        replicas: over all micro-batches.
        replica_bytes: that they move, over all micro-batches.
        before_ps, reordered_ps, after_ps: predicted time of expert computation (ps), the busiest rank's.
        copy_ps: time to copy replicas (ps), as if nothing hid it; 0 where no costs are known.
        move_ps: time to move experts (ps), once.
    """

    layer: int
    before: float
    kept: float
    reordered: float
    after: float
    bound: float
    moved: int
    bytes_in_node: int
    bytes_across: int
    replicas: int
    replica_bytes: int
    before_ps: int
    reordered_ps: int
    after_ps: int
    copy_ps: int
    move_ps: int


@dataclass(frozen=True, eq=False)
class StepPreview:
    """A planned step.

    Attributes:
        batch: which sample lies where.
        composed: what choosing micro-batches by their loads added; None where they were packed by length alone.
        moves: of each layer.
        kept, plan: all plans, with homes as they are and with experts reordered; one object where nothing moves.
        layers: figures of each layer.
    """

    batch: BatchLayout
    composed: Gain | None
    moves: tuple[MovePlan, ...]
    kept: StepPlan
    plan: StepPlan
    layers: tuple[LayerFigures, ...]

    def total(self, name: str) -> int:
        """A figure of :class:`LayerFigures`, summed over layers."""
        return sum(getattr(layer, name) for layer in self.layers)

    def mean(self, name: str) -> float:
        """A figure of :class:`LayerFigures`, its mean over layers."""
        return float(np.mean([getattr(layer, name) for layer in self.layers]))

    def as_json(self) -> dict[str, Any]:
        """JSON values: figures of every layer, and of the step."""
        names = ("before_ps", "reordered_ps", "after_ps", "copy_ps", "move_ps", "bytes_in_node", "bytes_across")
        return {
            "micro_batches": self.batch.num_microbatches,
            "samples": len(self.batch.sample_ids),
            "composition": asdict(self.composed) if self.composed else None,
            "total": {name: self.total(name) for name in (*names, "moved", "replicas", "replica_bytes")},
            "layers": [asdict(layer) for layer in self.layers],
        }


def plan_trace(
    trace: RoutingTrace,
    layout: ExpertLayout,
    settings: PlanSettings,
    moving: ReorderSettings,
    *,
    replica_bytes: int = 0,
    tokens_per_micro_batch: int | None = None,
    composing: bool = False,
) -> StepPreview:
    """Plan one step that trains on all samples of a trace.

    Args:
        trace: routes of the samples; those without rows are left out.
        layout: homes as they are, in every layer; nodes; slots.
        settings: of the planner of replicas; with costs, copying is paid for.
        moving: costs of reordering.
        replica_bytes: bytes that one replica moves.
        tokens_per_micro_batch: of one rank; None: 8192, or the longest sample if that is more.
        composing: choose micro-batches by their loads, under the new homes.

    Raises:
        ValueError: a sample that fits into no micro-batch.
    """
    samples = [s for s in trace.samples if len(s.routes)]
    ids, rows = [s.sample_id for s in samples], [len(s.routes) for s in samples]
    histograms = [histogram(s.routes, trace.experts) for s in samples]
    budget = tokens_per_micro_batch or max(DEFAULT_TOKENS, *rows)
    layouts = [layout] * trace.moe_layers
    sources = [(rank, 0) for rank in range(layout.ranks)]

    def loads_of(batch: BatchLayout) -> Array:
        return step_loads(batch, dict(zip(ids, histograms, strict=True)), sources, topk=trace.topk)

    batch = BatchLayout.pack(ids, rows, data_parallel=layout.ranks, tokens_per_micro_batch=budget)
    loads = loads_of(batch)
    moves = tuple(reorder(loads, layouts, moving, plans=settings))
    moved_layouts = [move.layout for move in moves]
    composed = None
    if composing:
        packed = batch
        batch = compose(ids, rows, histograms, moved_layouts, data_parallel=layout.ranks, tokens_per_micro_batch=budget)
        composed = gain(packed, batch, histograms, moved_layouts)
        loads = loads_of(batch)
    kept = solve_step(loads, layouts, settings)
    plan = solve_step(loads, moved_layouts, settings) if any(move.moves for move in moves) else kept
    token_ps = settings.costs.token_ps if settings.costs else moving.token_ps
    return StepPreview(
        batch, composed, moves, kept, plan, tuple(_figures(loads, moves, kept, plan, token_ps, replica_bytes))
    )


def _figures(
    loads: Array, moves: Sequence[MovePlan], kept: StepPlan, plan: StepPlan, token_ps: int, replica_bytes: int
) -> Iterator[LayerFigures]:
    balanced = plan.decisions[..., 0] == search.BALANCED
    copy_ps = np.where(balanced, plan.gate[..., 1], 0).max(axis=2).sum(axis=0)  # [N]
    replicas = (plan.replica_expert >= 0).sum(axis=(0, 2, 3))  # [N]
    ranks = loads.shape[2]
    for layer, move in enumerate(moves):
        mean = float(loads[:, layer].sum()) / ranks or 1.0
        before, after_kept = (int(x[:, layer].sum()) for x in (kept.before, kept.after))
        reordered, after, bound = (int(x[:, layer].sum()) for x in (plan.before, plan.after, plan.bound))
        yield LayerFigures(
            layer=layer,
            before=before / mean,
            kept=after_kept / mean,
            reordered=reordered / mean,
            after=after / mean,
            bound=bound / mean,
            moved=len(move.moves),
            bytes_in_node=move.bytes_in_node,
            bytes_across=move.bytes_across,
            replicas=int(replicas[layer]),
            replica_bytes=int(replicas[layer]) * replica_bytes,
            before_ps=before * token_ps,
            reordered_ps=reordered * token_ps,
            after_ps=after * token_ps,
            copy_ps=int(copy_ps[layer]),
            move_ps=move.move_ps,
        )


def blocks(preview: StepPreview) -> Iterator[Block]:
    """The plans in the form of load records: with homes as they are, and with experts reordered where any moves."""
    both = (
        {HOMES_KEPT: preview.kept}
        if preview.plan is preview.kept
        else {REORDERED: preview.plan, HOMES_KEPT: preview.kept}
    )
    for name, step in both.items():
        shape = Shape.of(step.layouts[0])
        rows = []
        for micro_batch in range(step.microbatches):
            for layer in range(len(step.layouts)):
                rows.append(row(MicroBatchKey(name, "train", 0, micro_batch), layer, step.plan(micro_batch, layer)))
                if len(rows) == _BLOCK_RECORDS:
                    yield pack(rows, shape, group="the planner")
                    rows = []
        if rows:
            yield pack(rows, shape, group="the planner")


def table(preview: StepPreview, *, timed: bool, sized: bool) -> str:
    """The step's plan as text: one line per layer, and the step's.

    Args:
        preview: of the step.
        timed: whether times are real, that is, ``--token-ns`` was given.
        sized: whether bytes are, that is, ``--expert-bytes`` was given.
    """
    head = ["layer", "before", "replicas only", "reordered", "after", "bound", "moved", "MiB in node", "MiB across"]
    head += ["replicas", "MiB copied", *(["before ms", "after ms", "copying ms", "moving ms"] if timed else [])]

    def mib(value: int) -> str:
        return f"{value / 2**20:.1f}" if sized else "?"

    def ms(value: int) -> str:
        return f"{value / 1e9:.2f}"

    def cells(name: str, get: Any, ratios: Any) -> list[str]:
        return [
            name,
            *(f"{ratios(n):.3f}" for n in ("before", "kept", "reordered", "after", "bound")),
            str(get("moved")),
            *(mib(get(n)) for n in ("bytes_in_node", "bytes_across")),
            str(get("replicas")),
            mib(get("replica_bytes")),
            *([ms(get(n)) for n in ("before_ps", "after_ps", "copy_ps", "move_ps")] if timed else []),
        ]

    lines = [
        cells(str(layer.layer), lambda n, of=layer: getattr(of, n), lambda n, of=layer: getattr(of, n))
        for layer in preview.layers
    ]
    lines.append(cells("step", preview.total, preview.mean))
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join("  ".join(f"{v:>{w}}" for v, w in zip(line, widths, strict=True)) for line in [head, *lines])


def summary(preview: StepPreview, *, timed: bool) -> list[str]:
    """What the step comes to, in sentences."""
    batch = preview.batch
    found = [
        f"{len(batch.sample_ids)} samples in {batch.num_microbatches} micro-batches a rank, "
        f"{batch.padding_fraction():.1%} of the rows are padding, {len(preview.layers)} MoE layers"
    ]
    if preview.composed:
        was, now = preview.composed.before.imbalance, preview.composed.after.imbalance
        part = "node" if preview.moves[0].layout.node_size < preview.moves[0].layout.ranks else "rank, about,"
        found.append(f"micro-batches composed by load: busiest {part} {was:.3f} to {now:.3f} of the mean")
    before_ps, after_ps = preview.total("before_ps"), preview.total("after_ps")
    speedup = before_ps / after_ps if after_ps else 1.0
    before, kept, after = (f"{preview.mean(name):.3f}" for name in ("before", "kept", "after"))
    text = (
        f"imbalance, mean over layers: {before}; with replicas only {kept}; with experts reordered and replicas "
        f"{after}, expert computation {speedup:.2f}x as fast"
    )
    if timed:
        text += (
            f" ({before_ps / 1e9:.2f} to {after_ps / 1e9:.2f} ms; as if nothing hid them, copying takes "
            f"{preview.total('copy_ps') / 1e9:.2f} ms, moving {preview.total('move_ps') / 1e9:.2f} ms once)"
        )
    return [*found, text]
