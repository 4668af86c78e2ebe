"""A fused schedule for a problem: first short, then small at that makespan.

1. Rules (:mod:`megatron_ultraep.pipeline.greedy`) by the hundred; the best are annealed towards the lower bound.
2. At the makespan reached: a target below the peak, rules drawn under it, the best annealed until makespan and target
   both hold; on success the next target, lower. The first target is what the models hold one after the other anyway.

Rounds are seeded one by one, so the same number of rounds gives the same schedule; a time limit only says after which
round to stop, or cuts one short. Every improvement is checked by :func:`megatron_ultraep.pipeline.simulate.simulate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_ultraep.pipeline import search
from megatron_ultraep.pipeline.baselines import one_at_a_time, serial_peak_memory
from megatron_ultraep.pipeline.bound import lower_bound, memory_bound
from megatron_ultraep.pipeline.greedy import RULES, Drawer, apply, caps, plain
from megatron_ultraep.pipeline.problem import InvalidSchedule, Problem, Schedule
from megatron_ultraep.pipeline.simulate import Timeline, simulate
from megatron_ultraep.pipeline.tables import Tables

DRAWS = 4_000_000  # operations placed by rules in a round
MOVES = 200_000_000  # operations simulated by annealing in a round
MOST_DRAWS, MOST_MOVES = 1000, 500_000
CHUNKS = 8  # of a round's annealing; the clock is looked at between them
COLD = 0.01  # last temperature, in mean durations
SHARES = (0.25, 0.15, 0.08, 0.04, 0.02)  # by which the peak is to fall next
_SLACK = 1e-9


@dataclass(frozen=True)
class Solution:
    """What a search found.

    Attributes:
        timeline: of ``schedule``.
        bound: no schedule is shorter.
        memory_bound: no schedule of this makespan holds less on its fullest node.
        seconds, memory_seconds: by the clock given, until the makespan and the peak were first reached.
        rounds, memory_rounds: begun.
        interrupted: ``stop``, Ctrl-C or a time limit ended it before it was done.
    """

    schedule: Schedule
    timeline: Timeline
    bound: float
    memory_bound: float
    seconds: float
    memory_seconds: float
    rounds: int
    memory_rounds: int
    interrupted: bool

    @property
    def makespan(self) -> float:
        return self.timeline.makespan

    @property
    def peak_memory(self) -> float:
        """Of the fullest node."""
        return max(self.timeline.peak_memory)


class _Stopped(Exception):
    """The search's time is over."""


@dataclass
class _Limit:
    """When a phase has to stop."""

    seconds: float
    rounds: int | None
    stop: Callable[[], bool] | None
    clock: Callable[[], float]
    begun: float = field(init=False)
    done: int = 0
    improved: float = 0.0

    def __post_init__(self) -> None:
        self.begun = self.clock()

    @property
    def elapsed(self) -> float:
        return self.clock() - self.begun

    def check(self) -> None:
        if self.elapsed > self.seconds or (self.stop is not None and self.stop()):
            raise _Stopped

    def next_round(self) -> int:
        self.check()
        if self.rounds is not None and self.done >= self.rounds:
            raise _Stopped
        self.done += 1
        return self.done


