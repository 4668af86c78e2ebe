"""Engines that generate groups of samples, by discrete events.

An engine runs up to ``seats`` samples at a time (continuous batching: one that ends makes room for the next in its
queue at once). With ``r`` running, a step takes ``profile(r)`` seconds and gives each of them a token. Between
admissions and completions ``r`` is constant, so all running samples advance at the same rate: an engine keeps how far
it has come (tokens since its start), and a sample ends when the engine has come as far as where it was admitted plus
its length. A completion costs O(log seats), whatever the lengths are.

Not in the model: samples that are preempted for lack of cache, and a context's own cost (a step is as long whatever
the samples' lengths).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rl.rollout.dispatch import Dispatch, EngineState, WaitingGroup

_EPSILON = 1e-6  # tokens; lengths are whole, so what is closer than this to its end has ended


@dataclass(frozen=True)
class SimGroup:
    """All samples of a prompt, with what they will turn out to be.

    Attributes:
        uid, order, predicted_tokens: as in :class:`rl.rollout.dispatch.WaitingGroup`.
        batch: the step that trains it.
        prompt_tokens: read once per group (the samples share them).
        lengths: response tokens of every sample.
    """

    uid: str
    order: int
    batch: int
    prompt_tokens: int
    lengths: tuple[int, ...]
    predicted_tokens: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all samples: what training computes."""
        return sum(self.lengths) + len(self.lengths) * self.prompt_tokens

    @cached_property
    def waiting(self) -> WaitingGroup:
        """What the dispatch policy sees."""
        return WaitingGroup(self.uid, self.order, len(self.lengths), self.predicted_tokens, self.batch)


class _Engine:
    """One engine; ``now`` is the time that its state is true at."""

    def __init__(self, index: int, table: Sequence[float], prefill: float, seats: int) -> None:
        self.index, self.table, self.prefill, self.seats = index, table, prefill, seats
        self.now = 0.0
        self.stalled_until = 0.0
        self.progress = 0.0
        self.running: list[tuple[float, int, SimGroup, int]] = []  # heap by the progress at which they end; length
        self.queue: deque[tuple[SimGroup, int, bool]] = deque()
        self.held = 0
        self.left: dict[int, int] = {}  # by order: samples that are not done
        self.busy = 0.0

    def advance(self, time: float) -> None:
        """Progress until ``time``; nothing may end before."""
        if self.running:
            begin = max(self.now, self.stalled_until)
            if time > begin:
                self.progress += (time - begin) / self.table[len(self.running)]
            self.busy += time - self.now
        self.now = time

    def next_end(self) -> float:
        """When the next sample ends; inf when none runs."""
        if not self.running:
            return math.inf
        left = max(0.0, self.running[0][0] - self.progress)
        return max(self.now, self.stalled_until) + left * self.table[len(self.running)]

    def finish(self) -> list[SimGroup]:
        """Take out what has ended; returns the groups that are now complete."""
        complete = []
        while self.running and self.running[0][0] <= self.progress + _EPSILON:
            _, _, group, _ = heapq.heappop(self.running)
            self.left[group.order] -= 1
            if not self.left[group.order]:
                del self.left[group.order]
                self.held -= len(group.lengths)
                complete.append(group)
        return complete

    def take(self, group: SimGroup) -> None:
        self.left[group.order] = len(group.lengths)
        self.held += len(group.lengths)
        for i, length in enumerate(group.lengths):
            self.queue.append((group, length, i == 0))

    def admit(self) -> None:
        """Fill the seats from the queue; the step that reads prompts is longer."""
        read = 0
        while self.queue and len(self.running) < self.seats:
            group, length, first = self.queue.popleft()
            heapq.heappush(self.running, (self.progress + length, group.order, group, length))
            read += group.prompt_tokens if first else 0
        if read:
            self.stalled_until = max(self.now, self.stalled_until) + read * self.prefill

    def drop(self) -> list[SimGroup]:
        """Forget everything (the engine died); returns the groups that it held."""
        orders = set(self.left)
        groups = {group.order: group for _, _, group, _ in self.running} | {
            group.order: group for group, _, _ in self.queue
        }
        self.running.clear()
        self.queue.clear()
        self.left.clear()
        self.held = 0
        return [groups[order] for order in sorted(orders)]


