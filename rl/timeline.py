"""The time line of a run: what engines, trainer and transfers did when, and where they waited.

``timeline.json`` in the run directory is a Chrome trace; open it at https://ui.perfetto.dev or chrome://tracing. A
process is one *track* (an engine, the trainer, the transfers); things of one track that overlap get rows of their own.
Gaps of a track are named ``bubble: waits for ...`` by what went on elsewhere meanwhile.

Spans are written step by step. The file is a JSON array without its closing bracket, which the format allows, so a run
that dies leaves a readable file, and a resumed one goes on writing it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRAINER, TRANSFER = "trainer", "transfer"


@dataclass(frozen=True)
class Span:
    """Something that took time on a track; ``start`` and ``end`` in seconds since the epoch."""

    track: str
    name: str
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Idle:
    """Fraction of a window in which engines (mean over them) and the trainer had nothing to do."""

    engines: float
    trainer: float


class Timeline:
    """Collects spans from any thread and writes them window by window.

    Args:
        path: of the Chrome trace; None keeps nothing but what idle times need.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._tracks: dict[str, int] = {}

    def span(self, track: str, name: str, start: float, end: float, args: Mapping[str, Any] | None = None) -> None:
        """Add a span; ``start`` and ``end`` from ``time.time()``."""
        with self._lock:
            self._spans.append(Span(track, name, start, max(start, end), args or {}))

    def close_window(self, start: float, end: float, engines: Mapping[str, float | None]) -> Idle:
        """Write what ended in a window (a training step), its bubbles, and return how idle both sides were.

        Spans that end later are kept for later windows; those that began earlier count from ``start`` on.

        Args:
            start, end: of the window, seconds since the epoch.
            engines: tracks of the engines that served in it; since when each has been busy with what will become spans
                when it ends, None: it is not.
        """
        with self._lock:
            done = [s for s in self._spans if s.end <= end]
            running = [s for s in self._spans if s.end > end]
            self._spans = running
        unfinished = [Span(name, "", since, end) for name, since in engines.items() if since is not None]
        seen = done + running + unfinished
        trainer = _busy([s for s in seen if s.track == TRAINER], start, end)
        of_engine = {name: _busy([s for s in seen if s.track == name], start, end) for name in engines}
        transfers = _busy([s for s in seen if s.track == TRANSFER], start, end)
        bubbles = []
        for name, busy in of_engine.items():
            bubbles += [
                Span(name, f"bubble: waits for {_reason(gap, transfers, trainer, 'weights', 'the trainer')}", *gap)
                for gap in _gaps(busy, start, end)
            ]
        every_engine = _busy([s for s in seen if s.track in of_engine], start, end)
        bubbles += [
            Span(TRAINER, f"bubble: waits for {_reason(gap, every_engine, transfers, 'samples', 'transfers')}", *gap)
            for gap in _gaps(trainer, start, end)
        ]
        self._write([*done, *bubbles])
        length = max(end - start, 1e-9)
        idle = [1 - _total(busy) / length for busy in of_engine.values()]
        return Idle(sum(idle) / max(1, len(idle)), 1 - _total(trainer) / length)

    def _write(self, spans: Iterable[Span]) -> None:
        if self._path is None:
            return
        events: list[dict[str, Any]] = []
        by_track: dict[str, list[Span]] = {}
        for span in spans:
            by_track.setdefault(span.track, []).append(span)
        for track, those in by_track.items():
            if track not in self._tracks:
                self._tracks[track] = len(self._tracks)
                events.append({"ph": "M", "pid": self._tracks[track], "name": "process_name", "args": {"name": track}})
            for row, span in _rows(those):
                events.append(
                    {
                        "ph": "X",
                        "pid": self._tracks[track],
                        "tid": row,
                        "name": span.name,
                        "cat": track.split()[0],
                        "ts": round(span.start * 1e6, 1),
                        "dur": round((span.end - span.start) * 1e6, 1),
                        "args": dict(span.args),
                    }
                )
        fresh = not self._path.exists()
        with self._path.open("a") as file:
            file.write("[\n" if fresh else "")
            file.writelines(json.dumps(event) + ",\n" for event in events)


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The events of a file of :class:`Timeline`."""
    text = path.read_text().rstrip().rstrip(",")
    events: list[dict[str, Any]] = json.loads(text + "]")
    return events


def _busy(spans: Iterable[Span], start: float, end: float) -> list[tuple[float, float]]:
    """Union of spans inside a window, ascending."""
    cut = sorted((max(s.start, start), min(s.end, end)) for s in spans if s.end > start and s.start < end)
    union: list[tuple[float, float]] = []
    for first, last in cut:
        if union and first <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], last))
        else:
            union.append((first, last))
    return union


def _gaps(busy: Sequence[tuple[float, float]], start: float, end: float) -> list[tuple[float, float]]:
    edges = [start, *[edge for interval in busy for edge in interval], end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 1e-3]


def _total(busy: Iterable[tuple[float, float]]) -> float:
    return sum(b - a for a, b in busy)


def _reason(
    gap: tuple[float, float],
    first: Sequence[tuple[float, float]],
    second: Sequence[tuple[float, float]],
    first_name: str,
    second_name: str,
) -> str:
    """Of two things that went on during a gap, the one that filled more of it; neither: the driver."""

    def share(busy: Sequence[tuple[float, float]]) -> float:
        return sum(max(0.0, min(b, gap[1]) - max(a, gap[0])) for a, b in busy)

    of_first, of_second = share(first), share(second)
    if max(of_first, of_second) < 0.1 * (gap[1] - gap[0]):
        return "the driver"
    return first_name if of_first >= of_second else second_name


def _rows(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """A row for each span so that those of a row do not overlap; few rows."""
    ends: list[float] = []
    placed = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        row = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
        if row == len(ends):
            ends.append(span.end)
        else:
            ends[row] = span.end
        placed.append((row, span))
    return placed
