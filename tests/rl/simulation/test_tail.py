"""The tail of generation, simulated: against a case done by hand, against bounds, and where it cannot win."""

from __future__ import annotations

import numpy as np
import pytest

from rl.rollout.latency import LatencyProfile
from rl.simulation.generation import SimGroup
from rl.simulation.lengths import LengthLaw, draw_groups
from rl.simulation.tail import InferenceCost, fused_bound, simulate_tails

# A step takes a second, however many run.
EVEN = LatencyProfile((1, 64), (1.0, 1.0))
COST = InferenceCost(1.0)


def group(order: int, *lengths: int, prompt: int = 10) -> SimGroup:
    return SimGroup(str(order), order, 0, prompt, lengths)


def sweep(groups, thresholds, *, engines=2, profile=EVEN, costs=COST, seats=64, **settings):
    return simulate_tails(
        groups, profile, engines=engines, seats=seats, kv_tokens=1 << 20, costs=costs, thresholds=thresholds, **settings
    )


def test_a_case_by_hand() -> None:
    """Two engines, samples of 100 and 2 x 10 tokens with prompts of 10; inference takes a second a token.

    Plain: 100 s, then 150 tokens on 2 devices: 175 s. Gathered at one sample: from second 10 on, one device infers for
    90 s on 40 tokens, which takes 40 s; the other 110 tokens take 55 s on both.
    """
    found = sweep([group(0, 100), group(1, 10), group(2, 10)], [1])
    assert found.plain.generated == pytest.approx(100)
    assert found.plain.seconds == pytest.approx(100 + 150 / 2)
    (one,) = found.gathered
    assert (one.began, one.generated, one.hidden_tokens) == pytest.approx((10, 100, 40))
    assert one.seconds == pytest.approx(100 + 110 / 2)
    assert found.best is one
    assert found.bound == pytest.approx(100 + 110 / 2)


def test_reading_again_and_switching_cost() -> None:
    """Both engines hold a long one; one of them moves, and is read again with its 10 tokens and its prompt."""
    profile = LatencyProfile((1, 64), (1.0, 1.0), prefill_seconds_per_token=0.5)
    groups = [group(0, 100), group(1, 90), group(2, 10), group(3, 10)]
    (one,) = sweep(groups, [2], profile=profile, costs=InferenceCost(1.0, switch_seconds=7.0)).gathered
    read = 0.5 * 20  # two prompts that an engine reads at the start
    assert one.moved == 1
    assert one.began == pytest.approx(read + 10)
    assert one.generated == pytest.approx(one.began + 0.5 * 20 + 90)
    # 40 tokens are there at once; the sample of 90 ends 10 s before the last, which is enough for 10 of its 100.
    assert one.hidden_tokens == pytest.approx(40 + 10)
    assert one.seconds == pytest.approx(one.generated + 7 + (250 - 50) / 2)


def test_only_whole_copies_of_the_models_infer() -> None:
    costs = InferenceCost(1.0, devices_per_block=2)
    groups = [group(0, 100), *(group(i, 10) for i in range(1, 6))]
    two, three = (sweep(groups, [1], engines=n, costs=costs).gathered[0] for n in (2, 3))
    assert two.hidden_tokens == 0, "one device is free, and a copy takes two"
    assert three.hidden_tokens == 100


def test_never_below_the_bound_and_monotone_tokens() -> None:
    profile = LatencyProfile((1, 8, 64), (0.01, 0.012, 0.03), prefill_seconds_per_token=1e-5)
    rng = np.random.default_rng(0)
    wins = 0
    for seed in range(12):
        engines = int(rng.choice([2, 4, 8]))
        law = LengthLaw("lognormal", 200, float(rng.choice([0.4, 1.0, 1.4])), 4000)
        groups = draw_groups(law, engines * 8, 8, seed, prompt_tokens=64)
        costs = InferenceCost(float(rng.choice([1e-4, 1e-3])), switch_seconds=0.2)
        count = sum(len(g.lengths) for g in groups)
        thresholds = [round(f * count) for f in (0, 0.05, 0.1, 0.2, 0.4)]
        found = sweep(groups, thresholds, engines=engines, profile=profile, costs=costs)
        assert [t.threshold for t in found.gathered] == sorted(t for t in thresholds if t)
        total = sum(g.tokens for g in groups)
        for times in (found.plain, *found.gathered):
            assert found.bound <= times.seconds
            assert times.began <= times.generated <= times.seconds
            assert 0 <= times.hidden_tokens <= total
        assert [t.began for t in found.gathered] == sorted((t.began for t in found.gathered), reverse=True)
        assert found.best.seconds <= found.plain.seconds
        wins += found.best.threshold > 0
        assert found.bound == fused_bound(groups, profile, engines, 64, costs)
    assert wins > 3


def test_no_tail_nothing_to_win() -> None:
    """All samples are equally long: gathering only makes steps longer."""
    profile = LatencyProfile((1, 64), (1.0, 4.0))
    found = sweep([group(i, 50) for i in range(8)], [1, 2, 4], profile=profile)
    assert found.best is found.plain
    assert found.gathered == (), "there are never few unfinished samples, they all end at once"


def test_costs_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="devices_per_block"):
        InferenceCost(1.0, devices_per_block=0)
