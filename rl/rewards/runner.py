"""Rewards of many samples at once, each with a time limit.

1. At most ``concurrency`` calls run at a time; a call's time limit starts with the call. A call is for one sample, or,
   if the function takes groups, for all samples of one prompt.
2. A synchronous function runs in a thread of its own; a coroutine runs on one event loop that all calls share.
3. Whatever goes wrong in a call (an exception, the time limit, a result that is no finite number) ends up in the
   ``reward_error`` of its sample or samples; the others are not touched.
4. ``score`` returns within about the time limit x ceil(samples / concurrency), whatever the functions do: a call past
   its limit is left behind. A coroutine is cancelled; a thread cannot be, so it runs on until it returns, or the
   process ends. Only code that never releases the interpreter's lock (a runaway regular expression) can hold up the
   caller.
"""

from __future__ import annotations

import asyncio
import math
import numbers
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from rl.rewards.loading import Reward, RewardLoadError, load_reward
from rl.types import Sample

__all__ = ["OnError", "Reward", "RewardLoadError", "RewardRunner", "load_reward"]

OnError = Literal["zero", "drop"]
Outcome = float | str | list[float | str]
"""Of a call: a reward, what went wrong, or one of both for each sample of a group."""

T = TypeVar("T")
MAX_ERROR_CHARACTERS = 1000
LOOP_ANSWER_S = 1.0


class RewardRunner:
    """Calls one reward function for batches of samples. Not for use from several threads at once."""

    def __init__(
        self,
        reward: Reward,
        args: Mapping[str, Any] | None = None,
        *,
        concurrency: int = 16,
        timeout_s: float = 30.0,
        on_error: OnError = "zero",
    ) -> None:
        """Nothing is started yet.

        Args:
            reward: from ``load_reward``.
            args: given to every call.
            concurrency: calls at a time, >= 1.
            timeout_s: seconds for one call, > 0.
            on_error: reward of a sample whose call failed: ``"zero"``: 0.0; ``"drop"``: None, so that it can be left
                out of training.

        Raises:
            ValueError: a setting out of range.
        """
        if concurrency < 1:
            raise ValueError(f"expected a concurrency of at least 1, got {concurrency}")
        if not timeout_s > 0:
            raise ValueError(f"expected a time limit > 0 seconds, got {timeout_s}")
        if on_error not in ("zero", "drop"):
            raise ValueError(f"expected on_error zero or drop, got {on_error!r}")
        self._reward = reward
        self._args = dict(args or {})
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._on_error = on_error
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples in the same order, with ``reward`` set, and ``reward_error`` where the call failed."""
        scored: list[Sample | None] = [None] * len(samples)
        calls = self._calls(samples)
        running: dict[Future[Any], tuple[list[int], float]] = {}
        started = 0
        while started < len(calls) or running:
            while started < len(calls) and len(running) < self._concurrency:
                future = self._start([samples[index] for index in calls[started]])
                running[future] = (calls[started], time.monotonic() + self._timeout_s)
                started += 1
            first_deadline = min(deadline for _, deadline in running.values())
            done, _ = wait(running, max(0.0, first_deadline - time.monotonic()), FIRST_COMPLETED)
            for future in done:
                indices, _ = running.pop(future)
                for index, outcome in zip(indices, _each(future.result(), len(indices)), strict=True):
                    scored[index] = self._finished(samples[index], outcome)
            for future in [f for f, (_, deadline) in running.items() if deadline <= time.monotonic()]:
                indices, _ = running.pop(future)
                error = self._give_up(future)
                for index in indices:
                    scored[index] = self._failed(samples[index], error)
        return [sample for sample in scored if sample is not None]

    def _calls(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Which samples each call is for: one, or all of one prompt."""
        if not self._reward.of_groups:
            return [[index] for index in range(len(samples))]
        groups: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(sample.prompt.uid, []).append(index)
        return list(groups.values())

    def close(self) -> None:
        """Stop the event loop, if there is one."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _start(self, samples: Sequence[Sample]) -> Future[Any]:
        """The future is that of an ``Outcome``; it never raises."""
        if self._reward.is_async:
            if self._loop is None:
                self._loop = _start_loop()
            return asyncio.run_coroutine_threadsafe(self._call_async(samples), self._loop)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # from here on a cancel is ignored: the thread will set its result

        def call() -> None:
            future.set_result(_outcome(lambda: self._numbers(self._reward.call(self._given(samples), self._args))))

        threading.Thread(target=call, name=f"reward {samples[0].sample_id}", daemon=True).start()
        return future

    async def _call_async(self, samples: Sequence[Sample]) -> Outcome:
        try:
            return self._numbers(await self._reward.call(self._given(samples), self._args))
        except BaseException as error:  # SystemExit too: it would end the loop that other calls run on
            return _error_text(error)

    def _given(self, samples: Sequence[Sample]) -> Sample | Sequence[Sample]:
        return samples if self._reward.of_groups else samples[0]

    def _numbers(self, value: Any) -> Outcome:
        """Of a call's result: its number, or those of a group, each or what is wrong with it."""
        if not self._reward.of_groups:
            return _number(value, self._reward.key)
        return [_outcome(partial(_number, item, self._reward.key)) for item in _items(value)]

    def _finished(self, sample: Sample, outcome: float | str) -> Sample:
        if isinstance(outcome, str):
            return self._failed(sample, outcome)
        return replace(sample, reward=outcome, reward_error=None)

    def _failed(self, sample: Sample, error: str) -> Sample:
        origin = sample.prompt.metadata.get("origin")
        place = f" (prompt from {origin})" if origin else ""
        return replace(sample, reward=0.0 if self._on_error == "zero" else None, reward_error=error + place)

    def _give_up(self, future: Future[Any]) -> str:
        """Leave a call behind that is past its limit; returns the error's text."""
        future.cancel()
        text = f"TimeoutError: no reward from {self._reward.path} within {self._timeout_s:g} s"
        if self._loop is not None and not _answers(self._loop):
            # A coroutine blocks the loop: the calls to come get another one.
            self._loop = None
            text += "; an async reward blocks its event loop: await in it, or make it a plain function"
        return text


