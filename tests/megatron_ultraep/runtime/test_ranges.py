"""Ranges: nothing while off, nested per thread, backward ranges that end though nobody says so."""

import threading

import pytest
import torch

from megatron_ultraep.runtime import ranges


class Text:
    def __init__(self):
        self.asked = 0

    def __str__(self):
        self.asked += 1
        return "key"


def names_of(profiler):
    events = [e for e in profiler.events() if " | " in e.name]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


def profile():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def test_off_nothing_is_named_or_recorded():
    key = Text()
    with profile() as profiler, ranges.span("train", key):
        assert not ranges.on()
    assert key.asked == 0
    assert names_of(profiler) == []


def test_on_is_counted():
    with ranges.enabled():
        with ranges.enabled():
            pass
        assert ranges.on()
    assert not ranges.on()
    ranges.disable()
    with ranges.enabled():
        assert ranges.on()


def test_spans_and_decorated_functions_are_recorded():
    @ranges.ranged("call | f")
    def f(x):
        """What f says."""
        return 2 * x

    with profile() as profiler, ranges.enabled(), ranges.span("outer", Text()):
        assert f(3) == 6
    assert f.__doc__ == "What f says."
    assert names_of(profiler) == ["outer | key", "call | f"]


def test_a_span_ends_when_its_block_raises():
    with ranges.enabled():
        with pytest.raises(KeyError), ranges.span("a"):
            raise KeyError
        assert ranges._stack() == []


def test_backward_ends_with_the_next_one_or_with_what_is_around_it():
    with profile() as profiler, ranges.enabled():
        with ranges.span("pass", "p"):
            layers = [ranges.Backward(f"backward | layer {i}", 0) for i in range(3)]
            part = ranges.Backward("backward | part of layer 2", 1)
            layers[2].begin(None)
            part.begin(None)
            layers[1].begin(None)  # the hook of a tensor that two layers share runs before the end of the later one
            part.end(None)
            layers[2].end(None)
            assert [o.backward for o in ranges._stack()] == [None, 0]
            layers[1].end(None)
            assert [o.backward for o in ranges._stack()] == [None]
            layers[0].begin(None)  # its input needs no gradient
        assert ranges._stack() == []
        layers[0].end(None)
    assert names_of(profiler) == [
        "pass | p",
        "backward | layer 2",
        "backward | part of layer 2",
        "backward | layer 1",
        "backward | layer 0",
    ]


def test_threads_have_ranges_of_their_own():
    with ranges.enabled(), ranges.span("main"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(list(ranges._stack())))
        thread.start()
        thread.join(30)
        assert seen == [[]]
        assert len(ranges._stack()) == 1


def test_nvtx_only_with_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: calls.append(text))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with ranges.enabled(), ranges.span("a", "k"), ranges.span("b"):
        pass
    assert calls == ["a | k", "b", "pop", "pop"]
