"""What the viewer's page holds: aggregates of all records, and a bounded choice of records to look into.

Rule of the choice, for drill-down: the records with the largest imbalance after balancing (40) and before it (40), the
largest imbalance that the gate or missing slots left alone (40), the worst after balancing of every layer (one each),
and a uniform random sample (120), in turns until their JSON takes 2.5 MB. Aggregates count every record: percentiles
over at most 240 bins of steps, and for the heat map at most 24,000 cells (layers x bins, all passes together).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultraep.telemetry.blocks import FIGURES, OUTCOMES, Block, Shape
from megatron_ultraep.telemetry.records import LoadRecord, record

Floats = npt.NDArray[np.float64]

MOST_BINS = 240
MOST_CELLS = 24_000
MOST_RECORD_BYTES = 2_500_000
PERCENTILES = (5, 25, 50, 75, 95, 100)
CHOICES = {
    "after": ("largest imbalance after balancing", 40),
    "before": ("largest imbalance before balancing", 40),
    "skipped": ("largest imbalance left alone", 40),
    "layer": ("worst of each layer, after balancing", 1),
    "sample": ("uniform random sample", 120),
}
_LEFT_ALONE = [OUTCOMES.index("gain_below_cost"), OUTCOMES.index("no_replica_possible")]
_MOST_LAYERS_CHOSEN = 400


def imbalances(rank_tokens: npt.NDArray[np.int64]) -> Floats:
    """float64 ``[n]``: max / mean over ranks of ``[n, G]`` tokens; 1.0 where there are none."""
    mean = rank_tokens.mean(axis=1)
    out = np.ones(len(mean))
    np.divide(rank_tokens.max(axis=1), mean, out=out, where=mean > 0)
    return out


@dataclass
class _Top:
    """The records with the largest scores seen so far."""

    limit: int
    found: list[tuple[float, int, LoadRecord]] = field(default_factory=list)

    def offer(self, scores: Floats, block: Block, first: int) -> None:
        """``scores`` ``[n]`` of the block's records, which are counted from ``first``; -inf is never taken."""
        best = np.argsort(-scores, kind="stable")[: self.limit]
        floor = self.found[-1][0] if len(self.found) == self.limit else -np.inf
        best = best[scores[best] > floor]
        self.found += [(float(scores[i]), first + int(i), record(block, int(i))) for i in best]
        self.found = sorted(self.found, key=lambda entry: (-entry[0], entry[1]))[: self.limit]


