"""Engines as the generation service sees them: what it asks of them, and what it knows of each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.dispatch import EngineState, WaitingGroup
from rl.rollout.streams import Group, GroupOfSamples, GroupStream
from rl.rollout.validation import RefusedSample
from rl.rollout.weights import Manifest
from rl.types import Prompt, Sample

InFlight = Literal["finish", "continue"]

_SPEED_MEMORY_S = 60.0  # busy seconds after which a measurement weighs 1/e


class EngineDied(RuntimeError):
    """The process of an engine ended; the message names it and what it was doing."""


class Engines(Protocol):
    """What the generation service asks of a pool of engines.

    Calls return at once; a future that fails with :class:`EngineDied` says that the engine's process is gone.

    Attributes:
        config: of every engine; the service uses ``max_num_seqs``, ``initial_version`` and the limits.
        version: of the weights that all engines have when the service starts.
    """

    config: EngineConfig
    version: int

    def indices(self) -> list[int]:
        """Of the engines that are up."""
        ...

    def start_engine(self, index: int) -> Future[Any]:
        """Start a process under this index, in place of a dead one or as a new one."""
        ...

    def generate_on(
        self, index: int, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> Future[GroupOfSamples]: ...

    def continue_on(
        self, index: int, samples: Sequence[Sample], sampling: Sampling, seed: int
    ) -> Future[GroupOfSamples]:
        """Go on with aborted samples of one group, from their tokens."""
        ...

    def unfinished_on(self, index: int, sample_ids: Sequence[str]) -> Future[dict[str, int]]:
        """Response tokens so far of those samples that have not ended."""
        ...

    def finished_on(self, index: int, sample_ids: Sequence[str]) -> Future[list[Sample]]:
        """Those samples that have ended, of groups that still run there."""
        ...

    def update_on(
        self,
        index: int,
        version: int,
        chunks: Sequence[Any],
        manifest: Manifest,
        in_flight: Literal["refuse", "continue"],
    ) -> Future[float]: ...

    def abort_on(self, index: int, sample_ids: Sequence[str]) -> Future[int]: ...

    def stop_engine(self, index: int) -> Future[Any]:
        """End it in order; it stays known until :meth:`kill_engine`."""
        ...

    def kill_engine(self, index: int) -> None:
        """End it whatever it does, and forget it."""
        ...


@dataclass(frozen=True)
class UpdateReport:
    """A weight update that every engine has, or has a newer one instead.

    Attributes:
        version: of the weights.
        seconds: from the call until the last engine had them.
        engine_seconds: by engine, the update itself.
        drained_seconds: by engine, from the call until its update began.
        replaced: engines that took a newer update in its stead, or left.
    """

    version: int
    seconds: float
    engine_seconds: Mapping[int, float]
    drained_seconds: Mapping[int, float]
    replaced: tuple[int, ...] = ()


class Update:
    """A weight update under way.

    Args:
        engines: that it is for.
        before: the newest one until now, to fall back to when no engine accepts this one.
    """

    def __init__(
        self,
        version: int,
        chunks: Sequence[Any],
        manifest: Manifest,
        in_flight: InFlight,
        future: Future[UpdateReport],
    ) -> None:
        self.version, self.chunks, self.manifest, self.in_flight = version, list(chunks), dict(manifest), in_flight
        self.future = future
        self.before: Update | None = None
        self.pending: set[int] = set()
        self.requested = time.time()
        self._seconds: dict[int, float] = {}
        self._drained: dict[int, float] = {}
        self._replaced: list[int] = []

    def applied(self, engine: int, began: float, ended: float) -> None:
        """Times in seconds of ``time.time()``."""
        if engine in self.pending:
            self._seconds[engine], self._drained[engine] = ended - began, began - self.requested
            self._settle(engine)

    def replaced(self, engine: int) -> None:
        """The engine does not need it any more."""
        if engine in self.pending:
            self._replaced.append(engine)
            self._settle(engine)

    def failed(self, error: BaseException) -> None:
        """An engine did not take it; the first error is reported, the other engines go on."""
        if not self.future.done():
            self.future.set_exception(error)

    def _settle(self, engine: int) -> None:
        self.pending.discard(engine)
        if not self.pending and not self.future.done():
            seconds = time.time() - self.requested
            replaced = tuple(sorted(self._replaced))
            self.future.set_result(UpdateReport(self.version, seconds, self._seconds, self._drained, replaced))


@dataclass(eq=False)
class PendingGroup:
    """A group from when it was asked for until it is delivered.

    Attributes:
        order: of submission.
        view: what the dispatch policy sees of it.
        cancelled: nobody waits for it any more.
        ended: samples that are done, by id: of a group that moved, or taken early. They are not generated again.
        parts: samples that were broken off to go on elsewhere, by id.
        target: where it is about to move.
    """

    stream: GroupStream
    group: Group
    sampling: Sampling
    seed: int
    view: WaitingGroup
    cancelled: bool = False
    ended: dict[str, Sample | RefusedSample] = field(default_factory=dict)
    parts: dict[str, Sample] = field(default_factory=dict)
    target: int | None = None

    @property
    def order(self) -> int:
        return self.view.order

    @property
    def uid(self) -> str:
        return self.group.prompt.uid

    @property
    def open_ids(self) -> list[str]:
        """Samples that are not done, in their order."""
        return [name for name in self.group.sample_ids if name not in self.ended]

    @property
    def samples(self) -> GroupOfSamples:
        """All samples of a group without open ones."""
        return [self.ended[name] for name in self.group.sample_ids]

    def take_in(self, samples: Iterable[Sample | RefusedSample]) -> int:
        """What an engine answered: done, or broken off if the group is about to move. Returns its new tokens."""
        tokens = 0
        for sample in samples:
            name = sample.sample_id
            before = self.parts.pop(name, None)
            if isinstance(sample, Sample):
                tokens += len(sample.response_tokens) - (0 if before is None else len(before.response_tokens))
                if self.target is not None and sample.finish_reason == "abort":
                    self.parts[name] = sample
                    continue
            self.ended.setdefault(name, sample)
        return tokens


class WorkMeter:
    """How long an engine was busy and how fast it was.

    Notes:
        speed = sum_i tokens_i w_i / sum_i seconds_i w_i, w_i = exp(-(busy seconds since i) / 60): an average over the
        last minute or so of work, in which idle time counts nothing.
    """

    def __init__(self) -> None:
        # One tuple, so that other threads never see half of a change: busy seconds until then, busy since.
        self._busy: tuple[float, float | None] = (0.0, None)
        self._marked = 0.0
        self._tokens = 0.0
        self._seconds = 0.0

    def begin(self) -> None:
        self._busy = (self._busy[0], time.monotonic())

    def end(self) -> None:
        self._busy = (self.busy_seconds, None)

    @property
    def busy_seconds(self) -> float:
        total, since = self._busy
        return total if since is None else total + time.monotonic() - since

    def completed(self, tokens: int) -> None:
        """Response tokens of a group that has just completed."""
        busy = self.busy_seconds
        keep = math.exp(-(busy - self._marked) / _SPEED_MEMORY_S)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + busy - self._marked
        self._marked = busy

    @property
    def tokens_per_second(self) -> float | None:
        """None before the first group."""
        return self._tokens / self._seconds if self._tokens and self._seconds else None


@dataclass(eq=False)
class EngineRecord:
    """What the dispatcher knows of an engine.

    Attributes:
        incarnation: counts the processes that had this index.
        serving: its process is up.
        version: of its weights; None until a new process has the newest.
        running: what it holds, by order, with the time it was sent (seconds of ``time.time()``).
        next_update: not begun yet; the engine gets no groups until it has it.
        updating: begun.
        joining: who waits for a new engine to serve; None once it does.
        leaving: who waits for it to be gone.
        resting: it gets no groups, because a tail was gathered elsewhere.
    """

    index: int
    incarnation: int = 0
    serving: bool = True
    version: int | None = None
    running: dict[int, tuple[PendingGroup, float]] = field(default_factory=dict)
    next_update: Update | None = None
    updating: Update | None = None
    joining: Future[int] | None = None
    leaving: Future[None] | None = None
    stopping: bool = False
    resting: bool = False
    meter: WorkMeter = field(default_factory=WorkMeter)

    @property
    def accepting(self) -> bool:
        free = self.next_update is None and self.updating is None and self.leaving is None
        return self.serving and free and not self.resting

    @property
    def outstanding(self) -> int:
        """Samples that it holds."""
        return sum(len(pending.open_ids) for pending, _ in self.running.values())

    def state(self, seats: int) -> EngineState:
        return EngineState(self.index, seats, self.outstanding, self.meter.tokens_per_second, self.accepting)

    def take(self, pending: PendingGroup) -> None:
        if not self.running:
            self.meter.begin()
        self.running[pending.order] = (pending, time.time())

    def give(self, pending: PendingGroup) -> float:
        """It holds the group no more; returns when it was sent."""
        _, sent = self.running.pop(pending.order)
        if not self.running:
            self.meter.end()
        return sent

    def give_all(self) -> list[PendingGroup]:
        groups = [pending for pending, _ in self.running.values()]
        for pending in groups:
            self.give(pending)
        return groups
