"""Line and stacked-bar charts as inline SVG whose colours follow the page's light or dark theme.

Text stays text (the page's font applies), and ids are prefixed by the chart's name, so that many charts fit one page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

SERIES_COUNT = 7
# Placeholders that become CSS variables of the page.
_INK, _GRID = "#010203", "#040506"
_COLOURS = tuple(f"#0a0b{index:02x}" for index in range(SERIES_COUNT))
_VARIABLES = {_INK: "currentColor", _GRID: "var(--grid)"} | {c: f"var(--c{i})" for i, c in enumerate(_COLOURS)}
_DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = ("o", "s", "^", "D")
_MARKED_UP_TO = 40
_BARS = 60

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.3,
}


def _scientific(value: float, position: int | None = None) -> str:
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (step, value); values that are not finite are gaps.

    ``sparse`` draws points joined by a thin line, for what is measured only now and then.
    """

    label: str
    points: Sequence[tuple[float, float]]
    sparse: bool = False
    band: Sequence[float] = ()

    @property
    def has_data(self) -> bool:
        return any(math.isfinite(value) for _, value in self.points)


def line_chart(
    name: str,
    series: Sequence[Series],
    *,
    xlabel: str = "step",
    log_scale: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
) -> str:
    """An SVG element with one line per series that has data.

    Args:
        name: unique on the page, letters and digits.
        series: at most four.
        xlabel: what steps are.
        log_scale: logarithmic values; ignored unless all values are positive.
        limits: lower and upper end of the value axis, None for automatic.
    """
    shown = [line for line in series if line.has_data]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(name, top=0.89 if len(shown) > 1 else 0.965)
        for index, line in enumerate(shown):
            steps = [step for step, _ in line.points]
            values = [value if math.isfinite(value) else math.nan for _, value in line.points]
            marked = line.sparse or len(values) <= _MARKED_UP_TO
            axes.plot(
                steps,
                values,
                color=_COLOURS[index],
                label=line.label,
                linestyle=_DASHES[index],
                linewidth=1.2 if line.sparse else 1.8,
                marker=_MARKERS[index] if marked else "",
                markersize=6 if line.sparse else 3.5,
            )
            if line.band:
                low = [value - width for value, width in zip(values, line.band, strict=True)]
                high = [value + width for value, width in zip(values, line.band, strict=True)]
                axes.fill_between(steps, low, high, color=_COLOURS[index], alpha=0.15, linewidth=0)
        finite = [value for line in shown for _, value in line.points if math.isfinite(value)]
        if log_scale and finite and min(finite) > 0:
            axes.set_yscale("log")
            # Within a decade the default labels minor ticks as "6 x 10^-7", which is cut off at the left edge; over
            # several, minor ticks need no labels.
            axes.yaxis.set_major_formatter(FuncFormatter(_scientific))
            decades = math.log10(max(finite) / min(finite))
            axes.yaxis.set_minor_formatter(FuncFormatter(_scientific) if decades < 1 else NullFormatter())
        elif limits != (None, None):
            axes.set_ylim(bottom=limits[0], top=limits[1])
        _dress(axes, xlabel)
        if len(shown) > 1:
            figure.legend(loc="upper left", bbox_to_anchor=(0.01, 1.01), ncols=len(shown), borderaxespad=0)
        return _svg(figure, name)


def stacked_chart(name: str, steps: Sequence[int], parts: Mapping[str, Sequence[float]]) -> str:
    """An SVG element of bars over steps, stacked from ``parts`` (label -> value per step).

    The largest parts keep their own colour; what is left beyond the colours is summed as "other". Of many steps,
    neighbours share a bar that shows their mean.
    """
    stacks = [(label, list(parts[label])) for label in parts]
    if len(stacks) > SERIES_COUNT:
        ranked = sorted(stacks, key=lambda stack: -sum(stack[1]))
        kept = {label for label, _ in ranked[: SERIES_COUNT - 1]}
        other = [sum(values) for values in zip(*(values for label, values in stacks if label not in kept), strict=True)]
        stacks = [*(stack for stack in stacks if stack[0] in kept), ("other", other)]
    group = math.ceil(len(steps) / _BARS)
    middles = _means(steps, group)
    with matplotlib.rc_context(_STYLE):
        # As much room beside the bars as the longest name takes.
        longest = max((len(label) for label, _ in stacks), default=0)
        figure, axes = _figure(name, right=0.9 - 0.013 * longest)
        bottom = [0.0] * len(middles)
        for index, (label, values) in enumerate(stacks):
            heights = _means(values, group)
            axes.bar(
                middles, heights, bottom=bottom, width=0.82 * group, color=_COLOURS[index], label=label, linewidth=0
            )
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        _dress(axes, "step" if group == 1 else f"step (a bar is the mean of {group})")
        axes.set_ylim(bottom=0)
        handles, labels = axes.get_legend_handles_labels()
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0, "handlelength": 1.0}
        axes.legend(handles[::-1], labels[::-1], **place)
        return _svg(figure, name)


def _means(values: Sequence[float], group: int) -> list[float]:
    """Means of neighbouring groups; the last may be smaller."""
    chunks = [values[start : start + group] for start in range(0, len(values), group)]
    return [sum(chunk) / len(chunk) for chunk in chunks]


def _figure(name: str, right: float = 0.985, top: float = 0.965) -> tuple[Figure, matplotlib.axes.Axes]:
    matplotlib.rcParams["svg.hashsalt"] = name
    figure = Figure(figsize=(5.2, 2.5))
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    figure.subplots_adjust(left=0.115, right=right, bottom=0.185, top=top)
    return figure, axes


def _dress(axes: matplotlib.axes.Axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    low, high = axes.get_xlim()
    if high - low < 1:
        middle = round((low + high) / 2)
        axes.set_xlim(middle - 1, middle + 1)


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1), count=1
    )
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return re.sub(r"font-family: [^;\"]*|font: ([\d.]+px) [^;\"]*", _page_font, svg)


def _page_font(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}" if match[1] else "font-family: inherit"
