"""Generation and the inference after it, with and without gathering generation's tail. Simulated.

    costs = InferenceCost(seconds_per_token=2e-5, devices_per_block=4, switch_seconds=1.5)
    sweep = simulate_tails(groups, profile, engines=16, seats=64, kv_tokens=400_000, costs=costs, thresholds=[26, 51])
    sweep.best.threshold, sweep.plain.seconds, sweep.bound

Engines and inference share devices, one engine on each. *Plain*: all samples are generated, then every device takes
part in inference. *Gathered* at R_t: when at most R_t samples are unfinished they go to the fewest engines that hold
them (``rl.rollout.tail``), which read what they have of them once more; the freed devices, as far as they make whole
replicas of the models, run inference on finished samples meanwhile; all devices do the rest once generation has ended.

In the model inference is fluid: tokens of all finished samples, spread evenly over the devices that take part.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rl.rollout.dispatch import Dispatch, get_dispatch
from rl.rollout.latency import LatencyProfile
from rl.rollout.tail import Held, TailRule, plan_tail
from rl.simulation.generation import Generation, SimGroup, _Engine, lower_bound


@dataclass(frozen=True)
class InferenceCost:
    """What the passes over generated samples cost (reference, old log-probs, values: all together).

    Attributes:
        seconds_per_token: of one device, for a prompt or response token.
        switch_seconds: until a device has changed hands, from its engine to inference.
        devices_per_block: of one replica of the models; only whole replicas run.
    """

    seconds_per_token: float
    switch_seconds: float = 0.0
    devices_per_block: int = 1

    def __post_init__(self) -> None:
        if not (self.seconds_per_token >= 0 and self.switch_seconds >= 0 and self.devices_per_block >= 1):
            raise ValueError(f"expected costs >= 0 and devices_per_block >= 1, got {self}")

    def useful(self, devices: int) -> int:
        """Of so many devices, those in whole replicas."""
        return devices - devices % self.devices_per_block


@dataclass(frozen=True)
class TailTimes:
    """One threshold; seconds from the start.

    Attributes:
        threshold: R_t in samples; 0: plain.
        began: of the tail; the end of generation when plain.
        generated: end of generation.
        seconds: end of inference.
        kept, moved: engines that generate the tail, and samples that went to them.
        hidden_tokens: whose inference ran before generation had ended.
    """

    threshold: int
    began: float
    generated: float
    seconds: float
    kept: int = 0
    moved: int = 0
    hidden_tokens: float = 0.0


@dataclass(frozen=True)
class TailSweep:
    """What came of every threshold.

    Attributes:
        plain: without gathering.
        gathered: with, by threshold, ascending.
        bound: seconds that neither can beat; see :func:`fused_bound`.
    """

    plain: TailTimes
    gathered: tuple[TailTimes, ...]
    bound: float

    @property
    def best(self) -> TailTimes:
        """The shortest, ties to the smaller threshold."""
        return min((self.plain, *self.gathered), key=lambda times: (times.seconds, times.threshold))

    @cached_property
    def by_threshold(self) -> dict[int, TailTimes]:
        return {times.threshold: times for times in (self.plain, *self.gathered)}


def fused_bound(
    groups: Sequence[SimGroup], profile: LatencyProfile, engines: int, seats: int, costs: InferenceCost
) -> float:
    """Seconds that no order of generation and inference on these devices can beat: the larger of two.

    - The longest sample alone, and then its own inference on all devices.
    - All work, spread evenly: tokens at the best throughput of an engine, and inference.
    """
    alone = lower_bound(profile, groups, seats, [1.0] * engines)
    longest = max(max(group.lengths) + group.prompt_tokens for group in groups)
    response = sum(sum(group.lengths) for group in groups)
    inference = sum(group.tokens for group in groups) * costs.seconds_per_token / engines
    work = response / (profile.best_tokens_per_second(seats) * engines) + inference
    own = max(max(group.lengths) for group in groups) * profile(1) + longest * costs.seconds_per_token / engines
    return max(alone, work, own)


def simulate_tails(
    groups: Sequence[SimGroup],
    profile: LatencyProfile,
    *,
    engines: int,
    seats: int,
    kv_tokens: int,
    costs: InferenceCost,
    thresholds: Sequence[int],
    tail_seats: int | None = None,
    longest: int | None = None,
    dispatch: Dispatch | None = None,
) -> TailSweep:
    """Simulate one batch, plain and with every threshold; generation up to each tail is simulated once.

    Args:
        groups: of the batch.
        profile: of an engine.
        engines: as many as devices.
        seats: of an engine.
        kv_tokens: that an engine's cache holds.
        costs: of inference.
        thresholds: R_t to try, in samples; 0 is plain.
        tail_seats: BS_max; the engine's seats by default.
        longest: L_max, tokens of the longest possible sample; of these samples by default.
        dispatch: of groups; first come, first served by default.
    """
    generation = Generation(
        profile,
        engines,
        seats,
        dispatch or get_dispatch("fcfs"),
        prefill_seconds_per_token=profile.prefill_seconds_per_token,
        ask_every=max(1, engines // 8),
    )
    table = _Table(profile.table(seats).tolist(), profile.prefill_seconds_per_token)
    most = longest or max(max(group.lengths) + group.prompt_tokens for group in groups)
    rule = TailRule(max([1, *thresholds]), tail_seats or seats, kv_tokens, most)
    wanted = deque(sorted({t for t in thresholds if t > 0}, reverse=True))
    total = sum(group.tokens for group in groups)
    generation.submit(groups)
    gathered: list[TailTimes] = []
    while not generation.idle:
        while wanted and not generation.waiting and generation.unfinished <= wanted[0]:
            if generation.unfinished:
                gathered.append(_gathered(generation, table, replace(rule, threshold=wanted[0]), costs, total))
            wanted.popleft()
        generation.run_until(generation.next_event())
    end = generation.now
    plain = TailTimes(0, end, end, end + costs.switch_seconds + _spread(total, engines, costs))
    return TailSweep(plain, tuple(reversed(gathered)), fused_bound(groups, profile, engines, seats, costs))


def _spread(tokens: float, devices: int, costs: InferenceCost) -> float:
    return tokens * costs.seconds_per_token / max(1, costs.useful(devices))


@dataclass(frozen=True)
class _Table:
    """A profile for an engine's seats: seconds of a step by running samples, and of a token that is read."""

    steps: Sequence[float]
    prefill: float


