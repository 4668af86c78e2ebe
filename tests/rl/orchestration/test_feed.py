"""Dynamic sampling: which prompts a batch takes, whatever finishes first, and what is said when there is nothing."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from rl.data.dataset import Cursor
from rl.orchestration.feed import Feed, NothingToLearn
from rl.orchestration.staleness import StalenessAccountant
from rl.types import Prompt, Sample

EPOCH = 10


class Prompts:
    """As many of a ``PromptDataset``'s methods as a feed asks for; an epoch has ten prompts."""

    def batch(self, cursor: Cursor, size: int) -> tuple[tuple[Prompt, ...], Cursor]:
        first = cursor.epoch * EPOCH + cursor.ordinal
        places = [divmod(i, EPOCH) for i in range(first, first + size)]
        prompts = tuple(Prompt(f"train/{e}/{o}", o, e, "", np.ones(1, np.int32)) for e, o in places)
        return prompts, Cursor(*divmod(first + size, EPOCH))


class Stream:
    """Groups of two samples, in an order of its own."""

    def __init__(self, prompts, order: random.Random) -> None:
        self.groups = [[sample(p, k) for k in range(2)] for p in prompts]
        order.shuffle(self.groups)
        self.closed = False

    @property
    def ready(self) -> int:
        return len(self.groups) if len(self.groups) % 2 else 0  # some groups come one by one, some together

    def next(self, timeout_s: float):
        return self.groups.pop() if self.groups else None

    def __iter__(self):
        while self.groups and not self.closed:
            time.sleep(0.001)
            yield self.groups.pop()

    def close(self) -> None:
        self.closed = True


def sample(prompt: Prompt, k: int) -> Sample:
    return Sample(
        sample_id=f"{prompt.uid}/{k}",
        prompt=prompt,
        response_tokens=np.ones(2, np.int32),
        rollout_logprobs=np.zeros(2, np.float32),
        weight_versions=((0, 1),),
        finish_reason="stop",
        routes=None,
        histogram=None,
    )


class Rewards:
    """1 for every sample, and 0 for the first of prompts whose place in the data is in ``differ``; none where it is in
    ``failed``."""

    def __init__(self, differ, failed=()) -> None:
        self.differ, self.failed = set(differ), set(failed)

    def score(self, samples):
        return [self._one(s) for s in samples]

    def _one(self, one: Sample) -> Sample:
        place = one.prompt.epoch * EPOCH + one.prompt.ordinal
        first = one.sample_id.endswith("/0")
        reward = 0.0 if place in self.differ and first else 1.0
        return replace(one, reward=None if place in self.failed and first else reward)


def feed_of(rewards: Rewards, *, size=3, max_rounds=10, seed=0, cursor=None, streams=None) -> Feed:
    order = random.Random(seed)

    def generate(prompts):
        stream = Stream(prompts, order)
        if streams is not None:
            streams.append(len(prompts))
        return stream

    return Feed(
        Prompts(),
        cursor or Cursor(),
        size=size,
        total=1000,
        generate=generate,
        reward=rewards,
        accountant=StalenessAccountant(0),
        limit_s=30.0,
        max_rounds=max_rounds,
    )


def take(feed: Feed):
    """One batch, as the loop takes it."""
    feed.admit()
    batch = feed.oldest()
    samples = batch.all()
    feed.trained()
    feed.delivered(feed.accountant.trained, feed.accountant.trained)
    return batch, [s.sample_id for s in samples]


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_the_shortest_piece_of_the_data_with_enough_groups(seed):
    sizes: list[int] = []
    feed = feed_of(Rewards({1, 4, 5, 6, 7, 13, 14}), seed=seed, streams=sizes)
    batch, samples = take(feed)
    assert [p.ordinal for p in batch.prompts] == [0, 1, 2, 3, 4, 5]
    assert samples == [f"train/0/{o}/{k}" for o in (1, 4, 5) for k in range(2)]
    assert sizes == [3, 2, 1]  # as many as lack, never more
    assert batch.after == Cursor(0, 6)
    assert feed.filled == batch.filled
    assert batch.filled.to_json() == {"rounds": 3, "dropped": ["train/0/0", "train/0/2", "train/0/3"], "lacking": 0}
    assert batch.filled.metrics()["rollout/dynamic_sampling/reward_mean"] == pytest.approx(9 / 12)
    assert batch.filled.metrics()["rollout/dynamic_sampling/dropped_reward_mean"] == 1.0
    assert batch.complete
    assert batch.completed > 0
    # The next begins where this one ended, over the end of the epoch.
    following, samples = take(feed)
    assert [(p.epoch, p.ordinal) for p in following.prompts] == [divmod(i, EPOCH) for i in range(6, 14)]
    assert [s.rsplit("/", 1)[0] for s in samples[::2]] == ["train/0/6", "train/0/7", "train/1/3"]


def test_resuming_takes_the_same_prompts():
    rewards = Rewards({1, 4, 5, 8, 9, 12, 15, 16, 19})
    feed = feed_of(rewards)
    taken = [take(feed) for _ in range(3)]
    again = feed_of(rewards, seed=9, cursor=taken[0][0].after)
    for batch, samples in taken[1:]:
        resumed, of_resumed = take(again)
        assert [p.uid for p in resumed.prompts] == [p.uid for p in batch.prompts]
        assert of_resumed == samples


def test_the_last_round_may_leave_groups_lacking():
    feed = feed_of(Rewards({1}), max_rounds=2)
    batch, samples = take(feed)
    assert len(batch.prompts) == 5
    assert samples == ["train/0/1/0", "train/0/1/1"]
    assert batch.filled.lacking == 2
    assert batch.filled.metrics()["rollout/dynamic_sampling/lacking_groups"] == 2


def test_a_group_with_a_single_reward_has_nothing_to_compare():
    batch, samples = take(feed_of(Rewards({0, 1, 2, 3}, failed={0})))
    assert batch.filled.dropped == ("train/0/0",)
    assert len(samples) == 6


def test_nothing_to_learn_is_an_error_that_says_what_to_look_at():
    feed = feed_of(Rewards(set()), max_rounds=3)
    feed.admit()
    with pytest.raises(NothingToLearn, match=r"9 prompts in 3 rounds.*first train/0/0, whose rewards are \[1.0, 1.0\]"):
        feed.oldest().all()


def test_without_dynamic_sampling_every_group_is_kept():
    batch, samples = take(feed_of(Rewards({1}), max_rounds=None))
    assert len(batch.prompts) == 3
    assert len(samples) == 6
    assert batch.filled is None


def test_closing_ends_the_rounds():
    started = threading.Event()

    class Slow(Rewards):
        def score(self, samples):
            started.set()
            time.sleep(0.05)
            return super().score(samples)

    feed = feed_of(Slow(set()), max_rounds=10**6)
    feed.admit()
    batch = feed.oldest()
    assert started.wait(10)
    feed.close()
    with pytest.raises(RuntimeError, match="is closing"):
        batch.all()
    time.sleep(0.3)
    taken = len(batch.prompts)
    time.sleep(0.3)
    assert len(batch.prompts) == taken
