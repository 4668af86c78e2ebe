"""Batches of prompts on their way through generation and reward, ahead of the training that takes them.

    feed.admit()                      # starts every batch that staleness allows
    batch = feed.oldest()
    for groups in batch.chunks(...)   # or batch.all(): waits until the batch is complete
    feed.trained()

Which prompts are in a batch, and in which mini-batch, is decided by the order of the data before anything is
generated. So a mini-batch is the same whatever finishes first; only the order in which its gradient adds up differs.

With dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) a batch takes further prompts, in the order of the data, for
groups whose rewards are all equal, which are left out. Each round takes as many as are lacking, never more. So a batch
of n prompts is the shortest piece of the data that has n groups with something to learn (or that of the last round that
is allowed), whatever finishes first: every prompt is consumed once, the next batch begins where this one ended, and a
resumed run takes the same ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_ultraep.runtime import ranges
from rl.algorithms.shaping import informative
from rl.data.dataset import Cursor, PromptDataset
from rl.orchestration.experience import RefusedSamples, refuse
from rl.orchestration.staleness import Staleness, StalenessAccountant
from rl.rewards.runner import RewardRunner
from rl.rollout.streams import GroupStream
from rl.rollout.validation import RefusedSample
from rl.types import Prompt, Sample

Generate = Callable[[Sequence[Prompt]], GroupStream]
"""Starts generation of prompts and returns at once."""

_POLL_S = 0.2  # between looks at whether a feed is being closed


class NothingToLearn(RuntimeError):
    """No group of a batch had rewards that differ, in all rounds of dynamic sampling."""


@dataclass(frozen=True)
class Filled:
    """How dynamic sampling filled a batch.

    Attributes:
        rounds: of generation, the first included.
        dropped: uids of the prompts whose groups were left out, in the order of the data.
        lacking: groups that are missing after the last round.
        reward_mean: of all samples with a reward, those of groups that were left out included.
        dropped_reward_mean: of those that were left out; 0 without any.
    """

    rounds: int
    dropped: tuple[str, ...]
    lacking: int
    reward_mean: float
    dropped_reward_mean: float

    def to_json(self) -> dict[str, Any]:
        """For the ledger."""
        return {"rounds": self.rounds, "dropped": list(self.dropped), "lacking": self.lacking}

    def metrics(self) -> dict[str, float]:
        """Under the names of ``rl.metrics``."""
        name = "rollout/dynamic_sampling"
        return {
            f"{name}/rounds": float(self.rounds),
            f"{name}/dropped_groups": float(len(self.dropped)),
            f"{name}/lacking_groups": float(self.lacking),
            f"{name}/reward_mean": self.reward_mean,
            f"{name}/dropped_reward_mean": self.dropped_reward_mean,
        }


@dataclass
class Batch:
    """One training step's prompts, and their groups as they arrive, rewarded.

    Attributes:
        number: from 0; training step ``number + 1`` takes it.
        prompts: in the order of the data; with dynamic sampling more may follow while the batch is ``growing``.
        after: cursor after them.
        stream: where their groups come from.
        reward_seconds: that rewards took so far; they run beside generation.
        began, completed: when it was started, and when its last group was there; seconds of ``time.time()``, 0 before.
        growing: more prompts may follow, so it is not complete.
        filled: how it was filled; None without dynamic sampling, or before.
    """

    number: int
    prompts: tuple[Prompt, ...]
    after: Cursor
    stream: GroupStream
    limit_s: float
    reward_seconds: float = 0.0
    began: float = field(default_factory=time.time)
    completed: float = 0.0
    growing: bool = False
    filled: Filled | None = None
    _early: dict[str, Sample] = field(default_factory=dict)
    _arrived: dict[str, list[Sample]] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _error: BaseException | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def all(self) -> list[Sample]:
        """Every sample, in the order of prompts, but those that were left out; waits until the batch is complete.

        Raises:
            RefusedSamples: an engine gave up on a sample. Also whatever generation or rewards raised.
        """
        self._wait(lambda: self.complete, ())
        left_out = set() if self.filled is None else set(self.filled.dropped)
        groups = self._wait(lambda: True, [p.uid for p in self.prompts if p.uid not in left_out])
        return [sample for group in groups for sample in group]

    def wait_for(self, tokens: int) -> None:
        """Wait until groups of so many tokens have come, or the whole batch."""

        def enough() -> bool:
            here = self._arrived.values()
            return len(here) == len(self.prompts) or sum(s.length for group in here for s in group) >= tokens

        self._wait(enough, ())

    def chunks(self, wanted: Sequence[Prompt], tokens: int) -> Iterator[list[Sample]]:
        """The groups of some prompts in chunks of at least ``tokens`` tokens (the last may be smaller), as they arrive.

        Groups of a chunk are in the order of prompts. Each wait ends when enough has come.
        """
        left = [p.uid for p in wanted]

        def enough() -> bool:
            here = [self._arrived[uid] for uid in left if uid in self._arrived]
            return len(here) == len(left) or sum(s.length for group in here for s in group) >= tokens

        while left:
            groups = self._wait(enough, left)
            taken = {group[0].prompt.uid for group in groups}
            left = [uid for uid in left if uid not in taken]
            yield [sample for group in groups for sample in group]

    @property
    def complete(self) -> bool:
        """Whether every group is here, rewarded, and no more will follow."""
        return not self.growing and len(self._arrived) == len(self.prompts)

    def finished(self) -> list[Sample]:
        """Samples that have ended: of groups that are here, and those that came ahead of their groups, unrewarded."""
        early = self.stream.take_early()
        with self._changed:
            self._early |= {sample.sample_id: sample for sample in early}
            here = {sample.sample_id: sample for group in self._arrived.values() for sample in group}
        return list((self._early | here).values())

    def wait_a_little(self, seconds: float, deadline: float) -> None:
        """Until a group comes, or so many seconds.

        Args:
            seconds: to wait at most.
            deadline: seconds of ``time.monotonic()`` at which a batch that is not complete has failed.

        Raises:
            TimeoutError: past the deadline. Also whatever generation or rewards raised.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            if not self.complete:
                if time.monotonic() > deadline:
                    raise self._late()
                self._changed.wait(seconds)

    def _late(self) -> TimeoutError:
        return TimeoutError(
            f"batch {self.number}: no more groups came within {self.limit_s:g} s, {len(self._arrived)} of "
            f"{len(self.prompts)} prompts are here; raise run.limits.generate_s"
        )

    def _wait(self, enough: Callable[[], bool], wanted: Collection[str]) -> list[list[Sample]]:
        deadline = time.monotonic() + self.limit_s
        with self._changed:
            while not enough():
                if self._error is not None:
                    raise self._error
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._late()
                self._changed.wait(left)
            found = [self._arrived[uid] for uid in wanted if uid in self._arrived and uid not in self._taken]
            self._taken |= {group[0].prompt.uid for group in found}
            return found

    def put(self, samples: Sequence[Sample]) -> None:
        """Rewarded samples of whole groups have come."""
        with self._changed:
            for sample in samples:
                self._arrived.setdefault(sample.prompt.uid, []).append(sample)
            if self.complete:
                self.completed = time.time()
            self._changed.notify_all()

    def grow(self, prompts: Sequence[Prompt], after: Cursor, stream: GroupStream) -> None:
        """Further prompts have been taken."""
        with self._changed:
            self.prompts, self.after, self.stream = (*self.prompts, *prompts), after, stream

    def fill(self, filled: Filled) -> None:
        """No more prompts follow."""
        with self._changed:
            self.filled, self.growing, self.completed = filled, False, time.time()
            self._changed.notify_all()

    def dull(self) -> tuple[str, ...]:
        """Uids of prompts whose groups have come with rewards that are all equal, in the order of prompts."""
        with self._changed:
            here = {uid: [s.reward for s in group if s.reward is not None] for uid, group in self._arrived.items()}
        return tuple(p.uid for p in self.prompts if p.uid in here and not informative(torch.tensor(here[p.uid])))

    def rewards(self, uids: Collection[str] | None = None) -> list[float]:
        """Of samples that have come and have one; of these prompts, or of all."""
        with self._changed:
            groups = [group for uid, group in self._arrived.items() if uids is None or uid in uids]
        return [sample.reward for group in groups for sample in group if sample.reward is not None]

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


