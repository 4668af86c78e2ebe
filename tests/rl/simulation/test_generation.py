import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.rollout.dispatch import get_dispatch
from rl.simulation.generation import Generation, SimGroup, lower_bound
from rl.simulation.lengths import LengthLaw, draw_groups, with_predictions

POLICIES = ("fcfs", "random", "longest_first", "skew_aware")


def step_seconds(running: int) -> float:
    return 0.01 + 0.001 * running


def make(name: str):
    return get_dispatch(name, **({"step_seconds": step_seconds} if name == "skew_aware" else {}))


def group(order: int, *lengths: int, prompt: int = 0) -> SimGroup:
    return SimGroup(f"p{order}", order, 0, prompt, lengths)


def generate(groups, engines=1, seats=4, name="fcfs", **more) -> tuple[list[tuple[float, SimGroup]], Generation]:
    generation = Generation(step_seconds, engines, seats, make(name), **more)
    generation.submit(groups)
    return generation.run(), generation


def stepwise(lengths: list[int], seats: int) -> float:
    """One engine, token by token."""
    queue, running, now = list(lengths), [], 0.0
    while queue or running:
        while queue and len(running) < seats:
            running.append(queue.pop(0))
        now += step_seconds(len(running))
        running = [left - 1 for left in running if left > 1]
    return now


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 6))
def test_the_same_as_token_by_token(lengths: list[int], seats: int) -> None:
    _, generation = generate([group(0, *lengths)], seats=seats)
    assert generation.now == pytest.approx(stepwise(lengths, seats), rel=1e-9)


def test_times_by_hand() -> None:
    # Two run for 10 steps, the longer one alone for 20 more; the third starts at once in the free seat.
    arrived, generation = generate([group(0, 10), group(1, 30), group(2, 5)], seats=2)
    assert [each.order for _, each in arrived] == [0, 2, 1]
    assert [when for when, _ in arrived] == pytest.approx([0.12, 0.18, 0.18 + 15 * 0.011])
    assert generation.busy_seconds == pytest.approx([generation.now])
    assert generation.idle


def test_prompts_are_read_once_per_group_and_groups_arrive_later() -> None:
    arrived, _ = generate([group(0, 10, 10, prompt=100)], prefill_seconds_per_token=0.001, group_seconds=0.5)
    assert arrived[0][0] == pytest.approx(0.1 + 10 * 0.012 + 0.5)


def test_stalls_and_speeds() -> None:
    generation = Generation(step_seconds, 1, 4, make("fcfs"), speeds=[2.0])
    generation.submit([group(0, 100)])
    generation.run_until(0.1)
    generation.stall(0, 1.0)
    assert generation.run()[0][0] == pytest.approx(100 * 0.011 / 2 + 1.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(POLICIES),
    st.integers(0, 1000),
    st.integers(1, 6),
    st.integers(1, 8),
    st.floats(0.0, 1.6),
)
def test_no_schedule_beats_the_bound(name: str, seed: int, engines: int, seats: int, sigma: float) -> None:
    groups = with_predictions(draw_groups(LengthLaw(median=50, sigma=sigma, cap=500), 20, 4, seed, 0), 0.8, seed)
    speeds = np.random.default_rng(seed).uniform(0.5, 2.0, engines).tolist()
    arrived, generation = generate(groups, engines, seats, name, speeds=speeds)
    assert generation.now >= lower_bound(step_seconds, groups, seats, speeds) * (1 - 1e-9)
    assert sorted(each.order for _, each in arrived) == list(range(20))


def test_the_bound_is_reached_where_nothing_is_uneven() -> None:
    groups = [group(i, *[50] * 4) for i in range(4)]
    _, generation = generate(groups, engines=2, seats=4)
    assert generation.now == pytest.approx(lower_bound(step_seconds, groups, 4, [1.0, 1.0]))


@pytest.mark.parametrize("name", POLICIES)
def test_killed_engines_lose_nothing_and_repeat_nothing(name: str) -> None:
    """100 kills at random times."""
    groups = with_predictions(draw_groups(LengthLaw(median=200, sigma=1.0, cap=2000), 200, 4, 3), 0.9, 3)
    generation, rng, kills, lost = Generation(step_seconds, 6, 8, make(name)), np.random.default_rng(5), 0, 0
    generation.submit(groups)
    arrived = []
    while not generation.idle:
        arrived += generation.run_until(generation.now + rng.exponential(0.4))
        if kills < 100:
            lost += len(generation.kill(int(rng.integers(6))))
            kills += 1
    assert kills == 100
    assert lost > 100
    assert sorted(each.order for _, each in arrived) == list(range(200))


def test_hundreds_of_engines_in_seconds() -> None:
    groups = draw_groups(LengthLaw(median=8000, sigma=1.0), 512 * 64 // 8, 8, 0)
    begun = time.perf_counter()
    _, generation = generate(groups, 512, 64, ask_every=32)
    assert generation.idle
    assert time.perf_counter() - begun < 20  # 2 s on an idle machine


def test_skew_aware_wins_with_the_truth_and_a_long_tail() -> None:
    """One wave, half of a step's time fixed: what isolation is for."""
    ratios = {}
    for name in ("fcfs", "longest_first", "skew_aware"):
        found = []
        for seed in range(3):
            groups = with_predictions(draw_groups(LengthLaw(sigma=1.0, within=0.0), 128, 8, seed), 1.0, seed)
            generation = Generation(step_seconds, 16, 64, make(name))
            generation.submit(groups)
            generation.run()
            found.append(generation.now / lower_bound(step_seconds, groups, 64, [1.0] * 16))
        ratios[name] = np.mean(found)
    assert ratios["skew_aware"] < ratios["longest_first"] <= ratios["fcfs"]


def test_nobody_accepts() -> None:
    generation = Generation(step_seconds, 1, 4, make("fcfs"))
    generation.accept(0, False)
    generation.submit([group(0, 5)])
    with pytest.raises(RuntimeError, match="none accepts"):
        generation.run()
    generation.accept(0, True)
    assert len(generation.run()) == 1
