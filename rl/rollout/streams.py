"""Groups of samples on their way from engines to who asked for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from rl.rollout.engine import EngineTimeout
from rl.rollout.validation import RefusedSample
from rl.types import Prompt, Sample

GroupOfSamples = list[Sample | RefusedSample]


@dataclass(frozen=True)
class Group:
    """All samples of one prompt, as asked for."""

    prompt: Prompt
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class TailReport:
    """The tail of a stream has been gathered; see ``rl.rollout.gathering``.

    Attributes:
        began, gathered: when it was decided, and when the freed engines were empty; seconds of ``time.time()``.
        unfinished: samples, when it began.
        kept, freed: engines that generate the rest, and those that do not.
        moved: samples that were broken off and went on elsewhere.
        kept_tokens: response tokens that they took along.
    """

    began: float
    gathered: float
    unfinished: int
    kept: tuple[int, ...]
    freed: tuple[int, ...]
    moved: int
    kept_tokens: int


def make_groups(prompts: Sequence[Prompt], n_samples: int) -> list[Group]:
    """One group per prompt, with the ids of its samples, ``"<prompt uid>/<k>"``."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be >= 1, got {n_samples}")
    return [Group(p, tuple(f"{p.uid}/{k}" for k in range(n_samples))) for p in prompts]


class GroupStream:
    """The groups of one ``generate`` call, in the order they complete.

        for group in stream:            # until every prompt has come
            ...
        stream.next(timeout_s=1.0)      # one group; None when every prompt has come
        stream.close()                  # aborts what still runs

    With a rule for its tail, ``tail`` says once few samples are left and have been gathered, and ``take_early`` gives
    finished samples of groups that are not complete; they come again with their groups.

    Safe to use from several threads. As a context manager it closes itself.

    Args:
        groups: how many will come.
        buffer_groups: completed groups that may wait to be taken before no new ones are started; None: any number.
        limit_s: of every wait that names no limit itself: seconds without a complete group of any stream.
        progress: when the last group of any stream was complete, seconds of ``time.monotonic()``.
        wake: called after a group was taken.
        close: called once when the stream is closed early.
    """

    def __init__(
        self,
        groups: int,
        buffer_groups: int | None,
        limit_s: float,
        progress: Callable[[], float],
        wake: Callable[[], None],
        close: Callable[[GroupStream], None],
    ) -> None:
        if buffer_groups is not None and buffer_groups < 1:
            raise ValueError(f"buffer_groups must be >= 1 or None, got {buffer_groups}")
        self.groups, self.buffer_groups, self.limit_s = groups, buffer_groups, limit_s
        self.delivered = 0
        self.closed = False
        self.error: BaseException | None = None
        self.tail: TailReport | None = None
        self._early: list[Sample] = []
        self._progress, self._wake, self._close = progress, wake, close
        self._ready: deque[GroupOfSamples] = deque()
        self._changed = threading.Condition()
        self._waiting, self._running = groups, 0

    # ------------------------------------------------------------------ for who takes groups

    @property
    def waiting(self) -> int:
        """Groups that no engine has yet."""
        return self._waiting

    @property
    def running(self) -> int:
        """Groups that engines hold."""
        return self._running

    @property
    def ready(self) -> int:
        """Groups that are complete and were not taken."""
        return len(self._ready)

    def next(self, timeout_s: float | None = None) -> GroupOfSamples | None:
        """The next complete group; None when all were taken or the stream was closed.

        Args:
            timeout_s: seconds to wait; None: while groups of any stream complete, and then what the engines' own
                limits allow.

        Raises:
            EngineTimeout: none completed in time; the stream stays usable. Also what an engine reported: its own
                timeout, torn weights, a death without a replacement. The stream is then at its end.
        """
        limit = self.limit_s if timeout_s is None else timeout_s
        called = time.monotonic()
        with self._changed:
            while not self._ready:
                if self.closed or self.delivered == self.groups:
                    return None
                self._raise_error()
                since = called if timeout_s is not None else max(called, self._progress())
                left = since + limit - time.monotonic()
                if left <= 0:
                    raise EngineTimeout(
                        f"no group of samples completed within {limit:g} s: {self._running} are at engines, "
                        f"{self._waiting} wait for one"
                    )
                self._changed.wait(left)
            self._raise_error()
            self.delivered += 1
            group = self._ready.popleft()
        self._wake()
        return group

    def take_early(self) -> list[Sample]:
        """Finished samples of incomplete groups, each once; never waits."""
        with self._changed:
            early, self._early = self._early, []
        return early

    def close(self) -> None:
        """End the stream: what runs is aborted, what waits is forgotten. Calling it again does nothing."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            ended = self.delivered + len(self._ready) == self.groups
            self._ready.clear()
            self._changed.notify_all()
        if not ended:
            self._close(self)

    def __iter__(self) -> Iterator[GroupOfSamples]:
        return self

    def __next__(self) -> GroupOfSamples:
        group = self.next()
        if group is None:
            raise StopIteration
        return group

    def __enter__(self) -> GroupStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raise_error(self) -> None:
        if self.error is not None and not self.closed:
            raise self.error

    # ------------------------------------------------------------------ for the dispatcher

    @property
    def has_room(self) -> bool:
        """Whether more groups may be started."""
        return self.buffer_groups is None or len(self._ready) < self.buffer_groups

    def started(self) -> None:
        """An engine took a group."""
        self._waiting, self._running = self._waiting - 1, self._running + 1

    def returned(self) -> None:
        """A group came back unfinished and waits again."""
        self._waiting, self._running = self._waiting + 1, self._running - 1

    def put_early(self, samples: Sequence[Sample]) -> None:
        """Finished samples of groups that are not complete."""
        with self._changed:
            self._early += samples

    def gathered(self, report: TailReport) -> None:
        """The tail is where it stays."""
        with self._changed:
            self.tail = report
            self._changed.notify_all()

    def put(self, group: GroupOfSamples) -> bool:
        """Hand over a complete group; returns whether it was the last one."""
        with self._changed:
            self._running -= 1
            if not self.closed:
                self._ready.append(group)
            self._changed.notify_all()
        return not self._running and not self._waiting

    def end(self, error: BaseException | None) -> None:
        """Nothing more comes; with an error, who takes groups gets it at once."""
        with self._changed:
            self._waiting = self._running = 0
            self.error = self.error or error
            self._changed.notify_all()
