"""Which engines keep the tail of generation."""

from __future__ import annotations

import numpy as np
import pytest

from rl.rollout.tail import Held, TailRule, plan_tail, seats_within

RULE = TailRule(threshold=16, seats=8, kv_tokens=1000, longest=100)


@pytest.mark.parametrize(
    ("unfinished", "seats", "kv_tokens", "engines"), [(1, 8, 1000, 1), (8, 8, 1000, 1), (9, 8, 1000, 2), (8, 8, 300, 3)]
)
def test_engines_by_seats_and_by_memory(unfinished: int, seats: int, kv_tokens: int, engines: int) -> None:
    rule = TailRule(threshold=16, seats=seats, kv_tokens=kv_tokens, longest=100)
    assert rule.engines(unfinished) == engines


def test_the_engine_with_most_work_keeps_its_samples() -> None:
    held = [Held(0, 0, (50,), 50.0), Held(1, 1, (10, 10), 180.0), Held(2, 2, (90,), 10.0)]
    plan = plan_tail(held, [0, 1, 2, 3], RULE)
    assert (plan.kept, plan.freed) == ((1,), (0, 2, 3))
    assert plan.moves == {0: 1, 2: 1}


def test_never_more_engines_than_there_are() -> None:
    plan = plan_tail([Held(0, 0, (1,) * 16, 16.0)], [0], RULE)
    assert (plan.kept, plan.freed, plan.moves) == ((0,), (), {})


def test_random_plans_are_whole_and_even() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        engines = sorted(rng.choice(50, int(rng.integers(1, 12)), replace=False).tolist())
        held = [
            Held(order, int(rng.choice(engines)), tuple(rng.integers(0, 90, int(rng.integers(1, 4)))), rng.random())
            for order in range(int(rng.integers(1, 20)))
        ]
        unfinished = sum(len(one.tokens) for one in held)
        plan = plan_tail(held, engines, RULE)
        assert sorted(plan.kept + plan.freed) == engines
        assert len(plan.kept) == min(RULE.engines(unfinished), len(engines))
        assert {one.order for one in held if one.engine in plan.freed} == set(plan.moves)
        assert set(plan.moves.values()) <= set(plan.kept)
        work = {index: sum(one.remaining for one in held if one.engine == index) for index in engines}
        assert min(work[i] for i in plan.kept) >= max((work[i] for i in plan.freed), default=0.0)


def test_seats_by_latency() -> None:
    assert seats_within(lambda running: 1.0 + 0.1 * running, 64) == 12
    assert seats_within(lambda running: float(running), 64, slowdown=1.0) == 1
    assert seats_within(lambda running: 1.0, 64) == 64
    with pytest.raises(ValueError, match="seats >= 1"):
        seats_within(lambda running: 1.0, 0)


def test_a_rule_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"threshold must be >= 1, got 0; .*poll_s must be > 0"):
        TailRule(threshold=0, seats=1, kv_tokens=1, longest=1, poll_s=0)
