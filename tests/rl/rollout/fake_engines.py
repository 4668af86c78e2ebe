"""Engines that only keep time: what a generation service drives in fast tests, with deaths on demand.

Every process of every index writes down what it generated and under which weights; rules that real engines enforce
(an update needs a drained engine, sample ids are unique) are enforced here too.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.fleet import EngineDied
from rl.types import Prompt, Sample


@dataclass
class Process:
    """One incarnation of an engine.

    Attributes:
        versions: every version that it had, in order.
        running: by prompt uid, what fails when it dies.
    """

    index: int
    speed: float
    versions: list[int] = field(default_factory=list)
    alive: bool = True
    up: bool = False
    running: dict[str, tuple[Future[Any], Prompt, tuple[str, ...], int]] = field(default_factory=dict)
    other: set[Future[Any]] = field(default_factory=set)


class FakeEngines:
    """See the module's docstring.

    Args:
        directory: for a model path that passes for one.
        engines: how many are up at first.
        group_s: seconds that a group takes, by prompt uid.
        speeds: of the engines, by index; 1 where none is given.
        start_s, update_s: seconds that these take.
    """

    def __init__(
        self,
        directory: Path,
        engines: int,
        group_s: Callable[[str], float],
        speeds: Sequence[float] = (),
        start_s: float = 0.003,
        update_s: float = 0.002,
        **limits: Any,
    ) -> None:
        (directory / "config.json").write_text("{}")
        self.config = EngineConfig(str(directory), **({"max_num_seqs": 4, "stop_timeout_s": 5.0} | limits))
        self.version = self.config.initial_version
        self.group_s, self.speeds, self.start_s, self.update_s = group_s, speeds, start_s, update_s
        self.processes: dict[int, Process] = {}
        self.all_processes: list[Process] = []
        self.sent: list[tuple[int, str]] = []
        self.kills_before_up = 0
        self.update_error: Callable[[int, int], BaseException | None] = lambda index, version: None
        self.generate_error: Callable[[str], BaseException | None] = lambda uid: None
        self._lock = threading.RLock()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        for index in range(engines):
            self._make(index).up = True
            self.processes[index].versions.append(self.config.initial_version)
        threading.Thread(target=self._main, daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def kill(self, index: int) -> bool:
        """As SIGKILL; whether there was a process."""
        with self._lock:
            process = self.processes.get(index)
            if process is None or not process.alive:
                return False
            process.alive = False
            futures = [entry[0] for entry in process.running.values()] + list(process.other)
            process.running.clear()
            process.other.clear()
        for future in futures:
            _fail(future, self._died(index))
        return True

    # ------------------------------------------------------------------ fleet.Engines

    def indices(self) -> list[int]:
        return list(self.processes)

    def start_engine(self, index: int) -> Future[Any]:
        with self._lock:
            process = self._make(index)

        def up() -> None:
            process.up = True
            process.versions.append(self.config.initial_version)

        future = self._other(process, self.start_s, up)
        if self.kills_before_up > 0:
            self.kills_before_up -= 1
            self.kill(index)
        return future

    def generate_on(
        self, index: int, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            process = self.processes[index]
            self.sent.append((index, prompt.uid))
            if not process.alive:
                _fail(future, self._died(index))
                return future
            assert process.up, "groups only for engines that are up"
            assert prompt.uid not in process.running, "sample ids must be unique among running ones"
            start = process.versions[-1]
            process.running[prompt.uid] = (future, prompt, tuple(sample_ids), start)
            self._at(
                self.group_s(prompt.uid) / process.speed, lambda: self._finish(process, prompt.uid, "stop", future)
            )
        return future

    def update_on(self, index: int, version: int, chunks: Any, manifest: Any, in_flight: str) -> Future[float]:
        process = self.processes[index]
        error = self.update_error(index, version)

        def update() -> None:
            if process.running and in_flight == "refuse":
                raise RuntimeError(f"{len(process.running)} requests are running")
            if error is not None:
                raise error
            process.versions.append(version)

        return self._other(process, self.update_s, update)

    def abort_on(self, index: int, sample_ids: Sequence[str]) -> Future[int]:
        process = self.processes[index]
        uids = {sample_id.rsplit("/", 1)[0] for sample_id in sample_ids}

        def abort() -> None:
            for uid in uids & set(process.running):
                self._finish(process, uid, "abort", process.running[uid][0])

        return self._other(process, 0.0005, abort)

    def stop_engine(self, index: int) -> Future[Any]:
        return self._other(self.processes[index], 0.001, lambda: None)

    def kill_engine(self, index: int) -> None:
        self.kill(index)
        self.processes.pop(index, None)

    # ------------------------------------------------------------------ time

    def _make(self, index: int) -> Process:
        speed = self.speeds[index] if index < len(self.speeds) else 1.0
        process = self.processes[index] = Process(index, speed)
        self.all_processes.append(process)
        return process

    def _died(self, index: int) -> EngineDied:
        return EngineDied(f"engine {index} died")

    def _other(self, process: Process, seconds: float, action: Callable[[], None]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if not process.alive:
                _fail(future, self._died(process.index))
                return future
            process.other.add(future)

        def act() -> None:
            if future not in process.other:
                return
            process.other.discard(future)
            try:
                action()
            except BaseException as error:
                _fail(future, error)
            else:
                future.set_result(seconds)

        self._at(seconds, act)
        return future

    def _finish(self, process: Process, uid: str, reason: str, expected: Future[Any]) -> None:
        if uid not in process.running or process.running[uid][0] is not expected:
            return  # it was aborted, or the process died
        future, prompt, sample_ids, start = process.running.pop(uid)
        error = self.generate_error(uid)
        if error is not None:
            _fail(future, error)
            return
        spans = [(0, start)] if process.versions[-1] == start else [(0, start), (1, process.versions[-1])]
        samples = [
            Sample(i, prompt, np.zeros(4, np.int32), np.zeros(4, np.float32), tuple(spans), reason, None, None)
            for i in sample_ids
        ]
        future.set_result(samples)

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))
            self._changed.notify()

    def _main(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                action = heapq.heappop(self._due)[2]
                action()


class TokenEngines(FakeEngines):
    """Engines whose samples grow token by token, and can be broken off and continued.

    Args:
        directory, engines: as for :class:`FakeEngines`.
        length: response tokens of a sample, by its id.
        token_s: seconds of a token.
    """

    def __init__(
        self, directory: Path, engines: int, length: Callable[[str], int], token_s: float = 0.001, **settings: Any
    ) -> None:
        self.length, self.token_s = length, token_s
        self.work: dict[tuple[int, str], tuple[float, dict[str, Sample | None]]] = {}
        self.continued: list[tuple[int, str, int]] = []
        super().__init__(directory, engines, lambda uid: 0.0, **settings)

    def generate_on(
        self, index: int, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> Future[Any]:
        return self._begin(index, prompt, dict.fromkeys(sample_ids))

    def continue_on(self, index: int, samples: Sequence[Sample], sampling: Sampling, seed: int) -> Future[Any]:
        assert all(sample.finish_reason == "abort" for sample in samples)
        self.continued += [(index, sample.sample_id, len(sample.response_tokens)) for sample in samples]
        return self._begin(index, samples[0].prompt, {sample.sample_id: sample for sample in samples})

    def unfinished_on(self, index: int, sample_ids: Sequence[str]) -> Future[dict[str, int]]:
        future: Future[dict[str, int]] = Future()
        asked = self._other(self.processes[index], 0.0005, lambda: None)

        def answer(done: Future[Any]) -> None:
            if done.exception() is not None:
                _fail(future, done.exception())
                return
            samples = {s.sample_id: s for s in self._grown(index)}
            ended = {name for name, s in samples.items() if s.finish_reason == "stop"}
            lengths = {name: len(s.response_tokens) for name, s in samples.items()}
            future.set_result({name: lengths.get(name, 0) for name in sample_ids if name not in ended})

        asked.add_done_callback(answer)
        return future

    def finished_on(self, index: int, sample_ids: Sequence[str]) -> Future[list[Sample]]:
        future: Future[list[Sample]] = Future()
        with self._lock:
            if not self.processes[index].alive:
                _fail(future, self._died(index))
            else:
                future.set_result(
                    [s for s in self._grown(index) if s.finish_reason == "stop" and s.sample_id in sample_ids]
                )
        return future

    def _begin(self, index: int, prompt: Prompt, parts: dict[str, Sample | None]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            process = self.processes[index]
            self.sent.append((index, prompt.uid))
            if not process.alive:
                _fail(future, self._died(index))
                return future
            assert process.up, "groups only for engines that are up"
            assert prompt.uid not in process.running, "sample ids must be unique among running ones"
            process.running[prompt.uid] = (future, prompt, tuple(parts), process.versions[-1])
            self.work[id(process), prompt.uid] = (time.monotonic(), parts)
            left = max(self.length(name) - _tokens(part) for name, part in parts.items())
            self._at(left * self.token_s / process.speed, lambda: self._finish(process, prompt.uid, "stop", future))
        return future

    def _grown(self, index: int) -> list[Sample]:
        """Every sample of an engine as it is now."""
        process = self.processes[index]
        with self._lock:
            return [sample for uid in process.running for sample in self._group(process, uid)]

    def _group(self, process: Process, uid: str) -> list[Sample]:
        _, prompt, _, version = process.running[uid]
        start, parts = self.work[id(process), uid]
        made = int((time.monotonic() - start) * process.speed / self.token_s)
        return [self._sample(prompt, name, part, made, version) for name, part in parts.items()]

    def _sample(self, prompt: Prompt, name: str, part: Sample | None, made: int, version: int) -> Sample:
        before = _tokens(part)
        total = min(self.length(name), before + made)
        tokens = np.concatenate([part.response_tokens if part else np.zeros(0, np.int32), greedy(name)[before:total]])
        spans = list(part.weight_versions) if part and before else [(0, version)]
        if spans[-1][1] != version:
            spans.append((before, version))
        reason = "stop" if total == self.length(name) else "abort"
        return Sample(name, prompt, tokens, -tokens / 1e4, tuple(spans), reason, None, None)

    def _finish(self, process: Process, uid: str, reason: str, expected: Future[Any]) -> None:
        if uid not in process.running or process.running[uid][0] is not expected:
            return
        samples = self._group(process, uid)
        del process.running[uid]
        expected.set_result(samples)


def greedy(name: str, most: int = 1000) -> np.ndarray:
    """int32 ``[most]``: the tokens of a sample, whichever engine generates them."""
    return np.random.default_rng(list(name.encode())).integers(0, 10_000, most).astype(np.int32)


def _tokens(part: Sample | None) -> int:
    return 0 if part is None else len(part.response_tokens)


def _fail(future: Future[Any], error: BaseException) -> None:
    future.set_exception(error)
