"""Whole steps: engines generate sets of groups, a trainer consumes them, weights go back. Discrete events.

One loop; the modes are settings of it:

| mode | a set starts once | the trainer takes | between steps |
|---|---|---|---|
| ``sync`` | the weights of the step before are there | the whole set | train, transfer |
| ``streaming`` | the same | chunks of at least ``chunk_groups`` groups, as they arrive | train the rest, transfer |
| ``async`` | step minus weight version is at most ``staleness`` | chunks, as they arrive | transfer beside both |
| ``colocated`` | as ``sync`` | the whole set, after the GPUs have changed hands | and again after |

Sets are strict: step ``s`` trains exactly the groups of batch ``s``, and steps its optimizer once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rl.simulation.generation import Generation, SimGroup

Mode = Literal["sync", "streaming", "async", "colocated"]


@dataclass(frozen=True)
class TrainCost:
    """Measured time of training, in seconds.

    Attributes:
        fixed_seconds: of each chunk, whatever is in it.
        seconds_per_token: of prompt and response tokens.
        apply_seconds: of the optimizer step, once a set.
    """

    fixed_seconds: float
    seconds_per_token: float
    apply_seconds: float = 0.0

    def chunk(self, groups: Sequence[SimGroup]) -> float:
        return self.fixed_seconds + self.seconds_per_token * sum(group.tokens for group in groups)


@dataclass(frozen=True)
class LoopSettings:
    """How the two sides work together.

    Attributes:
        mode: see the module.
        chunk_groups: fewest groups of a chunk (the last may be smaller); ``sync`` and ``colocated`` take whole sets.
        staleness: most steps that a set's weights may lag when it starts; ``async`` only.
        transfer_seconds: from the optimizer step until the weights are at the engines.
        update_seconds: an engine stands still that long to take them up.
        in_flight: ``"continue"``: engines take weights up at once; ``"finish"``: once they have finished what they
            hold, and get no groups until then.
        switch_seconds: until the GPUs have changed hands, each way; ``colocated`` only.
    """

    mode: Mode
    chunk_groups: int = 1
    staleness: int = 0
    transfer_seconds: float = 0.0
    update_seconds: float = 0.0
    in_flight: Literal["finish", "continue"] = "continue"
    switch_seconds: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in ("sync", "streaming", "async", "colocated"):
            problems.append(f"mode must be sync, streaming, async or colocated, got {self.mode!r}")
        if self.mode != "async" and self.staleness:
            problems.append(f"staleness is for async, {self.mode} has 0; got {self.staleness}")
        if self.staleness < 0 or self.chunk_groups < 1:
            problems.append(f"expected staleness >= 0 and chunk_groups >= 1, got {self.staleness}, {self.chunk_groups}")
        if self.in_flight not in ("finish", "continue"):
            problems.append(f'in_flight must be "finish" or "continue", got {self.in_flight!r}')
        if min(self.transfer_seconds, self.update_seconds, self.switch_seconds) < 0:
            problems.append("times must be >= 0 seconds")
        if problems:
            raise ValueError("simulated loop: " + "; ".join(problems))


@dataclass(frozen=True)
class LoopResult:
    """What came out, in seconds from the start.

    Attributes:
        ended: end of every step: with weights at the engines, or with the optimizer step when staleness is allowed.
        trained: order numbers of the groups of every step, as they arrived.
        engine_idle, trainer_idle: share of the makespan without work, engines on average.
        most_stale: largest difference between a step and the weight version that its set started with.
    """

    ended: tuple[float, ...]
    trained: tuple[tuple[int, ...], ...]
    engine_idle: float
    trainer_idle: float
    most_stale: int

    @property
    def makespan(self) -> float:
        return self.ended[-1]

    @property
    def step_seconds(self) -> tuple[float, ...]:
        return tuple(end - begin for begin, end in zip((0.0, *self.ended), self.ended, strict=False))

    def mean_step_seconds(self, skip: int = 0) -> float:
        """Mean over all steps but the first ``skip``, in which an asynchronous loop fills."""
        return statistics.fmean(self.step_seconds[skip:])


def simulate(
    batches: Sequence[Sequence[SimGroup]], generation: Generation, train: TrainCost, settings: LoopSettings
) -> LoopResult:
    """Run one step per batch.

    Args:
        batches: groups of every step; ``group.batch`` is its index, ``group.order`` unique in all.
        generation: engines, nothing submitted.

    Raises:
        RuntimeError: nothing happens any more and steps are left (engines that accept nothing).
    """
    return _Loop(batches, generation, train, settings).run()


class _Loop:
    def __init__(
        self, batches: Sequence[Sequence[SimGroup]], generation: Generation, train: TrainCost, settings: LoopSettings
    ) -> None:
        self.batches, self.generation, self.train, self.settings = batches, generation, train, settings
        self.now = 0.0
        self.submitted = 0
        self.version = 0
        self.step = 0
        self.arrived: list[list[SimGroup]] = [[] for _ in batches]
        self.trained: list[list[int]] = [[] for _ in batches]
        self.trainer_until = math.inf  # end of the chunk in work; inf: idle
        self.trainer_busy = 0.0
        self.transfers: list[tuple[float, int]] = []  # (end, version), in order
        self.draining: set[int] = set()
        self.ended: list[float] = []
        self.most_stale = 0

    def run(self) -> LoopResult:
        while len(self.ended) < len(self.batches):
            self._start_sets()
            self._start_training()
            times = [self.generation.next_event(), self.trainer_until]
            times += [self.transfers[0][0]] if self.transfers else []
            self.now = min(times)
            if self.now == math.inf:
                raise RuntimeError(f"nothing happens any more in step {self.step} of {len(self.batches)}")
            for _, group in self.generation.run_until(self.now):
                self.arrived[group.batch].append(group)
            self._take_up_weights()
            if self.trainer_until <= self.now:
                self._chunk_done()
            if self.transfers and self.transfers[0][0] <= self.now:
                self._transferred(*self.transfers.pop(0))
        makespan = self.ended[-1]
        busy = statistics.fmean(self.generation.busy_seconds)
        return LoopResult(
            tuple(self.ended),
            tuple(tuple(orders) for orders in self.trained),
            1 - busy / makespan,
            1 - self.trainer_busy / makespan,
            self.most_stale,
        )

    def _start_sets(self) -> None:
        while self.submitted < len(self.batches) and self.submitted - self.version <= self.settings.staleness:
            self.most_stale = max(self.most_stale, self.submitted - self.version)
            self.generation.submit(self.batches[self.submitted])
            self.submitted += 1

    def _start_training(self) -> None:
        if self.step >= len(self.batches) or self.trainer_until < math.inf:
            return
        here, whole = self.arrived[self.step], len(self.batches[self.step])
        complete = len(self.trained[self.step]) + len(here) == whole
        streams = self.settings.mode in ("streaming", "async")
        if not (complete or (streams and len(here) >= self.settings.chunk_groups)):
            return
        seconds = self.train.chunk(here) + (self.train.apply_seconds if complete else 0.0)
        self.trainer_busy += seconds
        self.trainer_until = self.now + seconds
        if self.settings.mode == "colocated":
            self.trainer_until += self.settings.switch_seconds
        self.trained[self.step] += [group.order for group in here]
        self.arrived[self.step] = []

    def _chunk_done(self) -> None:
        self.trainer_until = math.inf
        if len(self.trained[self.step]) < len(self.batches[self.step]):
            return
        self.step += 1
        if self.settings.staleness:
            self.ended.append(self.now)
        seconds = self.settings.transfer_seconds
        if self.settings.mode == "colocated":
            seconds += self.settings.switch_seconds
        begin = self.transfers[-1][0] if self.transfers else self.now
        self.transfers.append((begin + seconds, self.step))

    def _transferred(self, end: float, version: int) -> None:
        self.version = version
        if not self.settings.staleness:
            self.ended.append(end + self.settings.update_seconds)
        for engine in range(len(self.generation.engines)):
            if self.settings.in_flight == "finish" and self.generation.holds(engine):
                self.draining.add(engine)
                self.generation.accept(engine, False)
            else:
                self.generation.stall(engine, self.settings.update_seconds)

    def _take_up_weights(self) -> None:
        for engine in sorted(self.draining):
            if not self.generation.holds(engine):
                self.draining.discard(engine)
                self.generation.stall(engine, self.settings.update_seconds)
                self.generation.accept(engine, True)
