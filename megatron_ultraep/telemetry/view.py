"""``ultraep-view``: one self-contained HTML page of the loads of a run, or of a routing trace on a chosen layout.

Exit codes: 0 written, 2 nothing to show, or a wrong command line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.replay import RoutingTrace
from megatron_ultraep.telemetry.page import Collector, collect, render
from megatron_ultraep.telemetry.records import Records
from megatron_ultraep.telemetry.step import StepPreview, blocks, summary
from megatron_ultraep.telemetry.whatif import open_input, pack_trace, plan_blocks, trace_cases

_TEMPLATES = Path(__file__).parent / "templates"


def run_page(records: Records, title: str) -> str:
    """The page of a run."""
    collector = collect(records.blocks())
    return _page(collector, title, facts=_meta_facts(records.meta), warnings=[*records.warnings, *_losses(records)])


def trace_page(
    trace: RoutingTrace,
    layout: ExpertLayout,
    title: str,
    *,
    settings: PlanSettings | None = None,
    tokens_per_micro_batch: int | None = None,
) -> str:
    """The page of a routing trace: its loads on ``layout``, planned if the layout has slots.

    Raises:
        ValueError: a sample longer than ``tokens_per_micro_batch``.
    """
    batch = pack_trace(trace, layout.ranks, tokens_per_micro_batch)
    blocks = plan_blocks(trace_cases(trace, batch), layout, settings or PlanSettings(), group="the planner")
    facts = [
        f"{len(batch.sample_ids)} samples in {batch.num_microbatches} micro-batches a rank, "
        f"{batch.padding_fraction():.1%} of the rows are padding",
        "loads of a trace; nothing was trained or timed",
    ]
    collector = collect(blocks, axis="micro-batch")
    return _page(collector, title, facts=facts, source="trace")


def step_page(preview: StepPreview, title: str, *, timed: bool) -> str:
    """The page of a step that was planned ahead; ``timed``: its times are real."""
    first, *text = summary(preview, timed=timed)
    facts = [first, "planned from a trace; nothing was trained or timed"]
    figures = {"layers": preview.as_json()["layers"], "text": text, "timed": timed}
    collector = collect(blocks(preview), axis="micro-batch")
    return _page(collector, title, {"step": figures}, facts=facts, source="trace")


def _page(collector: Collector, title: str, more: Mapping[str, Any] | None = None, **details: Any) -> str:
    template, css, js = ((_TEMPLATES / name).read_text() for name in ("view.html", "view.css", "view.js"))
    return render(collector.data(title, **details) | dict(more or {}), template, css, js)


def _meta_facts(meta: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What all recorders were given alike, but what is kept for verification (mappings)."""
    given = list(meta.values())
    alike = {k: v for k, v in given[0].items() if all(m.get(k) == v for m in given)} if given else {}
    plain = [(name, value) for name, value in alike.items() if not isinstance(value, Mapping)]
    return [f"{name}: {value}" for name, value in plain[:8]]


def _losses(records: Records) -> list[str]:
    texts = {
        "dropped": "were dropped while recording: the queue was full",
        "thinned": "were removed to stay under the disk bound: older steps are a uniform sample",
        "failed": "could not be written: the log of the run says why",
    }
    totals = {name: sum(counts.get(name, 0) for counts in records.counts.values()) for name in texts}
    return [f"{totals[name]:,} load records {text}." for name, text in texts.items() if totals[name]]


def add_layout_options(parser: argparse._ActionsContainer, *, many: bool) -> None:
    """Options that say on which layout, with which planner settings; ``many``: several values each."""
    nargs = "+" if many else None
    parser.add_argument(
        "--ep", type=int, metavar="RANKS", nargs=nargs, help="expert-parallel ranks; divide the experts"
    )
    default = "2" if many else "0"
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        nargs=nargs,
        help=f"replica slots on each rank; 0: loads only, no plan (default: {default})",
    )
    parser.add_argument(
        "--node-size",
        type=int,
        metavar="RANKS",
        nargs=nargs,
        help="ranks of one node, which replicas never leave; more than --ep counts as --ep (default: one node)",
    )
    parser.add_argument(
        "--tokens-per-microbatch",
        type=int,
        metavar="N",
        help="rows of a micro-batch on one rank, of a trace (default: 8192, or the longest sample if longer)",
    )
    parser.add_argument(
        "--min-tokens", type=int, default=1024, metavar="N", help="fewest tokens of a replica (default: 1024)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="how far above the mean the busiest rank may stay (default: 0.01)",
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with exit code 2 where a planner setting is out of range."""
    if options.min_tokens < 1:
        parser.error(f"--min-tokens: expected at least 1 token, got {options.min_tokens}")
    if not 0 <= options.tolerance <= 1:
        parser.error(f"--tolerance: expected a fraction of the mean, 0 to 1, got {options.tolerance}")
    if options.tokens_per_microbatch is not None and options.tokens_per_microbatch < 1:
        parser.error(f"--tokens-per-microbatch: expected at least 1, got {options.tokens_per_microbatch}")


def make_layout(experts: int, ranks: int, node_size: int, slots: int, home_slot: tuple[int, ...] = ()) -> ExpertLayout:
    """A layout from the command line.

    Raises:
        ValueError: which option does not fit, and which values would.
    """
    if ranks < 1 or experts % ranks:
        fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise ValueError(f"--ep {ranks}: expected a size that divides the {experts} experts: one of {fitting}")
    if node_size < 0 or slots < 0:
        raise ValueError(f"--node-size and --slots: expected 0 or more, got {node_size} and {slots}")
    node_size = min(node_size or ranks, ranks)
    if ranks % node_size:
        raise ValueError(f"--node-size {node_size}: expected a size that divides the {ranks} expert-parallel ranks")
    return ExpertLayout(experts, ranks, home_slot, node_size, slots)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="ultraep-view",
        description="Write one HTML page (no server, no network) of expert loads before and after balancing.",
    )
    parser.add_argument(
        "input", metavar="RUN", help="directory of a run with load records, or a routing trace (*.safetensors)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: loads.html in the run, or TRACE.html)"
    )
    layout_options = parser.add_argument_group("for a routing trace")
    add_layout_options(layout_options, many=False)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        page, output = _make(options)
        write_page(options.out or output, page)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {options.out or output} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


def _make(options: argparse.Namespace) -> tuple[str, Path]:
    """The page and where it goes by default."""
    path = Path(options.input)
    source = open_input(path)
    if isinstance(source, Records):
        if options.ep is not None:
            raise ValueError(
                f"--ep: {path} holds load records, whose layout is known; to try another layout: ultraep-plan {path}"
            )
        return run_page(source, path.resolve().name), path / "loads.html"
    if options.ep is None:
        raise ValueError(
            f"--ep: expected the number of expert-parallel ranks, since {path} is a routing trace; for example --ep 8 "
            "--slots 2"
        )
    layout = make_layout(source.experts, options.ep, options.node_size or 0, options.slots or 0)
    settings = PlanSettings(min_tokens=options.min_tokens, tolerance_ppm=round(options.tolerance * 1e6))
    page = trace_page(
        source, layout, path.name, settings=settings, tokens_per_micro_batch=options.tokens_per_microbatch
    )
    return page, path.with_suffix(".html")


def write_page(path: Path, page: str) -> None:
    """Replace a file in one step, so that a broken-off run leaves the old page."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main())
