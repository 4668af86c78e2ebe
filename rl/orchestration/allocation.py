"""How many GPUs generate and how many train, and when to move one engine: pure functions of measured times.

split = allocate(8, {1: 80.0, 2: 41.0, 4: 22.0, 6: 16.0}, {1: 60.0, 2: 33.0, 4: 18.0}, trainer_divides=8)
split.engines, split.trainer_ranks      # 4, 4

rule = ElasticRule(generate_seconds, largest=8)
decision = rule.decide(engines, generate_seconds_measured, train_seconds_measured)     # at every step boundary
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Seconds = Callable[[int], float] | Mapping[int, float]
"""Seconds of a step's generation (or training) by GPUs; a table lists the only counts that are possible."""


@dataclass(frozen=True)
class Split:
    """A division of GPUs.

    Attributes:
        engines, trainer_ranks: GPUs of each side; an engine takes ``gpus_per_engine`` of them.
        generate_seconds, train_seconds: of a step, predicted.
    """

    engines: int
    trainer_ranks: int
    generate_seconds: float
    train_seconds: float

    @property
    def step_seconds(self) -> float:
        """Of a step when both sides work at the same time."""
        return max(self.generate_seconds, self.train_seconds)


def allocate(
    gpus: int,
    generate_seconds: Seconds,
    train_seconds: Seconds,
    gpus_per_engine: int = 1,
    trainer_divides: int | None = None,
) -> Split:
    """The split that minimises ``max(T_generate(x), T_train(y))`` over all ``x + y <= gpus``.

    Ties: fewer GPUs, then fewer trainer ranks.

    Args:
        gpus: how many there are.
        generate_seconds: by engines; train_seconds: by trainer ranks.
        gpus_per_engine: an engine's tensor-parallel ranks.
        trainer_divides: trainer ranks must divide this, e.g. samples of a step; None: any count.

    Raises:
        ValueError: no split is possible; the message says what was tried.

    Source:
        StreamRL (2025), resource allocation.
    """
    best: tuple[float, int, int] | None = None
    chosen: Split | None = None
    for engines in range(1, gpus // gpus_per_engine + 1):
        generate = _seconds(generate_seconds, engines)
        for ranks in range(1, gpus - engines * gpus_per_engine + 1):
            train = _seconds(train_seconds, ranks)
            if generate is None or train is None or (trainer_divides is not None and trainer_divides % ranks):
                continue
            key = (max(generate, train), engines * gpus_per_engine + ranks, ranks)
            if best is None or key < best:
                best, chosen = key, Split(engines, ranks, generate, train)
    if chosen is None:
        raise ValueError(
            f"no split of {gpus} GPUs: an engine takes {gpus_per_engine}, trainer ranks must divide {trainer_divides}, "
            f"and both need at least one; measured are engines {_known(generate_seconds)} and trainer ranks "
            f"{_known(train_seconds)}. Use more GPUs, smaller engines, or measure more counts"
        )
    return chosen


def _seconds(table: Seconds, count: int) -> float | None:
    """None: this count is not possible."""
    seconds = table(count) if callable(table) else table.get(count)
    if seconds is None or not math.isfinite(seconds):
        return None
    if seconds < 0:
        raise ValueError(f"expected seconds >= 0 of a step on {count}, got {seconds}")
    return float(seconds)


def _known(table: Seconds) -> str:
    return "of any count" if callable(table) else ", ".join(map(str, sorted(table)))


@dataclass(frozen=True)
class Decision:
    """What to do with the engines at a step boundary; ``reason`` is for the ledger."""

    action: Literal["add", "give_back", "keep"]
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"action": self.action, "reason": self.reason}


