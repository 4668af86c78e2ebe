"""Streams of groups without engines behind them."""

import time

import numpy as np
import pytest

from rl.rollout.engine import EngineTimeout
from rl.rollout.streams import GroupStream, make_groups
from rl.types import Prompt

PROMPTS = [Prompt(f"train/0/{i}", i, 0, "", np.arange(3, dtype=np.int32)) for i in range(2)]


def stream(groups=3, buffer_groups=None):
    calls = []
    made = GroupStream(
        groups, buffer_groups, 0.01, lambda: 0.0, lambda: calls.append("wake"), lambda s: calls.append("close")
    )
    return made, calls


def test_groups_have_ids_by_prompt():
    groups = make_groups(PROMPTS, 3)
    assert [group.sample_ids for group in groups] == [tuple(f"train/0/{i}/{k}" for k in range(3)) for i in range(2)]
    with pytest.raises(ValueError, match="n_samples"):
        make_groups(PROMPTS, 0)


def test_counts_follow_a_group():
    made, calls = stream(2, buffer_groups=1)
    made.started()
    made.started()
    made.returned()
    assert (made.waiting, made.running, made.ready, made.has_room) == (1, 1, 0, True)
    assert not made.put([])
    assert (made.waiting, made.running, made.ready, made.has_room) == (1, 0, 1, False)
    assert made.next() == []
    assert calls == ["wake"]
    with pytest.raises(EngineTimeout, match=r"within 0\.01 s: 0 are at engines, 1 wait"):
        made.next()
    made.started()
    assert made.put([])
    assert list(made) == [[]]
    assert made.next() is None


def test_a_stream_waits_while_others_get_groups():
    finished = time.monotonic() + 0.05
    made = GroupStream(1, None, 0.01, lambda: min(time.monotonic(), finished), lambda: None, lambda s: None)
    with pytest.raises(EngineTimeout):
        made.next()
    assert time.monotonic() >= finished


def test_an_error_comes_before_what_is_ready():
    made, _ = stream()
    made.started()
    made.put([])
    made.end(ArithmeticError("broken"))
    made.end(None)
    with pytest.raises(ArithmeticError, match="broken"):
        next(made)


def test_closing_is_told_once_and_only_if_something_was_left():
    made, calls = stream(2)
    with made:
        made.started()
        made.put([])
    made.close()
    made.put([])
    assert calls == ["close"]
    assert (made.next(), made.ready) == (None, 0)
    made, calls = stream(1)
    made.started()
    made.put([])
    made.close()
    assert calls == []
    assert made.next() is None
