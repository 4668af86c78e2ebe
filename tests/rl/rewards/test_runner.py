"""Rewards of many samples: order, limits, and failures that stay with their sample."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from rl.rewards.loading import Reward
from rl.rewards.runner import RewardRunner


def runner(function, args=None, **settings) -> RewardRunner:
    reward = Reward("m:f", function, "sample", asyncio.iscoroutinefunction(function))
    return RewardRunner(reward, args, **{"timeout_s": 20.0, **settings})


def as_async(function):
    async def call(sample, args):
        await asyncio.sleep(0)
        return function(sample, args)

    return call


def length(sample, args):
    return len(sample.response_text) + args["plus"]


@pytest.mark.parametrize("function", [length, as_async(length)], ids=["sync", "async"])
def test_scores_come_in_order_and_samples_are_new(function, make_sample):
    samples = [make_sample("x" * n, index=n) for n in range(40)]
    scored = runner(function, {"plus": 0.5}, concurrency=7).score(samples)
    assert [s.reward for s in scored] == [n + 0.5 for n in range(40)]
    assert [s.sample_id for s in scored] == [s.sample_id for s in samples]
    assert all(s.reward_error is None for s in scored)
    assert all(s.reward is None for s in samples)
    assert runner(function).score([]) == []


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError


def misbehave(sample, args):
    what = sample.response_text
    if what == "raise":
        raise KeyError("gone")
    if what == "exit":
        sys.exit(3)
    if what == "cancelled":
        raise asyncio.CancelledError
    if what == "unreadable":
        raise Unreadable
    if what == "long":
        raise ValueError("x" * 10_000)
    values = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "none": None,
        "text": "1.0",
        "list": [1.0],
        "huge": 10**400,
    }
    return values.get(what, 1.0)


FAILURES = {
    "raise": "KeyError: 'gone'",
    "exit": "SystemExit: 3",
    "cancelled": "CancelledError",
    "unreadable": "Unreadable: (its message cannot be read)",
    "long": "ValueError: xxx",
    "nan": "ValueError: expected a finite number, got nan",
    "inf": "ValueError: expected a finite number, got inf",
    "none": "TypeError: expected a number, got NoneType",
    "text": "TypeError: expected a number, got str: '1.0'",
    "list": "TypeError: expected a number, got list",
    "huge": "OverflowError",
}


@pytest.mark.parametrize("on_error", ["zero", "drop"])
@pytest.mark.parametrize("function", [misbehave, as_async(misbehave)], ids=["sync", "async"])
def test_a_failure_is_one_samples_error(function, on_error, make_sample):
    responses = [text for failure in FAILURES for text in ("fine", failure)]
    samples = [make_sample(text, metadata={"origin": f"x.jsonl:{n}"}) for n, text in enumerate(responses)]
    scored = runner(function, on_error=on_error).score(samples)
    for n, (text, sample) in enumerate(zip(responses, scored, strict=True)):
        if text == "fine":
            assert (sample.reward, sample.reward_error) == (1.0, None)
        else:
            assert sample.reward == (0.0 if on_error == "zero" else None)
            assert sample.reward_error.startswith(FAILURES[text])
            assert sample.reward_error.endswith(f"(prompt from x.jsonl:{n})")
            assert len(sample.reward_error) < 1100


@pytest.mark.parametrize(
    "value",
    [1, True, np.True_, np.float32(1), np.array(1.0), torch.tensor(1.0), Fraction(2, 2), {"score": 1.0, "acc": True}],
)
def test_numbers_of_all_kinds(value, make_sample):
    (scored,) = runner(lambda sample, args: value).score([make_sample("")])
    assert scored.reward == 1.0
    assert type(scored.reward) is float


def test_a_coroutine_from_a_plain_function(make_sample):
    (scored,) = runner(lambda sample, args: as_async(length)(sample, args)).score([make_sample("")])
    assert "declare the reward with async def" in scored.reward_error


def slow_sync(sample, args):
    if sample.response_text == "hang":
        args["release"].wait(60)
    return 1.0


async def slow_async(sample, args):
    if sample.response_text == "hang":
        await asyncio.sleep(60)
    return 1.0


async def deaf_async(sample, args):
    while sample.response_text == "hang" and not args["release"].is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue
    return 1.0


@pytest.mark.parametrize("function", [slow_sync, slow_async, deaf_async])
def test_the_time_limit_takes_only_those_that_hang(function, make_sample):
    release = threading.Event()
    texts = ["fine", "hang", "fine", "hang", "fine", "fine"]
    started = time.monotonic()
    scored = runner(function, {"release": release}, timeout_s=0.5, concurrency=2).score([make_sample(t) for t in texts])
    assert time.monotonic() - started < 10
    release.set()
    for text, sample in zip(texts, scored, strict=True):
        if text == "hang":
            assert sample.reward == 0.0
            assert "TimeoutError: no reward from m:f within 0.5 s" in sample.reward_error
        else:
            assert (sample.reward, sample.reward_error) == (1.0, None)


def test_a_coroutine_that_blocks_the_loop_is_named_and_left_behind(make_sample):
    release = threading.Event()

    async def blocking(sample, args):
        if sample.response_text == "hang":
            release.wait(60)
        return 1.0

    rewards = runner(blocking, timeout_s=0.5, concurrency=1)
    scored = rewards.score([make_sample(text) for text in ("hang", "fine", "fine")])
    release.set()
    assert "blocks its event loop" in scored[0].reward_error
    assert [s.reward for s in scored] == [0.0, 1.0, 1.0]
    rewards.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_concurrency_is_used_and_limited(asynchronous, make_sample):
    lock, running, most = threading.Lock(), 0, 0

    def enter(change):
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    def sync(sample, args):
        enter(1)
        time.sleep(0.05)
        enter(-1)
        return 1.0

    async def coroutine(sample, args):
        enter(1)
        await asyncio.sleep(0.05)
        enter(-1)
        return 1.0

    runner(coroutine if asynchronous else sync, concurrency=4).score([make_sample("")] * 12)
    assert most == 4


def test_async_calls_share_one_loop(make_sample):
    """So that a session or a semaphore made in one call can be used in the next."""
    loops = []

    async def remember(sample, args):
        loops.append(asyncio.get_running_loop())
        return 1.0

    rewards = runner(remember)
    rewards.score([make_sample("")] * 3)
    rewards.score([make_sample("")] * 3)
    assert len(loops) == 6
    assert len(set(loops)) == 1
    rewards.close()


def test_refusals():
    for settings, expected in [
        ({"concurrency": 0}, "at least 1"),
        ({"timeout_s": 0}, "> 0 seconds"),
        ({"on_error": "ignore"}, "zero or drop"),
    ]:
        with pytest.raises(ValueError, match=expected):
            runner(length, **settings)


def group_runner(function, style="samples", key=None, **settings) -> RewardRunner:
    reward = Reward("m:f", function, style, asyncio.iscoroutinefunction(function), key=key)
    return RewardRunner(reward, {}, **{"timeout_s": 20.0, **settings})


def misbehave_in_groups(samples, args):
    values = [misbehave(sample, args) for sample in samples]
    return values[:-1] if any(sample.response_text == "short" for sample in samples) else values


async def misbehave_in_groups_async(samples, args):
    return misbehave_in_groups(samples, args)


@pytest.mark.parametrize("function", [misbehave_in_groups, misbehave_in_groups_async], ids=["sync", "async"])
def test_groups_are_called_at_once_and_fail_on_their_own(function, make_sample):
    groups = [["fine", "nan", "fine"], ["fine", "raise"], ["short", "fine"], ["fine", "fine"]]
    samples = [make_sample(text, index=index) for index, texts in enumerate(groups) for text in texts]
    # A group's samples need not be neighbours.
    samples = samples[::2] + samples[1::2]
    scored = {
        index: [sample for sample in group_runner(function).score(samples) if sample.prompt.ordinal == index]
        for index in range(4)
    }
    assert sorted(sample.reward for sample in scored[0]) == [0.0, 1.0, 1.0]
    (bad,) = [sample for sample in scored[0] if sample.reward_error]
    assert (bad.response_text, bad.reward_error) == ("nan", "ValueError: expected a finite number, got nan")
    assert {sample.reward_error for sample in scored[1]} == {"KeyError: 'gone'"}
    assert {sample.reward_error for sample in scored[2]} == {
        "ValueError: expected 2 rewards, one for each sample, got 1"
    }
    assert [sample.reward for sample in scored[3]] == [1.0, 1.0]


def test_what_groups_may_return(make_sample):
    samples = [make_sample("a"), make_sample("b")]
    for value in ([1, 2.0], (1, 2), np.array([1, 2]), torch.tensor([1.0, 2.0]), [{"score": 1}, {"score": 2}]):
        scored = group_runner(lambda samples, args, value=value: value).score(samples)
        assert [sample.reward for sample in scored] == [1.0, 2.0]
    (first, _) = group_runner(lambda samples, args: 1.0).score(samples)
    assert "expected a list of rewards, got float" in first.reward_error


def test_a_group_that_hangs_costs_its_group(make_sample):
    release = threading.Event()

    def hang(samples, args):
        if samples[0].response_text == "hang":
            release.wait(60)
        return [1.0] * len(samples)

    samples = [make_sample(text, index=index) for index, text in enumerate(["hang", "fine"]) for _ in range(2)]
    scored = group_runner(hang, timeout_s=0.5).score(samples)
    release.set()
    assert [sample.reward for sample in scored] == [0.0, 0.0, 1.0, 1.0]
    assert all("within 0.5 s" in sample.reward_error for sample in scored[:2])


def test_mappings_and_keys(make_sample):
    def call(value, key=None):
        (sample,) = group_runner(lambda sample, args: value, "sample", key).score([make_sample("")])
        return sample.reward_error or sample.reward

    assert call({"score": 2, "acc": 1}) == 2.0
    assert call({"score": 2, "acc": 1}, "acc") == 1.0
    assert (
        call({"acc": 1})
        == "ValueError: expected a mapping with 'score', got one with acc; set reward_key in reward.args"
    )
    assert "expected a mapping with 'x', got one with score" in call({"score": 1}, "x")
