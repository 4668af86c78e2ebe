import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.orchestration.allocation import ElasticRule, allocate


def generate(engines: int) -> float:
    return 20 + 400 / engines  # the longest sample, and work that divides


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(2, 12),
    st.dictionaries(st.integers(1, 8), st.integers(1, 9).map(float), min_size=1),
    st.dictionaries(st.integers(1, 8), st.integers(1, 9).map(float), min_size=1),
    st.integers(1, 2),
    st.sampled_from([None, 4, 6]),
)
def test_against_every_split(gpus, engines, ranks, per_engine, divides) -> None:
    possible = [
        (max(engines[x], ranks[y]), x * per_engine + y, y)
        for x, y in itertools.product(engines, ranks)
        if x * per_engine + y <= gpus and (divides is None or divides % y == 0)
    ]
    if not possible:
        with pytest.raises(ValueError, match=f"no split of {gpus} GPUs"):
            allocate(gpus, engines, ranks, per_engine, divides)
        return
    split = allocate(gpus, engines, ranks, per_engine, divides)
    assert (split.step_seconds, split.engines * per_engine + split.trainer_ranks, split.trainer_ranks) == min(possible)


def test_functions_do_as_well_as_tables() -> None:
    split = allocate(8, generate, lambda ranks: 300 / ranks, trainer_divides=16)
    assert (split.engines, split.trainer_ranks) == (4, 4)
    with pytest.raises(ValueError, match=">= 0"):
        allocate(4, lambda engines: -1.0, generate)


def decide(rule: ElasticRule, engines: int, generating: float, training: float):
    for _ in range(rule.window):
        decision = rule.decide(engines, generating, training)
    return decision


def test_an_engine_is_added_when_generation_lags_by_more_than_it_saves() -> None:
    rule = ElasticRule(generate, largest=8, start_seconds=60, transfer_seconds=5)
    # 2 engines: 220 s, a third saves 67 s.
    lagging = decide(rule, 2, 220, 100)
    assert lagging.action == "add"
    assert "a lag of 120 s" in lagging.reason
    assert json.dumps(lagging.to_json())
    assert decide(rule, 2, 220, 160).action == "keep"  # it would wait for the trainer at once
    assert decide(ElasticRule(generate, largest=2), 2, 220, 100).action == "keep"


def test_an_engine_that_does_not_pay_for_itself_is_not_added() -> None:
    rule = ElasticRule(generate, largest=8, start_seconds=600, horizon=5)
    told = decide(rule, 2, 220, 100)
    assert told.action == "keep"
    assert "than the 600 s that it costs" in told.reason
    assert decide(ElasticRule(generate, largest=8, start_seconds=600, horizon=20), 2, 220, 100).action == "add"
    # Nothing left to divide.
    flat = ElasticRule({1: 100.0, 2: 99.0}, largest=2)
    assert decide(flat, 1, 100, 10).action == "keep"


def test_an_engine_is_given_back_when_the_trainer_stays_the_bottleneck() -> None:
    rule = ElasticRule(generate, largest=8, smallest=2)
    assert decide(rule, 4, 120, 200).action == "give_back"  # 153 s with three
    assert decide(rule, 4, 120, 160).action == "keep"  # within the margin
    assert decide(rule, 2, 220, 2000).action == "keep"


def test_it_waits_for_a_few_steps_after_a_change() -> None:
    rule = ElasticRule(generate, largest=8, window=3)
    assert [rule.decide(2, 220, 100).action for _ in range(3)] == ["keep", "keep", "add"]
    assert [rule.decide(3, 153, 20).action for _ in range(3)] == ["keep", "keep", "add"]


@pytest.mark.parametrize("training", [60.0, 90.0, 120.0, 150.0, 200.0, 300.0])
@pytest.mark.parametrize("start", [1, 4, 8])
def test_noise_does_not_make_it_flap(training: float, start: int) -> None:
    """Measured times off by 5%: it goes to one count and stays."""
    for seed in range(5):
        rng, rule, engines, actions = np.random.default_rng(seed), ElasticRule(generate, largest=8), start, []
        for _ in range(200):
            noise = np.clip(rng.normal(1, 0.05, 2), 0.85, 1.15)
            decision = rule.decide(engines, generate(engines) * noise[0], training * noise[1])
            if decision.action != "keep":
                actions.append(decision.action)
                engines += 1 if decision.action == "add" else -1
        assert len(set(actions)) <= 1, actions  # never back and forth
        assert 1 <= engines <= 8


def test_load_that_changes_is_followed_both_ways() -> None:
    rule, engines, seen = ElasticRule(generate, largest=8), 1, []
    for step in range(120):
        scale = 3.0 if 40 <= step < 80 else 1.0
        decision = rule.decide(engines, scale * generate(engines), 150.0)
        engines += {"add": 1, "give_back": -1, "keep": 0}[decision.action]
        seen.append(engines)
    assert seen[79] > seen[39]
    assert seen[119] < seen[79]


def test_faults() -> None:
    with pytest.raises(ValueError, match="smallest <= largest"):
        ElasticRule(generate, largest=1, smallest=2)
    with pytest.raises(ValueError, match="times > 0"):
        ElasticRule(generate, largest=2).decide(1, 0.0, 1.0)