def _gathered(generation: Generation, table: _Table, rule: TailRule, costs: InferenceCost, total: int) -> TailTimes:
    """The rest of a batch from now on, gathered; the generation itself is left as it is."""
    now, count = generation.now, len(generation.engines)
    here = [_samples(engine, now) for engine in generation.engines]
    held = [
        Held(order, index, (length - left,), float(left))
        for index, samples in enumerate(here)
        for order, (_, length, left) in enumerate(samples, start=index << 32)
    ]
    plan = plan_tail(held, range(count), rule)
    arrivals, moved = [], 0
    for index in plan.kept:
        coming = [here[order >> 32][order & 0xFFFFFFFF] for order, target in plan.moves.items() if target == index]
        moved += len(coming)
        arrivals += _drain(here[index], coming, table, now)
    arrivals.sort()
    finished = total - sum(tokens for _, tokens in arrivals)
    generated = max((time for time, _ in arrivals), default=now)
    free = costs.useful(count - len(plan.kept))
    hidden = _inferred_until(generated, now + costs.switch_seconds, finished, arrivals, free, costs)
    seconds = generated + costs.switch_seconds + _spread(total - hidden, count, costs)
    return TailTimes(rule.threshold, now, generated, seconds, len(plan.kept), moved, hidden)


_Sample = tuple[int, int, float]
"""``(prompt tokens, response tokens in the end, response tokens still to come)``."""


def _samples(engine: _Engine, now: float) -> list[_Sample]:
    """Unfinished samples of an engine; what it advances until ``now`` is left out of its own state."""
    progress = engine.progress
    if engine.running and now > max(engine.now, engine.stalled_until):
        progress += (now - max(engine.now, engine.stalled_until)) / engine.table[len(engine.running)]
    running = [
        (group.prompt_tokens, length, min(float(length), max(1.0, math.ceil(end - progress - 1e-6))))
        for end, _, group, length in engine.running
    ]
    return running + [(group.prompt_tokens, length, float(length)) for group, length, _ in engine.queue]


def _drain(staying: Sequence[_Sample], coming: Sequence[_Sample], table: _Table, now: float) -> list[tuple[float, int]]:
    """``(end, tokens)`` of every sample of an engine that first reads what comes."""
    read = sum(prompt + length - left for prompt, length, left in coming)
    time, progress, seats = now + read * table.prefill, 0.0, len(table.steps) - 1
    queue = deque([*staying, *coming])
    running: list[tuple[float, int]] = []
    ended = []
    while queue or running:
        while queue and len(running) < seats:
            prompt, length, left = queue.popleft()
            heapq.heappush(running, (progress + left, prompt + length))
        end, tokens = running[0]
        time += max(0.0, end - progress) * table.steps[len(running)]
        progress = max(progress, end)
        heapq.heappop(running)
        ended.append((time, tokens))
    return ended


def _inferred_until(
    end: float,
    start: float,
    finished: float,
    arrivals: Sequence[tuple[float, int]],
    devices: int,
    costs: InferenceCost,
) -> float:
    """Tokens whose inference is done by ``end``, when it starts with ``finished`` of them and others arrive."""
    if not devices or end <= start:
        return 0.0
    if not costs.seconds_per_token:
        return finished
    rate = devices / costs.seconds_per_token
    done, backlog, time = 0.0, finished, start
    for arrival, tokens in arrivals:
        work = min(backlog, rate * max(0.0, min(arrival, end) - time))
        done, backlog, time = done + work, backlog - work, max(time, min(arrival, end))
        backlog += tokens if arrival < end else 0
    return done