class Collector:
    """Takes blocks one after the other and keeps what the page shows of them.

    Args:
        axis: what the x axis counts, ``"step"`` or ``"micro-batch"``; None: steps, if there is more than one.
        seed: of the uniform sample.
    """

    def __init__(self, axis: str | None = None, seed: int = 0):
        self._axis = axis
        self._random = np.random.default_rng(seed)
        self._series: dict[tuple[str, str], int] = {}
        self._columns: list[tuple[npt.NDArray[Any], ...]] = []
        self._decisions: dict[int, npt.NDArray[np.float64]] = {}
        self._tops: dict[str, _Top] = {name: _Top(limit) for name, (_, limit) in CHOICES.items() if name != "layer"}
        self._layers: dict[tuple[int, int], _Top] = {}
        self._shapes: dict[Any, int] = {}
        self._groups: dict[str, None] = {}
        self.count = 0

    def add(self, block: Block) -> None:
        """Count a block."""
        before, after = imbalances(block.rank_before()), imbalances(block.rank_after())
        replicas = (block.replica_expert >= 0).sum(axis=(1, 2))
        balanced = (block.outcome == OUTCOMES.index("balanced")).mean(axis=1)
        names = [[self._series.setdefault((m, p), len(self._series)) for p in block.passes] for m in block.models]
        series = np.array(names)[block.model, block.pass_]
        self._columns.append(
            (
                series.astype(np.int16),
                block.step,
                block.microbatch,
                block.layer,
                before.astype(np.float32),
                after.astype(np.float32),
                replicas.astype(np.int32),
                balanced.astype(np.float32),
            )
        )
        for number in np.unique(series):
            self._count_decisions(int(number), block, series == number)
        left_alone = np.isin(block.outcome, _LEFT_ALONE).any(axis=1)
        for name, scores in (
            ("after", after),
            ("before", before),
            ("skipped", np.where(left_alone & (after > 1), after, -np.inf)),
            ("sample", self._random.random(len(block))),
        ):
            self._tops[name].offer(scores, block, self.count)
        for pair in map(tuple, np.unique(np.stack([series, block.layer]), axis=1).T.tolist()):
            if pair in self._layers or len(self._layers) < _MOST_LAYERS_CHOSEN:
                mine = (series == pair[0]) & (block.layer == pair[1])
                top = self._layers.setdefault(pair, _Top(1))
                top.offer(np.where(mine, after, -np.inf), block, self.count)
        self._shapes[block.shape] = self._shapes.get(block.shape, 0) + len(block)
        self._groups[block.group] = None
        self.count += len(block)

    def _count_decisions(self, number: int, block: Block, mask: npt.NDArray[np.bool_]) -> None:
        """Per outcome: how often, and sums of before / bound and of time saved and paid (us)."""
        totals = self._decisions.setdefault(number, np.zeros((len(OUTCOMES), 4)))
        outcome = block.outcome[mask].ravel()
        figures = block.figures[mask].reshape(-1, len(FIGURES)).astype(np.float64)
        ratio = np.divide(figures[:, 0], figures[:, 2], out=np.ones(len(figures)), where=figures[:, 2] > 0)
        weights = (None, ratio, figures[:, 3] / 1e6, figures[:, 4] / 1e6)
        for column, weight in enumerate(weights):
            totals[:, column] += np.bincount(outcome, weight, minlength=len(OUTCOMES))

    def data(
        self, title: str, *, facts: Sequence[str] = (), warnings: Sequence[str] = (), source: str = "run"
    ) -> dict[str, Any]:
        """All that the page shows, as JSON values.

        Args:
            title: heading of the page.
            facts: short pieces of text under it, after those that are known here.
            warnings: shown above the charts.
            source: ``"run"`` or ``"trace"``: what the page is about.
        """
        columns = [np.concatenate(c) for c in zip(*self._columns, strict=True)] if self._columns else []
        axis = self._axis or ("step" if not columns or len(np.unique(columns[1])) > 1 else "micro-batch")
        names = sorted(self._series, key=lambda name: (name[1] != "train", name))
        cells = MOST_CELLS // max(1, len(names))
        layouts: dict[Any, int] = {}
        return {
            "title": title,
            "source": source,
            "axis": axis,
            "facts": [*self._facts(), *facts],
            "warnings": list(warnings),
            "percentiles": PERCENTILES,
            "outcomes": OUTCOMES,
            "series": [
                self._series_data(f"{model} / {pass_}", self._series[model, pass_], columns, axis, cells)
                for model, pass_ in names
            ],
            "choices": {name: text for name, (text, _) in CHOICES.items()},
            "records": self._records(names, layouts),
            "layouts": [
                {"experts": s.experts, "ranks": s.ranks, "node": s.node_size, "slots": s.slots, "home": home}
                for s, home in layouts
            ],
            "total": self.count,
        }

    def _facts(self) -> Iterator[str]:
        if not self.count:
            return
        yield f"{self.count:,} load records (micro-batch x layer)"
        for shape in itertools.islice(self._shapes, 3):
            nodes = f"{shape.nodes} node{'s' if shape.nodes > 1 else ''} of {shape.node_size}"
            yield f"{shape.experts} experts on {shape.ranks} ranks ({nodes}), {shape.slots} slots a rank"
        groups = list(self._groups)
        yield f"recorded by {', '.join(groups[:4])}{f' and {len(groups) - 4} more' if len(groups) > 4 else ''}"

    def _series_data(
        self, name: str, number: int, columns: Sequence[npt.NDArray[Any]], axis: str, cells: int
    ) -> dict[str, Any]:
        mine = columns[0] == number
        step, microbatch, layer, before, after, replicas, balanced = (c[mine] for c in columns[1:])
        x = step if axis == "step" else microbatch.astype(np.int64)
        layers = np.unique(layer)
        edges, of_bin = _bins(x, MOST_BINS)
        heat_edges, of_heat = _bins(x, max(1, min(MOST_BINS, cells // len(layers))))
        heat = {
            key: _cell_means(values, np.searchsorted(layers, layer), len(layers), of_heat, len(heat_edges))
            for key, values in (("before", before), ("after", after), ("replicas", replicas), ("balanced", balanced))
        }
        return {
            "name": name,
            "tiles": _tiles(before, after, replicas, self._decisions[number]),
            "bins": edges,
            "before": _by_bin(before, of_bin, len(edges), _percentiles),
            "after": _by_bin(after, of_bin, len(edges), _percentiles),
            "layers": layers.tolist(),
            "heat_bins": heat_edges,
            "heat": heat,
            "decisions": [
                [int(count), *(_round(total / count, 3) if count else None for total in rest)]
                for count, *rest in self._decisions[number].tolist()
            ],
        }

    def _records(self, names: Sequence[tuple[str, str]], layouts: dict[Any, int]) -> list[dict[str, Any]]:
        lists = [[("layer", *t.found[0][1:]) for t in self._layers.values() if t.found]]
        lists += [[(name, index, found) for _, index, found in top.found] for name, top in self._tops.items()]
        chosen: dict[int, dict[str, Any]] = {}
        used = 0
        for name, index, found in itertools.chain.from_iterable(
            (entry for entry in turn if entry is not None) for turn in itertools.zip_longest(*lists)
        ):
            if index in chosen:
                chosen[index]["why"].append(name)
                continue
            layout = (Shape.of(found.layout), _home(found))
            entry = _record_data(found, names, layouts.get(layout, len(layouts)))
            size = len(json.dumps(entry if layout in layouts else [entry, layout], separators=(",", ":")))
            if used + size > MOST_RECORD_BYTES and chosen:
                continue
            used += size
            layouts.setdefault(layout, len(layouts))
            chosen[index] = entry | {"why": [name]}
        return sorted(chosen.values(), key=lambda r: (r["series"], r["step"], r["microbatch"], r["layer"]))


def _home(found: LoadRecord) -> tuple[int, ...]:
    """The home permutation as the page has it: empty for the identity."""
    home = found.layout.home_slot
    return () if home == tuple(range(len(home))) else home


def _record_data(found: LoadRecord, names: Sequence[tuple[str, str]], layout: int) -> dict[str, Any]:
    decisions = [
        [OUTCOMES.index(d.outcome), d.before, d.after, d.bound, _micro(d.saved_ps), _micro(d.cost_ps)]
        for d in found.decisions
    ]
    return {
        "series": names.index((found.key.model, found.key.pass_)),
        "group": found.group,
        "step": found.key.step,
        "microbatch": found.key.microbatch,
        "layer": found.layer,
        "layout": layout,
        "tokens": found.tokens.tolist(),
        "replicas": [[r.expert, r.rank, r.slot, r.tokens] for r in found.replicas],
        "decisions": decisions,
    }


def _micro(picoseconds: int) -> float:
    return _round(picoseconds / 1e6, 1)


def _bins(x: npt.NDArray[np.int64], most: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
    """First and last x of every bin of neighbouring values, and the bin ``[n]`` of each record."""
    values, inverse = np.unique(x, return_inverse=True)
    per_bin = -(-len(values) // most)
    edges = [
        [int(part[0]), int(part[-1])] for part in (values[i : i + per_bin] for i in range(0, len(values), per_bin))
    ]
    return edges, inverse.reshape(-1) // per_bin


def _by_bin(
    values: npt.NDArray[Any], of_bin: npt.NDArray[np.int64], bins: int, reduce: Callable[[npt.NDArray[Any]], Any]
) -> list[Any]:
    order = np.argsort(of_bin, kind="stable")
    bounds = np.cumsum(np.bincount(of_bin, minlength=bins))[:-1]
    return [reduce(part) for part in np.split(values[order], bounds)]


def _percentiles(values: npt.NDArray[Any]) -> list[float]:
    return [_round(v, 3) for v in np.percentile(values, PERCENTILES)]


def _cell_means(
    values: npt.NDArray[Any], row: npt.NDArray[np.int64], rows: int, column: npt.NDArray[np.int64], columns: int
) -> list[list[float | None]]:
    """Means over records by layer and bin; None where there are none."""
    cell = row * columns + column
    count = np.bincount(cell, minlength=rows * columns)
    total = np.bincount(cell, values, minlength=rows * columns)
    means = [_round(t / c, 3) if c else None for t, c in zip(total.tolist(), count.tolist(), strict=True)]
    return [means[i * columns : (i + 1) * columns] for i in range(rows)]


def _tiles(
    before: npt.NDArray[Any], after: npt.NDArray[Any], replicas: npt.NDArray[Any], decisions: Floats
) -> list[tuple[str, str]]:
    def change(reduce: Callable[[npt.NDArray[Any]], Any]) -> str:
        return f"{reduce(before):.3f} → {reduce(after):.3f}"

    share = decisions[OUTCOMES.index("balanced"), 0] / max(1.0, decisions[:, 0].sum())
    return [
        ("imbalance, mean", change(np.mean)),
        ("imbalance, 95th percentile", change(lambda v: np.percentile(v, 95))),
        ("imbalance, largest", change(np.max)),
        ("replicas per micro-batch and layer, mean", f"{replicas.mean():.1f}"),
        ("nodes given replicas", f"{share:.1%}"),
    ]


def _round(value: float, digits: int) -> float:
    """Rounded; a whole number without its point, which is shorter on the page."""
    rounded = round(float(value), digits)
    return int(rounded) if rounded == int(rounded) else rounded


def collect(blocks: Iterable[Block], axis: str | None = None) -> Collector:
    """A collector that was given all blocks."""
    collector = Collector(axis)
    for block in blocks:
        collector.add(block)
    return collector


def render(data: Mapping[str, Any], template: str, css: str, js: str) -> str:
    """The page. In ``template``, ``/*css*/``, ``/*js*/`` and ``/*data*/`` are replaced."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    # Inside a script element only "</" and "<!--" could end or confuse it.
    text = text.replace("<", "\\u003c")
    for mark, content in (("/*css*/", css), ("/*js*/", js), ("/*data*/", text)):
        head, found, tail = template.partition(mark)
        if not found:
            raise ValueError(f"expected {mark} in the template of the page")
        template = head + content + tail
    return template
