"""Which group of samples goes to which engine, and when: four policies behind one call.

    dispatch = get_dispatch("skew_aware", step_seconds=profile)
    for group, engine in dispatch.assign(waiting, engines):
        send(waiting[group], engine)

``assign`` is called again whenever groups have come or an engine has got room. It hands out what can be sent now, in
the order to send it (an engine starts samples in the order they reach it); groups that it does not name wait.

- ``fcfs``: first come, first served, to the engine with the fewest samples relative to its speed.
- ``random``: in random order to random engines that have room; a comparator.
- ``longest_first``: the group with the longest predicted response first. With more samples than seats, the last ones
  to start are then short.
- ``skew_aware``: the longest ``fraction`` of the groups run on engines of their own, where fewer samples share a step
  and each token takes less time; longest first everywhere. How many engines: :func:`engines_for_longest`.

Policies are deterministic: ties break by submission order and by lower engine index. An engine takes a group while
it then holds at most ``fill`` times its seats, and one that holds nothing always does, so that it never idles between
groups and a slow one does not hoard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

FILL = 2.0  # samples that an engine holds at most, in units of its seats
FRACTION = 0.2  # share of the groups that are isolated; StreamRL's
_LABELS = 1 << 16  # groups whose class is remembered, so that one that is generated again keeps it
_SPEED_STEPS = 8  # measured speeds closer than 1/8 of the mean are taken as equal when engines are chosen


@dataclass(frozen=True)
class WaitingGroup:
    """All samples of one prompt, not yet sent to an engine.

    Attributes:
        uid: of the prompt.
        order: of submission; lower came first.
        samples: how many responses are asked for.
        predicted_tokens: of the group's longest response; None: unknown.
        batch: number of the set that it belongs to. Groups of a lower one go first under every policy but ``fcfs``
            (which goes by ``order``): a trainer that works set by set waits for the last group of the earliest.
    """

    uid: str
    order: int
    samples: int
    predicted_tokens: float | None
    batch: int = 0


@dataclass(frozen=True)
class EngineState:
    """An engine as the dispatcher sees it.

    Attributes:
        index: what ``assign`` calls it.
        seats: samples that it computes at the same time.
        outstanding: samples that it holds, running or queued.
        tokens_per_second: measured speed; None: unknown, taken as the mean of those known.
        accepting: whether it may get groups now.
    """

    index: int
    seats: int
    outstanding: int
    tokens_per_second: float | None
    accepting: bool


class Dispatch(Protocol):
    """A policy."""

    def assign(self, waiting: Sequence[WaitingGroup], engines: Sequence[EngineState]) -> list[tuple[int, int]]:
        """Pairs (position in ``waiting``, engine index) to send now, in this order; no group occurs twice."""
        ...


class _Room:
    """What engines hold while groups are handed out; ``speed`` is relative to the mean.

    Arrays have an entry per accepting engine, by index, so that the first of equals is the lowest.
    """

    def __init__(self, engines: Iterable[EngineState], fill: float) -> None:
        accepting = sorted((engine for engine in engines if engine.accepting), key=lambda engine: engine.index)
        self.engines = {engine.index: engine for engine in accepting}
        self.place = {index: i for i, index in enumerate(self.engines)}
        self.indices = list(self.engines)
        self.held = np.array([engine.outstanding for engine in accepting], dtype=np.float64)
        self.most = np.array([fill * engine.seats for engine in accepting])
        relative = relative_speeds(accepting)
        self.speed = np.array([relative[index] for index in self.indices])
        self.sent: list[tuple[int, int]] = []

    def able(self, samples: int) -> np.ndarray:
        """bool ``[engines]``: which have room for a group."""
        return (self.held == 0) | (self.held + samples <= self.most)

    def least_loaded(self, samples: int, among: np.ndarray) -> int | None:
        """The engine that holds least relative to its speed, of those with room; None when there is none."""
        load = np.where(among & self.able(samples), (self.held + samples) / self.speed, np.inf)
        best = int(load.argmin()) if len(load) else 0
        return self.indices[best] if len(load) and load[best] < np.inf else None

    def only(self, among: Iterable[int] | None) -> np.ndarray:
        """bool ``[engines]``: those named; None: all."""
        if among is None:
            return np.ones(len(self.indices), dtype=bool)
        mask = np.zeros(len(self.indices), dtype=bool)
        mask[[self.place[index] for index in among if index in self.place]] = True
        return mask

    def send(self, position: int, samples: int, index: int) -> None:
        self.held[self.place[index]] += samples
        self.sent.append((position, index))

    def hand_out(
        self, waiting: Sequence[WaitingGroup], positions: Iterable[int], among: Sequence[int] | None = None
    ) -> list[int]:
        """Send groups in the given order while there is room; returns the positions that are left."""
        positions, mask = list(positions), self.only(among)
        for i, position in enumerate(positions):
            samples = waiting[position].samples
            index = self.least_loaded(samples, mask)
            if index is None:
                return positions[i:]
            self.send(position, samples, index)
        return []


def relative_speeds(engines: Sequence[EngineState]) -> dict[int, float]:
    """Speed of every engine in units of the mean of those known; 1 where unknown."""
    known = [e.tokens_per_second for e in engines if e.tokens_per_second]
    mean = sum(known) / len(known) if known else 1.0
    return {e.index: (e.tokens_per_second / mean if e.tokens_per_second else 1.0) for e in engines}


def longest_first(waiting: Sequence[WaitingGroup]) -> list[int]:
    """Positions by batch, predicted tokens (longest first), submission; unknown ones count as the median."""
    known = [group.predicted_tokens for group in waiting if group.predicted_tokens is not None]
    median = float(np.median(known)) if known else 0.0

    def key(position: int) -> tuple[int, float, int]:
        group = waiting[position]
        return group.batch, -(median if group.predicted_tokens is None else group.predicted_tokens), group.order

    return sorted(range(len(waiting)), key=key)


class FirstComeFirstServed:
    """In the order of submission; see the module."""

    def __init__(self, fill: float = FILL) -> None:
        self.fill = _checked_fill(fill)

    def assign(self, waiting: Sequence[WaitingGroup], engines: Sequence[EngineState]) -> list[tuple[int, int]]:
        room = _Room(engines, self.fill)
        room.hand_out(waiting, sorted(range(len(waiting)), key=lambda position: waiting[position].order))
        return room.sent


class Random:
    """Order and engine by a hash of (seed, group), so that a resumed run draws the same; see the module."""

    def __init__(self, seed: int = 0, fill: float = FILL) -> None:
        self.seed = seed
        self.fill = _checked_fill(fill)

    def assign(self, waiting: Sequence[WaitingGroup], engines: Sequence[EngineState]) -> list[tuple[int, int]]:
        room = _Room(engines, self.fill)
        drawn = [self._draws(group) for group in waiting]
        for position in sorted(range(len(waiting)), key=lambda p: (waiting[p].batch, drawn[p][0], waiting[p].order)):
            samples = waiting[position].samples
            able = np.flatnonzero(room.able(samples))
            if not len(able):
                break
            ends = np.cumsum(room.speed[able])
            chosen = int(np.searchsorted(ends, drawn[position][1] * ends[-1], side="right"))
            room.send(position, samples, room.indices[able[min(chosen, len(able) - 1)]])
        return room.sent

    def _draws(self, group: WaitingGroup) -> tuple[float, float]:
        """Two numbers in [0, 1)."""
        digest = hashlib.blake2b(f"{self.seed}|{group.order}|{group.uid}".encode(), digest_size=16).digest()
        return tuple(int.from_bytes(half, "little") / 2**64 for half in (digest[:8], digest[8:]))  # type: ignore


class LongestFirst:
    """The longest predicted group first; see the module."""

    def __init__(self, fill: float = FILL) -> None:
        self.fill = _checked_fill(fill)

    def assign(self, waiting: Sequence[WaitingGroup], engines: Sequence[EngineState]) -> list[tuple[int, int]]:
        room = _Room(engines, self.fill)
        room.hand_out(waiting, longest_first(waiting))
        return room.sent


def group_latency(
    step_seconds: Callable[[int], float], samples: int, tokens: float, seats: Sequence[int], speeds: Sequence[float]
) -> float:
    """Seconds until engines have generated ``samples`` responses of ``tokens`` each, in StreamRL's model.

    Samples are shared in proportion to speed. An engine that runs ``b`` of its ``m`` at a time needs
    ``step_seconds(b) * tokens * ceil(m / b) / speed``, with the best ``b`` up to its seats; the slowest counts. With
    equal engines that is ``PTL(b) * L * ceil(M / (k * b))``.

    Args:
        step_seconds: seconds of one engine step (a token for each running sample) with that many samples running.
        samples, tokens: of the group.
        seats, speeds: of the engines; speeds relative to the engine that ``step_seconds`` was measured on.
    """
    if not samples:
        return 0.0
    shares = _shares(samples, np.asarray(speeds, dtype=np.float64))
    alone: dict[tuple[int, int], float] = {}
    slowest = 0.0
    for share, most, speed in zip(shares.tolist(), seats, speeds, strict=True):
        if (share, most) not in alone:
            batches = np.arange(1, min(most, share) + 1)
            steps = np.array([step_seconds(int(batch)) for batch in batches])
            alone[share, most] = float((steps * np.ceil(share / batches)).min())
        slowest = max(slowest, alone[share, most] * tokens / speed)
    return slowest


def _shares(samples: int, speeds: np.ndarray) -> np.ndarray:
    """int64 ``[k]``: most samples that an engine of that speed gets."""
    # A share a hair above a whole number is that number.
    return np.maximum(np.ceil(samples * speeds / speeds.sum() - 1e-9), 1).astype(np.int64)


def engines_for_longest(
    step_seconds: Callable[[int], float],
    long: tuple[int, float],
    rest: tuple[int, float],
    seats: Sequence[int],
    speeds: Sequence[float],
    most: int | None = None,
) -> tuple[int, float]:
    """How many of the engines, the first ones, generate only the long samples.

    Every split is tried: the ``k`` that minimises the larger of the two groups' :func:`group_latency`.

    Args:
        step_seconds: see :func:`group_latency`.
        long, rest: ``(samples, tokens)`` of either class; StreamRL takes the 90th percentile of the long ones' tokens
            and the median of the rest's.
        seats, speeds: of the engines, in the order in which the long samples get them.
        most: engines that the long samples can use: their groups, each of which stays on one. None: any number.

    Returns:
        ``(k, seconds)``; ``k`` is 0 when one of the classes is empty or there is only one engine.

    Source:
        StreamRL (2025), section on skewness-aware dispatching.
    """
    count = len(seats)
    if count < 2 or not long[0] or not rest[0]:
        both = max(long[1], rest[1])
        return 0, group_latency(step_seconds, long[0] + rest[0], both, seats, speeds)
    cached = _Cached(step_seconds)

    def slower(k: int) -> float:
        return max(
            group_latency(cached, *long, seats[:k], speeds[:k]), group_latency(cached, *rest, seats[k:], speeds[k:])
        )

    seconds, k = min((slower(k), k) for k in range(1, min(count - 1, most or count) + 1))
    return k, seconds


class _Cached:
    def __init__(self, step_seconds: Callable[[int], float]) -> None:
        self.step_seconds = step_seconds
        self.known: dict[int, float] = {}

    def __call__(self, running: int) -> float:
        if running not in self.known:
            self.known[running] = float(self.step_seconds(running))
        return self.known[running]


class SkewAware:
    """The longest groups on engines of their own; see the module.

    The split is made anew when groups come that it has not seen, or when the accepting engines change; a group keeps
    its class. Where one side has nothing left to send, its engines help the other: one of the long ones up to the
    samples that it was planned to run at a time, one of the rest as soon as it has room.

    Args:
        step_seconds: measured seconds of one engine step against running samples, e.g. a ``LatencyProfile``.
        fraction: of the groups, by predicted tokens, that are long.
        fill: see the module.
    """

    def __init__(self, step_seconds: Callable[[int], float], fraction: float = FRACTION, fill: float = FILL) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"expected a fraction between 0 and 1 of groups that are long, got {fraction}")
        self.step_seconds = _Cached(step_seconds)
        self.fraction = fraction
        self.fill = _checked_fill(fill)
        self.dedicated: tuple[int, ...] = ()
        self._batches: dict[int, float] = {}
        self._is_long: dict[tuple[str, int], bool] = {}
        self._threshold = math.inf
        self._accepting: tuple[int, ...] = ()

    def assign(self, waiting: Sequence[WaitingGroup], engines: Sequence[EngineState]) -> list[tuple[int, int]]:
        room = _Room(engines, self.fill)
        if not waiting or not room.engines:
            return []
        order = longest_first(waiting)
        came = self._classify(waiting, order)
        if came or tuple(room.engines) != self._accepting:
            self._split(waiting, room)
        if not self.dedicated:
            room.hand_out(waiting, order)
            return room.sent
        others = [index for index in room.engines if index not in self.dedicated]
        long = [position for position in order if self._is_long[_key(waiting[position])]]
        rest = [position for position in order if not self._is_long[_key(waiting[position])]]
        long = room.hand_out(waiting, long, self.dedicated)
        rest = room.hand_out(waiting, rest, others)
        if rest and not long:
            for index, batch in self._batches.items():
                if index in room.place:
                    room.most[room.place[index]] = batch
            room.hand_out(waiting, rest, self.dedicated)
        elif long and not rest:
            room.hand_out(waiting, long, others)
        return room.sent

    def _classify(self, waiting: Sequence[WaitingGroup], order: Sequence[int]) -> bool:
        """Give new groups their class; returns whether there were any."""
        new = [position for position in order if _key(waiting[position]) not in self._is_long]
        count = round(self.fraction * len(new))
        if count:
            shortest = waiting[new[count - 1]].predicted_tokens
            self._threshold = math.inf if shortest is None else shortest
        for i, position in enumerate(new):
            tokens = waiting[position].predicted_tokens
            # Too few to rank among themselves: by the last boundary.
            long = i < count if count else tokens is not None and tokens >= self._threshold
            self._is_long[_key(waiting[position])] = long and tokens is not None
        for key in list(self._is_long)[: max(0, len(self._is_long) - max(_LABELS, len(waiting)))]:
            del self._is_long[key]
        return bool(new)

    def _split(self, waiting: Sequence[WaitingGroup], room: _Room) -> None:
        """Choose the engines of the long groups: fast ones first, then those that had them, then the emptiest."""

        speed = dict(zip(room.indices, room.speed.tolist(), strict=True))
        held = dict(zip(room.indices, room.held.tolist(), strict=True))

        def key(index: int) -> tuple[int, bool, float, int]:
            return (
                -round(_SPEED_STEPS * speed[index]),
                index not in self.dedicated,
                held[index] / speed[index],
                index,
            )

        ranked = sorted(room.engines, key=key)
        classes: dict[bool, list[WaitingGroup]] = {True: [], False: []}
        for group in waiting:
            classes[self._is_long[_key(group)]].append(group)
        k, _ = engines_for_longest(
            self.step_seconds,
            _extent(classes[True], 90),
            _extent(classes[False], 50),
            [room.engines[index].seats for index in ranked],
            [speed[index] for index in ranked],
            most=len(classes[True]),
        )
        self.dedicated = tuple(ranked[:k])
        if k:
            samples = sum(group.samples for group in classes[True])
            shares = _shares(samples, np.array([speed[index] for index in self.dedicated])).tolist()
            self._batches = {
                index: min(share, room.engines[index].seats)
                for index, share in zip(self.dedicated, shares, strict=True)
            }
        self._accepting = tuple(room.engines)


def _key(group: WaitingGroup) -> tuple[str, int]:
    return group.uid, group.order


def _extent(groups: Sequence[WaitingGroup], percentile: float) -> tuple[int, float]:
    """``(samples, tokens)`` of a class."""
    known = [group.predicted_tokens for group in groups if group.predicted_tokens is not None]
    return sum(group.samples for group in groups), float(np.percentile(known, percentile)) if known else 0.0


def _checked_fill(fill: float) -> float:
    if not fill >= 1:
        raise ValueError(f"expected fill >= 1 (in units of an engine's seats), got {fill}; engines would idle")
    return fill


_POLICIES: dict[str, Callable[..., Dispatch]] = {
    "fcfs": FirstComeFirstServed,
    "random": Random,
    "longest_first": LongestFirst,
    "skew_aware": SkewAware,
}


def get_dispatch(name: str, **settings: Any) -> Dispatch:
    """The policy of that name.

    Settings: ``fill`` for all; ``seed`` for random; ``step_seconds`` (required: any measured profile) and ``fraction``
    for skew_aware.

    Raises:
        ValueError: no such policy, or a setting that it does not have, lacks or cannot use.
    """
    if name not in _POLICIES:
        raise ValueError(f"expected a dispatch policy, one of {', '.join(_POLICIES)}; got {name!r}")
    if name == "skew_aware" and settings.get("step_seconds") is None:
        raise ValueError(
            "skew_aware needs step_seconds, the measured seconds of an engine step against running samples: write a "
            "profile with scripts/measure_latency.py and pass LatencyProfile.load(path)"
        )
    try:
        return _POLICIES[name](**settings)
    except TypeError as error:
        raise ValueError(f"settings {', '.join(settings)} do not suit dispatch policy {name!r}: {error}") from error
