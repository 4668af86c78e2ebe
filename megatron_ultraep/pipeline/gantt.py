"""A schedule drawn: who computes what when, beside the models' plain 1F1B one after the other, on one time axis.

:func:`svg` is one drawing, :func:`page` a file of HTML that needs nothing but itself.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ultraep.pipeline.baselines import serial_timelines
from megatron_ultraep.pipeline.bound import lower_bound
from megatron_ultraep.pipeline.problem import Problem
from megatron_ultraep.pipeline.simulate import Timeline

BACKWARD = ("#0b62a4", "#c8500a", "#2e7d4f", "#7a5cc0")  # by model; forwards are lighter
FORWARD = ("#8fc1e6", "#f6b78d", "#97d1ae", "#c4b3ea")
LEFT, WIDTH, RIGHT = 64, 1160, 150  # pixels: names, time, figures of a node
BAR, STRIP, GAP = 20, 12, 5  # heights: a node's operations, its memory, below
HEAD, FOOT = 30, 30
MOST_ROW = 24  # nodes beyond that get thinner rows
TEXT_WIDTH = 6.4  # a digit

STYLE = """
:root { --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #566173; --line: #dfe3e9; --memory: #8a94a3; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #9fabbc; --line: #2c3542; --memory: #6d7a8d; }
}
body { margin: 0; padding: 20px; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; } p { margin: 0 0 14px; color: var(--soft); max-width: 80em; }
table { border-collapse: collapse; margin: 0 0 16px; background: var(--card); }
th, td { padding: 5px 12px; border: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); padding: 10px; overflow-x: auto; }
"""
SVG_STYLE = """
svg.gantt { font: 11px system-ui, sans-serif; }
svg.gantt .ink { fill: var(--ink, #1b2330); } svg.gantt .soft { fill: var(--soft, #566173); }
svg.gantt .title { font-size: 13px; font-weight: 600; } svg.gantt .line { stroke: var(--line, #dfe3e9); }
svg.gantt .end { stroke: var(--ink, #1b2330); stroke-dasharray: 3 3; }
svg.gantt .back { fill: var(--line, #dfe3e9); fill-opacity: 0.45; } svg.gantt .memory { fill: var(--memory, #8a94a3); }
svg.gantt .f { fill: #10151c; text-anchor: middle; } svg.gantt .b { fill: #ffffff; text-anchor: middle; }
"""


@dataclass(frozen=True)
class Bar:
    """An operation in a drawing; ``memory`` is what its node holds meanwhile."""

    node: int
    start: float
    end: float
    model: int
    replica: int
    stage: int
    microbatch: int
    backward: bool
    memory: float


@dataclass(frozen=True)
class Chart:
    """What happens on all nodes from 0 to ``makespan``."""

    title: str
    bars: tuple[Bar, ...]
    makespan: float

    def peak(self, node: int) -> float:
        return max((bar.memory for bar in self.bars if bar.node == node), default=0.0)

    def idle(self, node: int) -> float:
        """Share of the makespan."""
        busy = sum(bar.end - bar.start for bar in self.bars if bar.node == node)
        return 1 - busy / self.makespan if self.makespan else 0.0


def chart(title: str, timelines: Sequence[Timeline], problem: Problem) -> Chart:
    """Timelines one after the other; models are found in ``problem`` by name."""
    names = [model.name for model in problem.models]
    bars, begun = [], 0.0
    for timeline in timelines:
        for n, operations in enumerate(timeline.operations):
            for i, operation in enumerate(operations):
                bars.append(
                    Bar(
                        n,
                        begun + float(timeline.start[n][i]),
                        begun + float(timeline.end[n][i]),
                        names.index(timeline.problem.models[operation.model].name),
                        operation.replica,
                        operation.stage,
                        operation.microbatch,
                        operation.backward,
                        float(timeline.memory[n][i]),
                    )
                )
        begun += timeline.makespan
    return Chart(title, tuple(bars), begun)


def charts(timeline: Timeline) -> tuple[Chart, Chart]:
    """The schedule, and its models' 1F1B one after the other."""
    problem = timeline.problem
    names = " and ".join(model.name for model in problem.models)
    return (
        chart(f"Fused: {names}", [timeline], problem),
        chart("Plain 1F1B, one model after the other", serial_timelines(problem), problem),
    )


def svg(drawn: Sequence[Chart], problem: Problem, bound: float | None = None) -> str:
    """One drawing of charts below each other on the same time axis.

    Args:
        bound: drawn as a line where given.
    """
    span = max(one.makespan for one in drawn) or 1.0
    most = max(one.peak(n) for one in drawn for n in range(problem.nodes)) or 1.0
    bar, strip, gap = (BAR, STRIP, GAP) if problem.nodes <= MOST_ROW else (10, 5, 2)
    height_of_one = HEAD + problem.nodes * (bar + strip + gap) + FOOT
    parts, top = [], 0.0
    for one in drawn:
        parts.append(_panel(one, problem, top, span, most, (bar, strip, gap), bound))
        top += height_of_one
    total = LEFT + WIDTH + RIGHT
    return (
        f'<svg class="gantt" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {top:.0f}" width="{total}" '
        f'height="{top:.0f}"><style>{SVG_STYLE}</style>{"".join(parts)}</svg>'
    )


def _panel(
    one: Chart,
    problem: Problem,
    top: float,
    span: float,
    most: float,
    heights: tuple[int, int, int],
    bound: float | None,
) -> str:
    """One chart from ``top`` on; ``span`` is the axis, ``most`` the memory that fills a strip."""
    bar, strip, gap = heights
    scale = WIDTH / span
    below = top + HEAD + problem.nodes * (bar + strip + gap)
    bubble = sum(one.idle(n) for n in range(problem.nodes)) / problem.nodes
    peak = max(one.peak(n) for n in range(problem.nodes))
    parts = [
        f'<text class="ink title" x="{LEFT}" y="{top + 18}">{html.escape(one.title)}: {one.makespan:.6g}, '
        f"bubbles {bubble:.1%}, peak memory {peak:.6g}</text>",
        f'<text class="soft" x="{LEFT + WIDTH + 8}" y="{top + 18}">idle, peak memory</text>',
    ]
    for n in range(problem.nodes):
        y = top + HEAD + n * (bar + strip + gap)
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y + bar - 5}" text-anchor="end">node {n}</text>')
        parts.append(f'<rect class="back" x="{LEFT}" y="{y}" width="{one.makespan * scale:.1f}" height="{bar}"/>')
        parts.append(
            f'<text class="soft" x="{LEFT + WIDTH + 8}" y="{y + bar - 5}">{one.idle(n):.1%}, {one.peak(n):.6g}</text>'
        )
        mine = sorted((each for each in one.bars if each.node == n), key=lambda each: each.start)
        parts += [_bar(each, problem, y, scale, bar) for each in mine]
        parts.append(_memory(mine, y + bar, scale, strip / most, strip, one.makespan))
    parts.append(f'<path class="line" d="M{LEFT} {below}h{WIDTH}"/>')
    parts += [
        f'<text class="soft" x="{LEFT + tick * scale:.1f}" y="{below + 14}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(span)
    ]
    for value, name in ((one.makespan, "makespan"), (bound, "lower bound")):
        if value is not None and (name == "makespan" or value < one.makespan * (1 - 1e-9)):
            x = LEFT + value * scale
            parts.append(
                f'<path class="end" d="M{x:.1f} {top + HEAD - 4}V{below}"><title>{name} {value:.6g}</title></path>'
            )
            parts.append(f'<text class="soft" x="{x:.1f}" y="{below + 26}" text-anchor="middle">{name}</text>')
    return "".join(parts)


def _bar(bar: Bar, problem: Problem, y: float, scale: float, height: int) -> str:
    x, width = LEFT + bar.start * scale, (bar.end - bar.start) * scale
    model = problem.models[bar.model]
    colour = (BACKWARD if bar.backward else FORWARD)[bar.model % len(FORWARD)]
    replica = f", replica {bar.replica}" if model.replicas > 1 else ""
    kind = "backward" if bar.backward else "forward"
    made = (
        f'<rect x="{x:.1f}" y="{y}" width="{max(0.3, width - 0.4):.1f}" height="{height}" fill="{colour}"><title>'
        f"{html.escape(model.name)} {kind}, micro-batch {bar.microbatch}, stage {bar.stage}{replica}; "
        f"{bar.start:.6g} to {bar.end:.6g}; held {bar.memory:.6g}</title></rect>"
    )
    if width >= 2 + TEXT_WIDTH * len(str(bar.microbatch)) and height >= BAR:
        made += (
            f'<text class="{"b" if bar.backward else "f"}" x="{x + width / 2:.1f}" y="{y + height - 6}" '
            f'pointer-events="none">{bar.microbatch}</text>'
        )
    return made


def _memory(bars: Sequence[Bar], y: float, scale: float, per_unit: float, strip: int, makespan: float) -> str:
    """What a node holds over time, as an area that hangs on nothing: its floor is ``y + strip``."""
    floor = y + strip
    points = [f"M{LEFT} {floor:.1f}"]
    for bar in bars:
        points.append(f"H{LEFT + bar.start * scale:.1f}V{floor - bar.memory * per_unit:.1f}")
    points.append(f"H{LEFT + (bars[-1].end if bars else makespan) * scale:.1f}V{floor:.1f}Z")
    return f'<path class="memory" d="{"".join(points)}"/>'


def _ticks(span: float) -> list[float]:
    """About ten round numbers from 0 to ``span``."""
    step = 10.0 ** len(str(int(span))) / 1000 if span >= 1 else 10.0 ** -len(f"{1 / span:.0f}") / 10
    for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if span / (step * factor) <= 12:
            step *= factor
            break
    return [i * step for i in range(int(span / step + 1e-9) + 1)]


def page(timeline: Timeline, title: str, note: str = "") -> str:
    """HTML of a schedule beside plain 1F1B: figures, then both drawn.

    Args:
        note: a sentence under the title, such as how the schedule was found.
    """
    problem = timeline.problem
    fused, plain = charts(timeline)
    bound = lower_bound(problem)
    head = (
        "<tr><th></th><th>makespan</th><th>speed-up</th><th>/ lower bound</th><th>bubbles</th><th>peak memory</th></tr>"
    )
    rows = "".join(
        f"<tr><td>{html.escape(one.title)}</td><td>{one.makespan:.6g}</td>"
        f"<td>{plain.makespan / one.makespan:.3f}x</td><td>{one.makespan / bound:.4f}</td>"
        f"<td>{sum(one.idle(n) for n in range(problem.nodes)) / problem.nodes:.1%}</td>"
        f"<td>{max(one.peak(n) for n in range(problem.nodes)):.6g}</td></tr>"
        for one in (fused, plain)
    )
    text = (
        f"{html.escape(note)} Simulated; no schedule of these models is shorter than {bound:.6g}. Numbers in bars are "
        f"micro-batches; below each node, the activations it holds. {_legend(problem)}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{text}</p><table>{head}{rows}</table>"
        f'<div class="card">{svg((fused, plain), problem, bound)}</div></body></html>\n'
    )


def _legend(problem: Problem) -> str:
    parts = []
    for m, model in enumerate(problem.models):
        for colours, kind in ((FORWARD, "forward"), (BACKWARD, "backward")):
            if kind == "forward" or not model.forward_only:
                parts.append(
                    f'<span style="white-space:nowrap"><svg width="12" height="12"><rect width="12" height="12" '
                    f'fill="{colours[m % len(colours)]}"/></svg> {html.escape(model.name)} {kind}</span>'
                )
    return " &nbsp; ".join(parts)
