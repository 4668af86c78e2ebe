"""Windows of one process."""

import gzip
import json
import threading

import pytest
import torch

from megatron_ultraep.runtime import ranges
from megatron_ultraep.runtime.profiler import ProfileSettings, Window


def names(path):
    with gzip.open(path, "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def test_a_window_writes_what_ran_in_it(tmp_path):
    window = Window(ProfileSettings(), tmp_path / "new" / "step_00001_rank_0.json.gz")
    with ranges.span("before"):
        torch.zeros(4).add(1)
    window.start()
    with pytest.raises(RuntimeError, match=r"step_00001_rank_0.json.gz runs already: stop\(\) it first"):
        window.start()
    with ranges.span("inside"):
        torch.zeros(4).mul(2)
    path = window.stop()
    assert not ranges.on()
    with ranges.span("after"):
        torch.zeros(4).sub(1)
    assert {"inside", "aten::mul"} <= names(path)
    assert not {"before", "after", "aten::add", "aten::sub"} & names(path)
    assert window.stop() is None


def test_other_threads_are_seen_when_asked_for(tmp_path):
    def work():
        with ranges.span("elsewhere"):
            torch.zeros(4).exp()

    seen = {}
    for threads in (False, True):
        window = Window(ProfileSettings(), tmp_path / f"{threads}.json.gz", threads=threads)
        ready, go = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda ready=ready, go=go: (ready.set(), go.wait(30), work()))
        thread.start()
        assert ready.wait(30)
        window.start()
        go.set()
        thread.join(30)
        seen[threads] = "elsewhere" in names(window.stop())
    assert seen == {False: False, True: True}


def test_shapes_stacks_and_memory_are_recorded_when_asked_for(tmp_path):
    def trace(settings):
        window = Window(settings, tmp_path / f"{settings.shapes}.json.gz")
        window.start()
        torch.zeros(3, 5).mul(2)
        with gzip.open(window.stop(), "rt") as file:
            return json.load(file)["traceEvents"]

    plain, full = trace(ProfileSettings()), trace(ProfileSettings(shapes=True, stacks=True, memory=True))
    for found, expected in ((plain, False), (full, True)):
        (mul,) = [e for e in found if e["name"] == "aten::mul"]
        assert ([3, 5] in mul["args"].get("Input Dims", [])) == expected
        assert any(e.get("cat") == "python_function" for e in found) == expected
        assert any(e["name"] == "[memory]" for e in found) == expected


def test_a_dropped_window_writes_nothing(tmp_path):
    window = Window(ProfileSettings(), tmp_path / "a.json.gz")
    window.start()
    window.drop()
    window.drop()
    assert not ranges.on()
    assert list(tmp_path.iterdir()) == []


def test_the_tool_of_nsight_captures_between_start_and_stop(tmp_path, monkeypatch):
    calls = []

    class Cudart:
        def cudaProfilerStart(self):
            calls.append("start")

        def cudaProfilerStop(self):
            calls.append("stop")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    window = Window(ProfileSettings(tool="nsys"), tmp_path / "a.json.gz")
    window.start()
    assert ranges.on()
    assert window.stop() is None
    assert calls == ["start", "synchronize", "stop"]
    assert list(tmp_path.iterdir()) == []
