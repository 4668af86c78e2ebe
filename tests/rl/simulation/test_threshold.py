"""R_t is chosen from lengths, and stays until they drift."""

from __future__ import annotations

import numpy as np
import pytest

from rl.rollout.latency import LatencyProfile
from rl.simulation.generation import SimGroup
from rl.simulation.lengths import LengthLaw, draw_groups
from rl.simulation.tail import InferenceCost
from rl.simulation.threshold import ThresholdChooser

PROFILE = LatencyProfile((1, 16, 64), (0.01, 0.011, 0.02), prefill_seconds_per_token=1e-5)
LONG_TAIL, NO_TAIL = LengthLaw("lognormal", 200, 1.2, 4000), LengthLaw("lognormal", 200, 0.0, 4000)
COST = InferenceCost(1e-3, switch_seconds=0.1)


def chooser(**settings) -> ThresholdChooser:
    given = {"engines": 4, "seats": 64, "kv_tokens": 1 << 20, "longest": 4100, "profile": PROFILE, "window": 2}
    return ThresholdChooser(**(given | settings))


def batch(law: LengthLaw, seed: int) -> list[SimGroup]:
    return draw_groups(law, 32, 8, seed, prompt_tokens=64)


def seconds(one: ThresholdChooser, groups: list[SimGroup], slowdown: float = 1.0) -> float:
    """As the simulator says, for an engine that is so much slower than its profile."""
    thresholds = [one.threshold] if one.threshold else []
    sweep = one._sweep(groups, PROFILE, InferenceCost(0.0), thresholds, one.tail_seats)
    return slowdown * sweep.by_threshold.get(one.threshold, sweep.plain).generated


def test_first_lengths_choose_and_the_same_keep_it() -> None:
    one = chooser()
    assert (one.choose().threshold, one.choose().reason) == (0, "no lengths have been seen yet")
    one.observe(batch(LONG_TAIL, 0), seconds(one, batch(LONG_TAIL, 0)), COST)
    first = one.choose()
    assert first.changed
    assert 0 < first.threshold <= 128
    assert "first lengths: at" in first.reason
    assert first.predicted_seconds < first.plain_seconds
    told = {"threshold", "changed", "reason", "seats", "predicted_seconds", "plain_seconds"}
    assert set(first.to_json()) == told
    for seed in range(1, 5):
        one.observe(batch(LONG_TAIL, seed), seconds(one, batch(LONG_TAIL, seed)), COST)
        again = one.choose()
        assert (again.threshold, again.changed) == (first.threshold, False)
        assert "those that it was chosen for" in again.reason


def test_how_densely_is_chosen_too() -> None:
    """Much inference: more freed engines pay for slower steps. Little: they do not, where steps become that slow."""
    profile = LatencyProfile((1, 8, 64), (0.01, 0.011, 0.08))
    chosen = []
    for cost in (1e-5, 2e-3):
        one = chooser(profile=profile, tail_seats=(8, 64))
        groups = batch(LengthLaw("lognormal", 200, 0.8, 4000), 0)
        one.observe(groups, 0.0, InferenceCost(cost))
        chosen.append(one.choose().seats)
        assert one.tail_seats == chosen[-1]
    assert chosen == [8, 64]


def test_drift_changes_it() -> None:
    one = chooser(window=1)
    one.observe(batch(LONG_TAIL, 0), seconds(one, batch(LONG_TAIL, 0)), COST)
    assert one.choose().threshold > 0
    one.observe(batch(NO_TAIL, 1), seconds(one, batch(NO_TAIL, 1)), COST)
    choice = one.choose()
    assert "lengths drifted by" in choice.reason
    assert (choice.threshold, choice.changed) == (one.threshold, choice.changed)
    one.observe(batch(LONG_TAIL, 2), seconds(one, batch(LONG_TAIL, 2)), COST)
    assert one.choose().threshold > 0


def test_costs_that_change_are_a_reason_to_look() -> None:
    one = chooser()
    for seed in range(2):
        one.observe(batch(LONG_TAIL, seed), seconds(one, batch(LONG_TAIL, seed)), COST)
    one.choose()
    for seed in range(2, 4):
        one.observe(batch(LONG_TAIL, seed), seconds(one, batch(LONG_TAIL, seed)), InferenceCost(4e-3, 0.1))
    assert "inference against generation went from 0.001 to 0.004" in one.choose().reason


def test_slower_engines_are_measured() -> None:
    """Everything takes twice as long: the choice is the same, and the prediction is scaled."""
    fast, slow = chooser(), chooser()
    groups = batch(LONG_TAIL, 0)
    fast.observe(groups, seconds(fast, groups), COST)
    slow.observe(groups, seconds(slow, groups, 2.0), InferenceCost(2e-3, 0.2))
    one, two = fast.choose(), slow.choose()
    assert one.threshold == two.threshold
    assert two.predicted_seconds == pytest.approx(2 * one.predicted_seconds, rel=1e-6)


def test_a_small_saving_changes_nothing() -> None:
    one = chooser(margin=0.9)
    one.observe(batch(LONG_TAIL, 0), seconds(one, batch(LONG_TAIL, 0)), COST)
    choice = one.choose()
    assert (choice.threshold, choice.changed) == (0, False)
    assert "not 90% less" in choice.reason


def test_it_flaps_little_with_noise() -> None:
    rng = np.random.default_rng(0)
    one, changes = chooser(), 0
    for seed in range(30):
        law = LengthLaw("lognormal", 200 * float(rng.uniform(0.9, 1.1)), 1.2, 4000)
        one.observe(batch(law, seed), seconds(one, batch(law, seed), float(rng.uniform(0.9, 1.1))), COST)
        changes += one.choose().changed
    assert changes <= 3