class Generation:
    """Engines, the groups that wait for them, and a clock.

    Args:
        step_seconds: seconds of a step by running samples, of an engine of speed 1 (a ``LatencyProfile``).
        engines: how many.
        seats: samples that each runs at a time.
        dispatch: policy; asked anew when groups are submitted and when engines have got room.
        speeds: of the engines, default 1 each; measured speeds are what the policy sees.
        prefill_seconds_per_token: see :class:`rl.rollout.latency.LatencyProfile`.
        group_seconds: a complete group arrives that much later.
        ask_every: groups that must have completed before the policy is asked again, unless an engine holds nothing; 1
            is exact, more is faster for hundreds of engines.
    """

    def __init__(
        self,
        step_seconds: Callable[[int], float],
        engines: int,
        seats: int,
        dispatch: Dispatch,
        speeds: Sequence[float] | None = None,
        prefill_seconds_per_token: float = 0.0,
        group_seconds: float = 0.0,
        ask_every: int = 1,
    ) -> None:
        if engines < 1 or seats < 1:
            raise ValueError(f"expected at least one engine and one seat, got {engines} and {seats}")
        self.speeds = tuple(speeds) if speeds is not None else (1.0,) * engines
        if len(self.speeds) != engines or min(self.speeds) <= 0:
            raise ValueError(f"expected {engines} speeds > 0, got {self.speeds}")
        base = np.array([0.0] + [step_seconds(running) for running in range(1, seats + 1)])
        tables = {speed: (base / speed).tolist() for speed in set(self.speeds)}
        self.engines = [
            _Engine(i, tables[speed], prefill_seconds_per_token / speed, seats) for i, speed in enumerate(self.speeds)
        ]
        self.dispatch = dispatch
        self.group_seconds = group_seconds
        self.ask_every = ask_every
        self.accepting = [True] * engines
        self.now = 0.0
        self.placed: dict[int, int] = {}  # by order: engine
        self._waiting: dict[int, SimGroup] = {}
        self._stamps = [0] * engines
        self._events: list[tuple[float, int, int]] = []  # (time, engine, stamp)
        self._arrivals: list[tuple[float, int, SimGroup]] = []
        self._completed_since = 0
        self._states = [self._state(engine) for engine in self.engines]

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is on its way."""
        return not (self._waiting or self._arrivals or any(engine.held for engine in self.engines))

    @property
    def busy_seconds(self) -> list[float]:
        """Seconds in which each engine had samples running, until now."""
        return [engine.busy + (self.now - engine.now if engine.running else 0.0) for engine in self.engines]

    @property
    def waiting(self) -> int:
        """Samples that no engine has yet."""
        return sum(len(group.lengths) for group in self._waiting.values())

    @property
    def unfinished(self) -> int:
        """Samples that wait, are queued or run."""
        return self.waiting + sum(len(engine.running) + len(engine.queue) for engine in self.engines)

    def holds(self, engine: int) -> int:
        return self.engines[engine].held

    def submit(self, groups: Sequence[SimGroup]) -> None:
        """Groups to generate, from now on."""
        self._waiting.update({group.order: group for group in groups})
        self._hand_out()

    def accept(self, engine: int, whether: bool) -> None:
        """Whether an engine may get groups."""
        if self.accepting[engine] != whether:
            self.accepting[engine] = whether
            self._states[engine] = self._state(self.engines[engine])
            if whether:
                self._hand_out()

    def stall(self, engine: int, seconds: float) -> None:
        """The engine stands still that long from now, e.g. for new weights."""
        one = self.engines[engine]
        one.advance(self.now)
        one.stalled_until = max(one.stalled_until, self.now) + seconds
        self._schedule(one)

    def kill(self, engine: int) -> list[SimGroup]:
        """The engine dies and is there again, empty; what it held waits again. Returns those groups."""
        one = self.engines[engine]
        one.advance(self.now)
        held = one.drop()
        for group in held:
            del self.placed[group.order]
        self._schedule(one)
        self._states[engine] = self._state(one)
        self.submit(held)
        return held

    def next_event(self) -> float:
        """When something happens next; inf when nothing will."""
        while self._events and self._events[0][2] != self._stamps[self._events[0][1]]:
            heapq.heappop(self._events)
        return min(
            self._events[0][0] if self._events else math.inf, self._arrivals[0][0] if self._arrivals else math.inf
        )

    def run_until(self, time: float) -> list[tuple[float, SimGroup]]:
        """Move the clock to ``time``; returns ``(time, group)`` of those that arrived, in order."""
        arrived = []
        while (event := self.next_event()) <= time and event < math.inf:
            self.now = max(self.now, event)
            if self._arrivals and self._arrivals[0][0] <= event:
                when, _, group = heapq.heappop(self._arrivals)
                arrived.append((when, group))
                continue
            self._one_engine(heapq.heappop(self._events)[1])
        if time < math.inf:
            self.now = max(self.now, time)
        return arrived

    def run(self) -> list[tuple[float, SimGroup]]:
        """Until everything submitted has arrived."""
        arrived = self.run_until(math.inf)
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} groups wait and no engine will take them: none accepts")
        return arrived

    def _one_engine(self, index: int) -> None:
        engine = self.engines[index]
        engine.advance(self.now)
        complete = engine.finish()
        engine.admit()
        self._schedule(engine)
        for group in complete:
            heapq.heappush(self._arrivals, (self.now + self.group_seconds, group.order, group))
        if complete:
            self._states[index] = self._state(engine)
            self._completed_since += len(complete)
            if self._waiting and (self._completed_since >= self.ask_every or not engine.held):
                self._hand_out()

    def _schedule(self, engine: _Engine) -> None:
        self._stamps[engine.index] += 1
        end = engine.next_end()
        if end < math.inf:
            heapq.heappush(self._events, (end, engine.index, self._stamps[engine.index]))

    def _state(self, engine: _Engine) -> EngineState:
        return EngineState(
            engine.index, engine.seats, engine.held, self.speeds[engine.index], self.accepting[engine.index]
        )

    def _hand_out(self) -> None:
        self._completed_since = 0
        if not self._waiting:
            return
        groups = list(self._waiting.values())
        assigned = self.dispatch.assign([group.waiting for group in groups], self._states)
        touched: dict[int, _Engine] = {}
        for position, index in assigned:
            group = groups[position]
            del self._waiting[group.order]  # a KeyError here: the policy sent a group twice
            self.engines[index].take(group)
            self.placed[group.order] = index
            touched[index] = self.engines[index]
        for index, engine in touched.items():
            engine.advance(self.now)
            engine.admit()
            self._schedule(engine)
            self._states[index] = self._state(engine)


def lower_bound(
    step_seconds: Callable[[int], float],
    groups: Sequence[SimGroup],
    seats: int,
    speeds: Sequence[float],
) -> float:
    """Seconds that no schedule of these groups on these engines can beat: the larger of two.

    - The longest sample alone on the fastest engine: ``max length * PTL(1) / max speed``; company only slows it, since
      a profile never falls.
    - All tokens at the best throughput: with ``r`` running, an engine makes ``r / PTL(r)`` tokens a second, at most
      ``max_r r / PTL(r)`` whatever runs, so all of them together ``tokens / sum_i(speed_i * max_r r / PTL(r))``.

    Reading prompts, transfers and stalls are left out, which makes it lower still.
    """
    longest = max(max(group.lengths) for group in groups)
    tokens = sum(sum(group.lengths) for group in groups)
    best = max(running / step_seconds(running) for running in range(1, seats + 1))
    return max(longest * step_seconds(1) / max(speeds), tokens / (best * sum(speeds)))