def solve(
    problem: Problem,
    seed: int = 0,
    seconds: float = 10.0,
    memory_seconds: float = 20.0,
    *,
    rounds: int | None = None,
    memory_rounds: int | None = None,
    makespan_goal: float | None = None,
    memory_goal: float | None = None,
    stop: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Search for the shortest schedule, then for the least memory at that makespan.

    Args:
        seconds, memory_seconds: limits of the two phases, by ``clock``.
        rounds, memory_rounds: limits of the two phases that do not depend on a machine's speed.
        makespan_goal: makespan from which on shorter ones are not looked for, and which is kept while memory falls;
            by default the lower bound. Memory falls further where it is higher.
        memory_goal: peak of the fullest node from which on lower ones are not looked for; by default what the models
            hold one after the other (:func:`serial_peak_memory`), where fusing costs no memory.
        stop: asked every few tenths of a second; True ends the search with the best so far, as Ctrl-C does.
        clock: seconds; ``time.process_time`` on a machine that others use too.
    """
    bound = lower_bound(problem)
    found = _Search(problem, seed, bound if makespan_goal is None else max(bound, makespan_goal))
    goal = serial_peak_memory(problem) if memory_goal is None else memory_goal
    interrupted = False
    first = _Limit(seconds, rounds, stop, clock)
    try:
        found.shorten(first)
    except (_Stopped, KeyboardInterrupt):
        interrupted = True
    second = _Limit(memory_seconds, memory_rounds, stop, clock)
    try:
        found.lower(goal, second)
    except (_Stopped, KeyboardInterrupt):
        interrupted = True
    timeline = found.timeline
    return Solution(
        found.tables.schedule(found.best),
        timeline,
        bound,
        memory_bound(problem, timeline.makespan),
        first.improved,
        second.improved,
        first.done,
        second.done,
        interrupted,
    )


class _Search:
    """The best schedule so far, and how to get to better ones."""

    def __init__(self, problem: Problem, seed: int, goal: float) -> None:
        """``goal``: as short as is wanted."""
        self.problem, self.seed, self.goal = problem, seed, goal
        self.tables = Tables.of(problem)
        self.drawer = Drawer(self.tables)
        operations = max(1, len(self.tables.node))
        self.draws = min(MOST_DRAWS, max(8, DRAWS // operations))
        self.moves = min(MOST_MOVES, max(CHUNKS, MOVES // operations))
        mean = float(self.tables.duration.mean())
        largest = float(self.tables.room.max())
        self.per_time = 1 / mean if mean > 0 else 1.0
        self.per_activation = 1 / largest if largest > 0 else 1.0
        # One micro-batch of one model at a time fits wherever the problem is possible at all.
        self.best = self.tables.sequence(one_at_a_time(problem))
        self.timeline = simulate(one_at_a_time(problem))

    @property
    def peak(self) -> float:
        return max(self.timeline.peak_memory)

    @property
    def short_enough(self) -> bool:
        return self.timeline.makespan <= self.goal * (1 + _SLACK)

    def shorten(self, limit: _Limit) -> None:
        """Phase 1: down to the goal."""
        state = np.ones(1, dtype=np.uint64)
        for rule in RULES:
            makespan, sequence = apply(self.tables, plain(self.tables, rule), state)
            if makespan >= 0:
                self._take(sequence, limit)
        usual = serial_peak_memory(self.problem)
        while not self.short_enough:
            rng, state = self._round(1, limit.next_round())
            # Rules with limits in flight are often the shorter ones, too.
            started = self._draw(rng, state, usual, 3 * usual, limit)
            if started is None or rng.random() < 0.5:
                started = self.best
            if not self.short_enough:
                self._anneal(started.copy(), caps(self.problem), rng, state, limit)

    def lower(self, goal: float, limit: _Limit) -> None:
        """Phase 2: less memory on the fullest node, at the makespan there is or the goal."""
        self.goal = max(self.goal, self.timeline.makespan)
        goal = max(goal, memory_bound(self.problem, self.goal))
        step, target = 0, goal
        while self.peak > goal * (1 + _SLACK):
            rng, state = self._round(2, limit.next_round())
            before = self.peak
            started = self._draw(rng, state, target, target * float(rng.choice((1.0, 1.0, 1.15, 1.3))), limit)
            if started is None or rng.random() < 0.3:
                started = self.best
            if self.peak > target * (1 + _SLACK):
                self._anneal(started.copy(), caps(self.problem, target), rng, state, limit)
            if self.peak >= before:
                step = (step + 1) % len(SHARES)
            target = max(goal, self.peak * (1 - SHARES[step]))

    def _round(self, phase: int, number: int) -> tuple[np.random.Generator, np.ndarray]:
        """Generators of a round: numpy's, and the state of the compiled one."""
        rng = np.random.default_rng([self.seed, phase, number])
        return rng, rng.integers(1, 2**63, size=1, dtype=np.uint64)

    def _draw(
        self, rng: np.random.Generator, state: np.ndarray, low: float, high: float, limit: _Limit
    ) -> np.ndarray | None:
        """The sequence of the shortest of many rules, under caps from ``low`` to ``high``; None when all got stuck.

        Ends with the first that is as short as is wanted and better than the best so far.
        """
        shortest, found, kept = np.inf, None, None
        for _ in range(self.draws):
            limit.check()
            if kept is None or rng.random() < 0.4:
                rule = self.drawer.draw(rng, rng.uniform(low, high))
            else:
                rule = self.drawer.vary(kept, rng)
            makespan, sequence = apply(self.tables, rule, state)
            if 0 <= makespan <= shortest:
                better = makespan < shortest and makespan <= max(self.goal, self.timeline.makespan) * (1 + _SLACK)
                shortest, found, kept = makespan, sequence, rule
                if better and self._take(sequence, limit) and self.short_enough:
                    break
        return found

    def _anneal(
        self,
        sequence: np.ndarray,
        cap: np.ndarray,
        rng: np.random.Generator,
        state: np.ndarray,
        limit: _Limit,
    ) -> None:
        """One cooling from a start, in chunks."""
        hot = float(np.exp(rng.uniform(np.log(0.03), np.log(0.3))))
        weight = self.per_activation * float(np.exp(rng.uniform(np.log(0.03), np.log(0.5))))
        steps = hot * (min(COLD, hot) / hot) ** (np.arange(CHUNKS + 1) / CHUNKS)
        best = np.zeros_like(sequence)
        finite = np.where(np.isfinite(cap), cap, 1e300)
        for hotter, colder in zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True):
            limit.check()
            energy = search.anneal(
                self.tables.arrays(),
                finite,
                self.goal,
                (self.per_time, weight),
                (hotter, colder),
                self.moves // CHUNKS,
                state,
                sequence,
                best,
            )
            self._take(best, limit)
            if energy <= _SLACK:
                return

    def _take(self, sequence: np.ndarray, limit: _Limit) -> bool:
        """Keep a sequence that runs, fits and is better; whether it was."""
        try:
            timeline = simulate(self.tables.schedule(sequence))
        except InvalidSchedule:  # above a cap, which annealing may pass through
            return False
        if self._rank(timeline) >= self._rank(self.timeline):
            return False
        self.best, self.timeline = sequence.copy(), timeline
        limit.improved = limit.elapsed
        return True

    def _rank(self, timeline: Timeline) -> tuple[float, ...]:
        """Lower is better: makespan as far as it matters, peak memory, makespan, sum of peaks, sum of finish times."""
        peaks, finish = timeline.peak_memory, sum(float(end.sum()) for end in timeline.end)
        values = (max(timeline.makespan, self.goal), max(peaks), timeline.makespan, sum(peaks), finish)
        return tuple(float(f"{value:.9g}") for value in values)  # as sums are rounded
