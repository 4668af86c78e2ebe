"""The engine's thread with an engine made of a counter: one token per step and request."""

from __future__ import annotations

import threading
import time
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import pytest

from rl.rollout import compat, stepper
from rl.rollout.stepper import EngineFailed, EngineThread, RankDied


class CountingEngine:
    """Finishes a request when it has as many tokens as its params say; as much of vLLM as the thread uses."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={})
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.ranks: list[Any] = []

    def add_request(self, request_id: str, prompt: dict, params: int) -> str:
        state = SimpleNamespace(queue=None, tokens=0, limit=params)
        state.detokenizer = SimpleNamespace(num_output_tokens=lambda: state.tokens)
        self.output_processor.request_states[request_id + "-x"] = state
        return request_id + "-x"

    def _finish(self, request_id: str, reason: str) -> None:
        state = self.output_processor.request_states.pop(request_id)
        state.queue.put(SimpleNamespace(finished=True, tokens=state.tokens, reason=reason))

    def step(self) -> None:
        self.gate.wait(10)
        if self.broken:
            raise ArithmeticError("broken")
        for request_id, state in list(self.output_processor.request_states.items()):
            state.tokens += 1
            if state.tokens == state.limit:
                self._finish(request_id, "length")

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        for request_id in request_ids:
            self._finish(request_id, "abort")


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch):
    engine = CountingEngine()
    monkeypatch.setattr(compat, "shut_down", lambda engine: None)
    monkeypatch.setattr(compat, "rank_processes", lambda engine: engine.ranks)
    thread = EngineThread(lambda: engine, 7, "test")
    thread.ready.result(10)
    yield engine, thread
    engine.gate.set()
    thread.stop(10)


def test_requests_finish(counting) -> None:
    _, thread = counting
    requests = [thread.submit(str(n), [1], n).result(10) for n in (3, 1, 50)]
    assert [r.output.result(10).tokens for r in requests] == [3, 1, 50]
    assert [r.spans for r in requests] == [[(0, 7)]] * 3
    assert thread.call(lambda engine: thread.running).result(10) == 0


def test_an_id_that_runs_is_refused(counting) -> None:
    engine, thread = counting
    engine.gate.clear()
    first = thread.submit("a", [1], 5)
    again = thread.submit("a", [1], 5)
    engine.gate.set()
    first.result(10)
    with pytest.raises(ValueError, match="'a' is already running"):
        again.result(10)


def test_abort_returns_what_is_there(counting) -> None:
    _engine, thread = counting
    request = thread.submit("a", [1], 10**9).result(10)
    assert thread.abort(["a", "b"]).result(10) == 1
    assert request.output.result(10).reason == "abort"
    assert thread.abort(["a"]).result(10) == 0


def test_version_spans_grow_under_running_requests(counting) -> None:
    _engine, thread = counting

    def update_twice(vllm: CountingEngine) -> int:
        thread.start_version(vllm, 8)
        thread.start_version(vllm, 9)  # no token in between: 8 leaves no span
        return vllm.output_processor.request_states["a-x"].tokens

    request = thread.submit("a", [1], 10**9).result(10)
    while thread.progress().result(10)["a"] < 3:
        pass
    at = thread.call(update_twice).result(10)
    thread.abort(["a"]).result(10)
    assert request.spans == [(0, 7), (at, 9)]


def test_step_times_are_counted_by_requests_that_ran(counting) -> None:
    engine, thread = counting
    engine.gate.clear()
    requests = [thread.submit(str(n), [1], n) for n in (3, 5)]
    engine.gate.set()
    for request in requests:
        request.result(10).output.result(10)
    times = thread.step_times().result(10)
    # The second may come a step after the first.
    assert sum(steps for steps, _ in times.values()) in (5, 6)
    assert times[2][0] in (2, 3)
    assert all(0 < seconds < 10 for _, seconds in times.values())
    assert thread.step_times().result(10) == {}


def test_failure_reaches_everyone_who_waits(counting) -> None:
    engine, thread = counting
    engine.gate.clear()
    running = thread.submit("a", [1], 10**9).result(10)
    waiting = thread.call(lambda vllm: None)
    engine.broken = True
    engine.gate.set()
    with pytest.raises(EngineFailed, match="broken"):
        running.output.result(10)
    with pytest.raises(EngineFailed, match="broken"):
        waiting.result(10)
    with pytest.raises(EngineFailed, match="broken"):
        thread.call(lambda vllm: None).result(10)


def test_stop_ends_running_requests(counting) -> None:
    _, thread = counting
    running = thread.submit("a", [1], 10**9).result(10)
    assert thread.stop(10)
    with pytest.raises(EngineFailed, match="stopped"):
        running.output.result(10)


def test_an_engine_that_does_not_come_up_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> None:
        raise OSError("no such model")

    thread = stepper.EngineThread(build, 0, "test")
    with pytest.raises(OSError, match="no such model"):
        thread.ready.result(10)
    with pytest.raises(EngineFailed, match="no such model"):
        thread.call(lambda vllm: None).result(10)


def ask_until_refused(thread: EngineThread) -> None:
    """News of a rank's end take a moment."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        thread.call(lambda engine: None).result(60)


@pytest.mark.parametrize("waits_for", ["a command", "a step"])
def test_the_end_of_a_rank_fails_the_engine_and_ends_the_others(waits_for, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CountingEngine()
    engine.ranks = [get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True) for _ in range(2)]
    monkeypatch.setattr(compat, "shut_down", lambda engine: None)
    monkeypatch.setattr(compat, "rank_processes", lambda engine: engine.ranks)
    for rank in engine.ranks:
        rank.start()
    thread = EngineThread(lambda: engine, 7, "test")
    thread.ready.result(60)
    said = rf"rank 1 of 2 \(process {engine.ranks[1].pid}\) ended with exit code -9"
    if waits_for == "a step":
        engine.gate.clear()
        request = thread.submit("a", [1], 5).result(60)
    engine.ranks[1].kill()
    engine.ranks[0].join(60)
    assert engine.ranks[0].exitcode == -9, "the others would wait for it"
    if waits_for == "a step":
        engine.broken = True  # vLLM's step raises once no rank is left
        engine.gate.set()
        with pytest.raises(RankDied, match=said):
            request.output.result(60)
    with pytest.raises(RankDied, match=said):
        ask_until_refused(thread)
    assert isinstance(thread.failure, RankDied)
    assert thread.stop(60)
