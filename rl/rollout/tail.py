"""The tail of generation: when few samples are left, on which engines they are gathered.

    rule = TailRule(threshold=51, seats=64, kv_tokens=400_000, longest=4096)
    plan = plan_tail(held, engines=[0, 1, 2, 3], rule)
    plan.kept, plan.freed, plan.moves

Pure functions of what engines hold; ``gathering`` carries the plan out.

Source: RLHFuse (NSDI 2025), section 4: migration of long-tailed samples between the stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TailRule:
    """When the tail of a batch begins, and what one engine can hold of it.

    Attributes:
        threshold: R_t: the tail begins once at most so many samples are unfinished (and all are at engines).
        seats: BS_max: samples that one engine computes at the same time without slowing them down too much.
        kv_tokens: tokens whose keys and values one engine's cache holds, M / kv_per_token.
        longest: L_max: tokens of the longest possible sample, prompt and response together.
        poll_s: between looks at how many samples are unfinished (s).
    """

    threshold: int
    seats: int
    kv_tokens: int
    longest: int
    poll_s: float = 0.1

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be >= 1, got {getattr(self, name)}"
            for name in ("threshold", "seats", "kv_tokens", "longest")
            if getattr(self, name) < 1
        ]
        if not self.poll_s > 0:
            problems.append(f"poll_s must be > 0 seconds, got {self.poll_s}")
        if problems:
            raise ValueError("tail of generation: " + "; ".join(problems))

    def engines(self, unfinished: int) -> int:
        """m = max(ceil(R / BS_max), ceil(R * L_max * kv_per_token / M)), of R samples; at least 1."""
        return max(1, math.ceil(unfinished / self.seats), math.ceil(unfinished * self.longest / self.kv_tokens))


def seats_within(step_seconds: Callable[[int], float], seats: int, slowdown: float = 2.0) -> int:
    """BS_max: the most samples, up to ``seats``, with which a step takes at most ``slowdown`` times that of one sample.

    Args:
        step_seconds: seconds of a step by running samples (a ``LatencyProfile``).
        seats: of the engine.
        slowdown: >= 1.
    """
    if seats < 1 or not slowdown >= 1:
        raise ValueError(f"expected seats >= 1 and a slowdown >= 1, got {seats} and {slowdown}")
    limit = slowdown * step_seconds(1)
    return max(running for running in range(1, seats + 1) if running == 1 or step_seconds(running) <= limit)


@dataclass(frozen=True)
class Held:
    """The unfinished samples of one group on one engine; they move together, since they share their prompt's cache.

    Attributes:
        order: of the group, unique.
        engine: that holds it.
        tokens: response tokens so far, of each unfinished sample.
        remaining: response tokens still expected, of all of them together.
    """

    order: int
    engine: int
    tokens: tuple[int, ...]
    remaining: float


@dataclass(frozen=True)
class TailPlan:
    """Where the tail goes.

    Attributes:
        kept: engines that generate it, ascending.
        freed: the others.
        moves: by order of the group, the engine that it goes to; groups on kept engines stay.
    """

    kept: tuple[int, ...]
    freed: tuple[int, ...]
    moves: dict[int, int]


def plan_tail(held: Sequence[Held], engines: Sequence[int], rule: TailRule) -> TailPlan:
    """The fewest engines that can hold the rest, those with the most remaining work; ties to the lower index.

    Moved groups go, most remaining work first, to the kept engine that then has the fewest samples.

    Args:
        held: unfinished samples, at least one.
        engines: that may be kept, those of ``held`` among them.
        rule: what an engine can hold.
    """
    samples = dict.fromkeys(engines, 0)
    work = dict.fromkeys(engines, 0.0)
    for one in held:
        samples[one.engine] += len(one.tokens)
        work[one.engine] += one.remaining
    wanted = min(rule.engines(sum(samples.values())), len(samples))
    kept = sorted(sorted(samples, key=lambda index: (-work[index], index))[:wanted])
    moves = {}
    for one in sorted(held, key=lambda one: (-one.remaining, one.order)):
        if one.engine in kept:
            continue
        target = min(kept, key=lambda index: (samples[index], index))
        samples[target] += len(one.tokens)
        moves[one.order] = target
    return TailPlan(tuple(kept), tuple(sorted(set(samples) - set(kept))), moves)
