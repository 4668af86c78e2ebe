"""``ultraep-plan``: what balancing would do for the routes of a trace, or the loads of a run, on chosen layouts.

With ``--step``, all of a trace is one training step, planned ahead: experts reordered for it, then replicas.

Nothing is trained and nothing is timed: loads are counted, plans are made, and the speed-up is predicted from them.

Exit codes: 0 all is well, 2 a wrong command line or input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.reorder import ReorderSettings
from megatron_ultraep.plan.types import Costs, PlanSettings, imbalance
from megatron_ultraep.replay import RoutingTrace
from megatron_ultraep.telemetry.blocks import Shape
from megatron_ultraep.telemetry.metrics import REASONS
from megatron_ultraep.telemetry.records import LoadRecord, Records
from megatron_ultraep.telemetry.step import plan_trace, summary
from megatron_ultraep.telemetry.step import table as step_table
from megatron_ultraep.telemetry.view import add_layout_options, check_options, make_layout, step_page, write_page
from megatron_ultraep.telemetry.whatif import (
    Case,
    evenly,
    make_plan,
    open_input,
    pack_trace,
    record_cases,
    trace_cases,
)

DEFAULT_SLOTS = [2]
FORMULA = (
    "Predicted speed-up of expert computation, forward and backward: the busiest rank sets the pace, so it is the sum "
    "over (micro-batch, layer) of the tokens of the busiest rank before balancing, over the same sum after it. With "
    "--token-ns and --copy-ns-per-mib the time to copy is added after balancing, as if nothing hid it, and the gate "
    "leaves a node alone where copying costs more than it saves; without them copying is free. Traffic is replicas "
    "times (2 x --expert-bytes + --gradient-bytes): weights in forward and again in backward, gradients home."
)

STEP_FORMULA = (
    "For a trace, on one layout. Imbalances are the busiest rank's tokens over the mean of all ranks, both summed over "
    "micro-batches. Times are --token-ns times the busiest rank's tokens; copying and moving are counted apart, as if "
    "nothing hid them, and an expert moves only where that pays within --horizon steps. Without times moving is free, "
    "and many experts move."
)


@dataclass(frozen=True)
class Result:
    """What plans on one layout come to; means and maxima are over (micro-batch, layer).

    Attributes:
        ep, node_size, slots: the layout.
        plans: number of (micro-batch, layer) planned.
        before_mean, before_max, after_mean, after_max: imbalance (max / mean of tokens per rank).
        bound_mean: imbalance below which no plan goes that keeps replicas inside their node.
        replicas_mean, replicas_max: replicas of one micro-batch of one layer.
        traffic_bytes_mean: bytes that they move.
        skipped: share of nodes left alone, by reason.
        predicted_speedup: see ``FORMULA``.
    """

    ep: int
    node_size: int
    slots: int
    plans: int
    before_mean: float
    before_max: float
    after_mean: float
    after_max: float
    bound_mean: float
    replicas_mean: float
    replicas_max: int
    traffic_bytes_mean: float
    skipped: dict[str, float]
    predicted_speedup: float


def evaluate(cases: Iterable[Case], layout: ExpertLayout, settings: PlanSettings, replica_bytes: int) -> Result:
    """Plan every case on a layout.

    Args:
        cases: loads ``[layout.ranks, layout.experts]``; where a case knows its homes, they replace the layout's.
        layout: homes, nodes, slots.
        settings: of the planner; its costs, if any, are paid in the prediction.
        replica_bytes: bytes that one replica moves.

    Raises:
        ValueError: no case.
    """
    before, after, bound, replicas = [], [], [], []
    outcomes: dict[str, int] = {}
    time_before = time_after = 0.0
    for case in cases:
        at_home = replace(layout, home_slot=case.home_slot) if case.home_slot else layout
        plan = make_plan(case.loads, at_home, settings)
        before.append(imbalance(plan.before))
        after.append(imbalance(plan.after))
        mean = float(plan.before.mean())
        bound.append(max(d.bound for d in plan.decisions) / mean if mean else 1.0)
        replicas.append(len(plan.replicas))
        for decision in plan.decisions:
            outcomes[decision.outcome] = outcomes.get(decision.outcome, 0) + 1
        token_ps = settings.costs.token_ps if settings.costs else 1
        copying = max(d.cost_ps if d.outcome == "balanced" else 0 for d in plan.decisions) if settings.costs else 0
        time_before += float(plan.before.max()) * token_ps
        time_after += float(plan.after.max()) * token_ps + copying
    if not before:
        raise ValueError("expected loads to plan for, got none")
    decisions = sum(outcomes.values())
    return Result(
        ep=layout.ranks,
        node_size=layout.node_size,
        slots=layout.slots,
        plans=len(before),
        before_mean=float(np.mean(before)),
        before_max=max(before),
        after_mean=float(np.mean(after)),
        after_max=max(after),
        bound_mean=float(np.mean(bound)),
        replicas_mean=float(np.mean(replicas)),
        replicas_max=max(replicas),
        traffic_bytes_mean=float(np.mean(replicas)) * replica_bytes,
        skipped={reason: outcomes.get(reason, 0) / decisions for reason in REASONS},
        predicted_speedup=time_before / time_after if time_after else 1.0,
    )


def trace_results(
    trace: RoutingTrace,
    layouts: Sequence[ExpertLayout],
    settings: PlanSettings,
    *,
    replica_bytes: int,
    tokens_per_micro_batch: int | None,
    most_plans: int,
) -> Iterator[tuple[Result, str]]:
    """One result per layout, and a sentence on how the trace was split for it."""
    for layout in layouts:
        batch = pack_trace(trace, layout.ranks, tokens_per_micro_batch)
        chosen = evenly(batch.num_microbatches * trace.moe_layers, most_plans)
        cases = itertools.compress(trace_cases(trace, batch), chosen)
        note = (
            f"ep {layout.ranks}: {len(batch.sample_ids)} samples in {batch.num_microbatches} micro-batches a rank, "
            f"{batch.padding_fraction():.1%} of the rows are padding, {trace.moe_layers} MoE layers"
        )
        yield evaluate(cases, layout, settings, replica_bytes), note


def run_results(
    found: Sequence[LoadRecord], layouts: Sequence[ExpertLayout], settings: PlanSettings, *, replica_bytes: int
) -> Iterator[Result]:
    """One result per layout for recorded micro-batches, experts in the order of their recorded homes."""
    for layout in layouts:
        yield evaluate(record_cases(found, layout.ranks), layout, settings, replica_bytes)


def make_parser() -> argparse.ArgumentParser:
    """The options; also what ``--help`` prints."""
    parser = argparse.ArgumentParser(
        prog="ultraep-plan",
        description="Imbalance, replicas, traffic and predicted speed-up of balancing, for every combination of the "
        "layouts given. " + FORMULA,
    )
    parser.add_argument(
        "input",
        metavar="TRACE",
        help="a routing trace (*.safetensors), or the directory of a run with load records (then the recorded "
        "micro-batches are planned again, and the layout defaults to the recorded one)",
    )
    add_layout_options(parser, many=True)
    costs = parser.add_argument_group("bytes and times")
    costs.add_argument(
        "--expert-bytes", type=int, default=0, metavar="BYTES", help="weights of one expert of one layer"
    )
    costs.add_argument(
        "--gradient-bytes",
        type=int,
        metavar="BYTES",
        help="gradients of one expert (default: 2 x --expert-bytes, which is 32-bit gradients of 16-bit weights)",
    )
    costs.add_argument(
        "--token-ns",
        type=int,
        default=0,
        metavar="NS",
        help="time that one more token costs a rank in forward and backward of one MoE layer",
    )
    costs.add_argument(
        "--copy-ns-per-mib", type=int, default=0, metavar="NS", help="time to copy 1 MiB from rank to rank in a node"
    )
    parser.add_argument(
        "--most-plans",
        type=int,
        default=2000,
        metavar="N",
        help="most (micro-batch, layer) to plan for a layout, evenly spaced over all (default: 2000)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as JSON, too")
    step = parser.add_argument_group("a step, planned ahead", STEP_FORMULA)
    step.add_argument(
        "--step",
        action="store_true",
        help="take all of the trace for one step: choose its experts' homes, then replicas for every micro-batch; "
        "prints imbalance, bytes and predicted time of each layer",
    )
    step.add_argument("--compose", action="store_true", help="choose which samples share a micro-batch by their loads")
    step.add_argument(
        "--state-bytes",
        type=int,
        metavar="BYTES",
        help="what moves with an expert of one layer: weights, main parameters, moments (default: 7 x --expert-bytes, "
        "which is 16-bit weights with three 32-bit states)",
    )
    step.add_argument(
        "--cross-ns-per-mib",
        type=int,
        metavar="NS",
        help="time to move 1 MiB to a rank of another node (default: 8 x --copy-ns-per-mib)",
    )
    step.add_argument(
        "--horizon", type=int, default=1, metavar="STEPS", help="steps within which a move must pay (default: 1)"
    )
    step.add_argument("--html", type=Path, metavar="FILE", help="write the step's page, too; see ultraep-view")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if bool(options.token_ns) != bool(options.copy_ns_per_mib) or (options.token_ns and not options.expert_bytes):
        parser.error("--token-ns, --copy-ns-per-mib and --expert-bytes: the gate needs all three, give them together")
    for name in ("expert_bytes", "gradient_bytes", "token_ns", "copy_ns_per_mib", "state_bytes", "cross_ns_per_mib"):
        if (getattr(options, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(options, name)}")
    if options.most_plans < 1:
        parser.error(f"--most-plans: expected at least 1, got {options.most_plans}")
    if not options.step:
        given = [name for name in ("compose", "state_bytes", "cross_ns_per_mib", "html") if getattr(options, name)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')}: is for a step planned ahead, give --step too")
    try:
        if options.step:
            _plan_step(options)
            return 0
        results = list(_results(options))
        if options.json:
            content = {"input": str(options.input), "formula": FORMULA, "results": [asdict(r) for r in results]}
            options.json.write_text(json.dumps(content, indent=2) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(results))
    print("\npredicted, not measured; how: ultraep-plan --help")
    return 0


def _settings(options: argparse.Namespace) -> tuple[PlanSettings, int]:
    """Settings of the planner, and bytes that one replica moves."""
    replica_bytes = 2 * options.expert_bytes + (
        2 * options.expert_bytes if options.gradient_bytes is None else options.gradient_bytes
    )
    costs = None
    if options.token_ns:
        costs = Costs(
            token_ps=1000 * options.token_ns,
            copy_ps_per_kib=_ps_per_kib(options.copy_ns_per_mib),
            replica_bytes=replica_bytes,
        )
    return PlanSettings(options.min_tokens, round(options.tolerance * 1_000_000), costs), replica_bytes


def _ps_per_kib(ns_per_mib: int) -> int:
    return -(-1000 * ns_per_mib // 1024)


def _plan_step(options: argparse.Namespace) -> None:
    """Plan a trace as one step; prints its table and writes what was asked for."""
    settings, replica_bytes = _settings(options)
    trace = open_input(options.input)
    if isinstance(trace, Records):
        raise ValueError(
            f"--step: expected a routing trace, since a step is planned from routes; {options.input} is a run"
        )
    layouts = _layouts(options, trace.experts, [], [0], DEFAULT_SLOTS)
    if len(layouts) != 1:
        raise ValueError(
            f"--step: expected one layout, got {len(layouts)}: give --ep and at most one of each other option"
        )
    cross = 8 * options.copy_ns_per_mib if options.cross_ns_per_mib is None else options.cross_ns_per_mib
    moving = ReorderSettings(
        token_ps=1000 * options.token_ns or 1,  # without costs moving is free, and only tokens count
        expert_bytes=7 * options.expert_bytes if options.state_bytes is None else options.state_bytes,
        node_ps_per_kib=_ps_per_kib(options.copy_ns_per_mib),
        cross_ps_per_kib=_ps_per_kib(cross),
        horizon=options.horizon,
    )
    preview = plan_trace(
        trace,
        layouts[0],
        settings,
        moving,
        replica_bytes=replica_bytes,
        tokens_per_micro_batch=options.tokens_per_microbatch,
        composing=options.compose,
    )
    timed = bool(options.token_ns)
    if options.json:
        content = {"input": str(options.input), "layout": Shape.of(layouts[0])._asdict(), **preview.as_json()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.html:
        write_page(options.html, step_page(preview, Path(options.input).name, timed=timed))
    first, *rest = summary(preview, timed=timed)
    print(first)
    print(step_table(preview, timed=timed, sized=bool(options.expert_bytes)))
    print("\n" + "\n".join(rest) + "\npredicted, not measured; how: ultraep-plan --help")


def _results(options: argparse.Namespace) -> Iterator[Result]:
    """Results of all layouts asked for; prints how the input was split."""
    settings, replica_bytes = _settings(options)
    source = open_input(options.input)
    if isinstance(source, Records):
        found = list(source.evenly(options.most_plans))
        if not found:
            raise ValueError(f"{options.input}: expected load records, could read none: {'; '.join(source.warnings)}")
        shape, same = _commonest_shape(found)
        print(f"{len(same)} of {len(source)} load records, {shape.experts} experts")
        layouts = _layouts(options, shape.experts, [shape.ranks], [shape.node_size], [shape.slots])
        yield from run_results(same, layouts, settings, replica_bytes=replica_bytes)
        return
    if not options.ep:
        raise ValueError(f"--ep: expected numbers of expert-parallel ranks, since {options.input} is a routing trace")
    layouts = _layouts(options, source.experts, [], [0], DEFAULT_SLOTS)
    notes: set[str] = set()
    for result, note in trace_results(
        source,
        layouts,
        settings,
        replica_bytes=replica_bytes,
        tokens_per_micro_batch=options.tokens_per_microbatch,
        most_plans=options.most_plans,
    ):
        if note not in notes:  # layouts of one size split the trace alike
            print(note)
            notes.add(note)
        yield result


def _layouts(
    options: argparse.Namespace, experts: int, ep: list[int], node_size: list[int], slots: list[int]
) -> list[ExpertLayout]:
    """All combinations, each once; lists are defaults."""
    combinations = itertools.product(options.ep or ep, options.node_size or node_size, options.slots or slots)
    return list(dict.fromkeys(make_layout(experts, *combination) for combination in combinations))


def _commonest_shape(found: Sequence[LoadRecord]) -> tuple[Shape, list[LoadRecord]]:
    """The shape that most records have, and the records with its number of experts."""
    shape = Counter(Shape.of(r.layout) for r in found).most_common(1)[0][0]
    return shape, [r for r in found if r.layout.experts == shape.experts]


def table(results: Sequence[Result]) -> str:
    """Results as text, one line each."""
    head = ["ep", "node", "slots", "plans", "before mean", "max", "after mean", "max", "bound", "replicas mean", "max"]
    head += ["MiB moved", "left alone", "predicted speed-up"]
    lines = [
        [
            str(r.ep),
            str(r.node_size),
            str(r.slots),
            str(r.plans),
            *(f"{v:.3f}" for v in (r.before_mean, r.before_max, r.after_mean, r.after_max, r.bound_mean)),
            f"{r.replicas_mean:.1f}",
            str(r.replicas_max),
            f"{r.traffic_bytes_mean / 2**20:.1f}" if r.traffic_bytes_mean or not r.replicas_max else "?",
            f"{sum(r.skipped.values()):.1%}",
            f"{r.predicted_speedup:.2f}x",
        ]
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join("  ".join(f"{v:>{w}}" for v, w in zip(line, widths, strict=True)) for line in [head, *lines])


if __name__ == "__main__":
    sys.exit(main())
