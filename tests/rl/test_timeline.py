"""The time line: idle fractions, named bubbles, rows that do not overlap, a file that a viewer reads."""

import itertools
from pathlib import Path

import pytest

from rl.timeline import TRAINER, TRANSFER, Timeline, read_timeline


def test_idle_fractions_and_named_bubbles(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    timeline.span("engine 0", "train/0/0", 100.0, 104.0, {"samples": 8})
    timeline.span("engine 0", "train/0/1", 101.0, 106.0)
    timeline.span("engine 1", "train/0/2", 100.0, 102.0)
    timeline.span(TRAINER, "train", 106.0, 109.0)
    timeline.span(TRANSFER, "weights of step 1", 109.0, 110.0)
    idle = timeline.close_window(100.0, 110.0, {"engine 0": None, "engine 1": None})
    assert idle.engines == pytest.approx((0.4 + 0.8) / 2)
    assert idle.trainer == pytest.approx(0.7)
    events = read_timeline(tmp_path / "timeline.json")
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(names.values()) == {"engine 0", "engine 1", TRAINER, TRANSFER}
    bubbles = {(names[e["pid"]], e["name"], e["ts"] / 1e6) for e in events if e["name"].startswith("bubble")}
    assert bubbles == {
        ("engine 0", "bubble: waits for the trainer", 106.0),
        ("engine 1", "bubble: waits for the trainer", 102.0),
        (TRAINER, "bubble: waits for samples", 100.0),
        (TRAINER, "bubble: waits for transfers", 109.0),
    }


def test_spans_of_a_row_do_not_overlap_and_windows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    for i in range(20):
        timeline.span("engine 0", str(i), i * 0.5, i * 0.5 + 2.0)
    timeline.close_window(0.0, 6.0, {"engine 0": None})
    first = len(read_timeline(path))
    timeline.close_window(6.0, 20.0, {"engine 0": None})
    events = [e for e in read_timeline(path) if e["ph"] == "X" and not e["name"].startswith("bubble")]
    assert len(read_timeline(path)) > first
    assert sorted(int(e["name"]) for e in events if e["cat"] == "engine") == list(range(20)), "each span once"
    for window in (events[:9], events[9:]):
        for row in {e["tid"] for e in window}:
            spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in window if e["tid"] == row)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_resumed_run_goes_on_writing(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    for _ in range(2):
        timeline = Timeline(path)
        timeline.span(TRAINER, "train", 1.0, 2.0)
        timeline.close_window(1.0, 2.0, {})
    assert len([e for e in read_timeline(path) if e["name"] == "train"]) == 2


def test_without_a_file_idle_times_are_known(tmp_path: Path) -> None:
    timeline = Timeline(None)
    timeline.span("engine 0", "a", 0.0, 5.0)
    idle = timeline.close_window(0.0, 10.0, {"engine 0": None})
    assert (idle.engines, idle.trainer) == (0.5, 1.0)


def test_what_has_not_ended_is_work_too(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    assert timeline.close_window(0.0, 10.0, {"engine 0": 4.0}).engines == pytest.approx(0.4)
    timeline.span("engine 0", "train/0/0", 4.0, 12.0)
    assert timeline.close_window(10.0, 20.0, {"engine 0": None}).engines == pytest.approx(0.8)
    assert [e["dur"] for e in read_timeline(tmp_path / "timeline.json") if e["name"] == "train/0/0"] == [8e6]