class ElasticRule:
    """When to add an engine and when to give one back.

    With ``n`` engines, generation of a step takes ``g`` seconds and training ``t`` (medians of the last ``window``
    steps; a change of ``n`` starts them anew). The profile predicts that ``n + 1`` engines take ``g * G(n+1)/G(n)``.

    - Add, when generation lags behind training by more than the saving of one more engine, ``g - t > g - g'``, the
      saving pays for itself, ``(g - g') * horizon > start_seconds + transfer_seconds``, and it exceeds half of
      ``margin`` of a step. So an engine is added only where all of its saving counts; one that would turn the trainer
      into the bottleneck at once is not.
    - Give back, when the trainer would still be the bottleneck with one engine less, by ``margin``:
      ``g * G(n-1)/G(n) * (1 + margin) < t``.

    The two exclude each other by more than twice the margin, so that noise below it does not make the rule flap; after
    a change it waits ``window`` steps.

    Args:
        generate_seconds: profile by engines; only ratios are used.
        smallest, largest: engines.
        start_seconds, transfer_seconds: cost of a new engine: start-up, weights.
        horizon: steps over which it must pay.
        margin: fraction of a step's time.
        window: steps.
    """

    def __init__(
        self,
        generate_seconds: Seconds,
        *,
        largest: int,
        smallest: int = 1,
        start_seconds: float = 0.0,
        transfer_seconds: float = 0.0,
        horizon: int = 20,
        margin: float = 0.1,
        window: int = 3,
    ) -> None:
        if not (1 <= smallest <= largest and horizon >= 1 and window >= 1 and margin >= 0):
            raise ValueError(
                f"expected 1 <= smallest <= largest, horizon and window >= 1, margin >= 0; got {smallest}, {largest}, "
                f"{horizon}, {window}, {margin}"
            )
        self.profile = generate_seconds
        self.smallest, self.largest = smallest, largest
        self.cost = start_seconds + transfer_seconds
        self.horizon, self.margin, self.window = horizon, margin, window
        self._engines: int | None = None
        self._seen: deque[tuple[float, float]] = deque(maxlen=window)

    def decide(self, engines: int, generate_seconds: float, train_seconds: float) -> Decision:
        """Call once per step with what the step took; times in seconds, each side's own work without waiting."""
        if not (generate_seconds > 0 and train_seconds > 0):
            raise ValueError(f"expected times > 0 seconds, got {generate_seconds} and {train_seconds}")
        if engines != self._engines:
            self._engines = engines
            self._seen.clear()
        self._seen.append((generate_seconds, train_seconds))
        if len(self._seen) < self.window:
            return Decision("keep", f"{len(self._seen)} of {self.window} steps with {engines} engines")
        generate = median(seconds for seconds, _ in self._seen)
        train = median(seconds for _, seconds in self._seen)
        told = f"{engines} engines generate in {generate:.3g} s, training takes {train:.3g} s"
        return self._add(engines, generate, train, told) or self._give_back(engines, generate, train, told)

    def _add(self, engines: int, generate: float, train: float, told: str) -> Decision | None:
        with_more = self._predicted(engines, engines + 1, generate)
        if with_more is None or engines >= self.largest:
            return None
        saving, lag = generate - with_more, generate - train
        if saving <= self.margin * generate / 2 or lag <= saving * (1 + self.margin):
            return None
        if saving * self.horizon <= self.cost:
            return Decision(
                "keep",
                f"{told}; one more would save {saving:.3g} s a step, in {self.horizon} steps less than the "
                f"{self.cost:.3g} s that it costs",
            )
        return Decision("add", f"{told}: a lag of {lag:.3g} s, more than the {saving:.3g} s that one more saves")

    def _give_back(self, engines: int, generate: float, train: float, told: str) -> Decision:
        with_less = self._predicted(engines, engines - 1, generate)
        if engines > self.smallest and with_less is not None and with_less * (1 + self.margin) < train:
            return Decision("give_back", f"{told}: with one less, {with_less:.3g} s, training still takes longer")
        return Decision("keep", told)

    def _predicted(self, engines: int, others: int, generate: float) -> float | None:
        """Seconds of generation with ``others`` engines; None: the profile does not know."""
        if others < 1:
            return None
        here, there = _seconds(self.profile, engines), _seconds(self.profile, others)
        return generate * there / here if here and there is not None else None