class Feed:
    """Starts batches as the accountant allows, collects and rewards their groups in the background.

    Args:
        data: training prompts.
        cursor: of the first prompt to take.
        size: prompts of one batch.
        total: prompts that may still be taken.
        generate: starts generation.
        reward: scores samples.
        accountant: of staleness.
        limit_s: of every wait for groups (s).
        max_rounds: of dynamic sampling; None: batches have the prompts that they begin with.
    """

    def __init__(
        self,
        data: PromptDataset,
        cursor: Cursor,
        *,
        size: int,
        total: int,
        generate: Generate,
        reward: RewardRunner,
        accountant: StalenessAccountant,
        limit_s: float,
        max_rounds: int | None = None,
    ) -> None:
        self.accountant = accountant
        self.filled: Filled | None = None  # of the batch that was trained on last
        self._max_rounds = max_rounds
        self._data, self._cursor, self._size, self._left = data, cursor, size, total
        self._generate, self._reward, self._limit_s = generate, reward, limit_s
        self._batches: deque[Batch] = deque()
        self._lock = threading.Lock()  # admission, by the loop and when weights have arrived
        self._scoring = threading.Lock()  # a reward runner serves one thread at a time
        self._closed = False

    def admit(self) -> int:
        """Start every batch that may start now; returns how many. Any thread may call it."""
        started = 0
        with self._lock:
            while not self._closed and self._left > 0 and self.accountant.may_admit():
                prompts, after = self._data.batch(self._cursor, min(self._size, self._left))
                number = self.accountant.admit()
                batch = Batch(number, prompts, after, self._generate(prompts), self._limit_s)
                batch.growing = self._max_rounds is not None
                self._cursor, self._left = after, self._left - len(prompts)
                self._batches.append(batch)
                threading.Thread(target=self._collect, args=(batch,), name=f"batch {number}", daemon=True).start()
                started += 1
        return started

    @property
    def empty(self) -> bool:
        """Whether no batch is under way."""
        with self._lock:
            return not self._batches

    def oldest(self) -> Batch:
        """The batch that the next training step takes.

        Raises:
            RuntimeError: none was started.
        """
        with self._lock:
            if not self._batches:
                raise RuntimeError("no batch was started: call admit() after engines have the newest weights")
            return self._batches[0]

    def trained(self) -> None:
        """The oldest batch was trained on."""
        with self._lock:
            self.filled = self._batches.popleft().filled
            self.accountant.completed()

    def measure(self, batch: Batch, samples: Sequence[Sample]) -> Staleness:
        """See ``StalenessAccountant.measure``."""
        with self._lock:
            return self.accountant.measure(batch.number, samples)

    def announce(self, version: int, steps: int) -> None:
        """See ``StalenessAccountant.announce``."""
        with self._lock:
            self.accountant.announce(version, steps)

    def delivered(self, version: int, steps: int) -> None:
        """All engines have the weights of a step: admit what they allow."""
        with self._lock:
            self.accountant.delivered(version, steps)

    def _collect(self, batch: Batch) -> None:
        try:
            self._receive(batch)
            if self._max_rounds is not None:
                self._fill(batch, self._max_rounds)
        except BaseException as error:
            batch.fail(error)

    def _receive(self, batch: Batch) -> None:
        """The groups of the batch's stream, rewarded, until it ends."""
        for group in batch.stream:
            groups = [group]
            while batch.stream.ready:  # what came while rewards were computed is scored together
                more = batch.stream.next(_POLL_S)
                if more is None:
                    break
                groups.append(more)
            refused = [s for g in groups for s in g if isinstance(s, RefusedSample)]
            if refused:
                raise refuse(refused)
            samples = [s for g in groups for s in g if isinstance(s, Sample)]
            started = time.perf_counter()
            with self._scoring, ranges.span("reward"):
                scored = self._reward.score(samples)
            batch.reward_seconds += time.perf_counter() - started
            batch.put(scored)

    def _fill(self, batch: Batch, max_rounds: int) -> None:
        """Take further prompts until as many groups as the batch began with have rewards that differ.

        Raises:
            NothingToLearn: none has, after the last round.
        """
        wanted, rounds = len(batch.prompts), 1
        while (lacking := wanted - len(batch.prompts) + len(dropped := batch.dull())) and rounds < max_rounds:
            with self._lock:
                if self._closed:
                    return
                prompts, after = self._data.batch(self._cursor, lacking)
                batch.grow(prompts, after, self._generate(prompts))
                self._cursor, rounds = after, rounds + 1
            self._receive(batch)
        if lacking == wanted:
            raise NothingToLearn(
                f"batch {batch.number}: the rewards of every group were equal, of {len(batch.prompts)} prompts in "
                f"{rounds} rounds (algorithm.dynamic_sampling.max_rounds), first {batch.prompts[0].uid}, whose rewards "
                f"are {batch.rewards({batch.prompts[0].uid})[:8]}. Problems are too hard or too easy for the model, or "
                "the reward says the same of everything: look at samples, or raise max_rounds"
            )
        batch.fill(Filled(rounds, dropped, lacking, _mean(batch.rewards()), _mean(batch.rewards(set(dropped)))))

    def close(self) -> None:
        """Abort what is generated and start nothing more."""
        with self._lock:
            self._closed = True
            batches = list(self._batches)
        for batch in batches:
            batch.stream.close()
            batch.fail(RuntimeError("the run is closing"))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


__all__ = ["Batch", "Feed", "Filled", "NothingToLearn", "RefusedSamples"]