def _outcome(call: Callable[[], T]) -> T | str:
    """What is returned, or the text of what was raised (SystemExit and the like included)."""
    try:
        return call()
    except BaseException as error:
        return _error_text(error)


def _each(outcome: Outcome, count: int) -> Sequence[float | str]:
    """The outcome of each of a call's samples."""
    if not isinstance(outcome, list):
        return [outcome] * count
    if len(outcome) != count:
        return [f"ValueError: expected {count} rewards, one for each sample, got {len(outcome)}"] * count
    return outcome


def _items(value: Any) -> list[Any]:
    """The rewards of a group.

    Raises:
        TypeError: not a list of them.
    """
    if asyncio.iscoroutine(value):
        _number(value)
    if hasattr(value, "tolist") and getattr(value, "ndim", None) == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a list of rewards, got {type(value).__qualname__}: {str(value)[:100]!r}")
    return list(value)


def _number(value: Any, key: str | None = None) -> float:
    """A reward as a float: numbers, booleans, numpy and torch scalars, and mappings with ``key`` (verl's ``score``).

    Raises:
        TypeError: not a number.
        ValueError: NaN or infinite, or a mapping without that key.
    """
    if isinstance(value, Mapping):
        name = key or "score"
        if name not in value:
            raise ValueError(
                f"expected a mapping with {name!r}, got one with {', '.join(sorted(map(str, value))) or 'nothing'}; "
                "set reward_key in reward.args"
            )
        value = value[name]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if asyncio.iscoroutine(value):
        value.close()
        raise TypeError("expected a number, got a coroutine; declare the reward with async def")
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected a number, got {type(value).__qualname__}: {str(value)[:100]!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {number}")
    return number


def _error_text(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be read)"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[: MAX_ERROR_CHARACTERS - 3] + "..."


def _start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_loop, args=(loop,), name="rewards", daemon=True).start()
    return loop


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop runs callbacks at the moment."""
    answered = threading.Event()
    loop.call_soon_threadsafe(answered.set)
    return answered.wait(LOOP_ANSWER_S)
