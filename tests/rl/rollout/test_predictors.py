import json

import numpy as np
import pytest

from rl.rollout.predictors import get_predictor, recall_of_longest
from rl.types import Prompt

KINDS = ("features", "history", "ranker")
WORDS = 40


def prompt(number: int, epoch: int = 0, seed: int = 0) -> tuple[Prompt, list[int]]:
    """Prompts with the token 7 have long answers, and longer ones the more of it."""
    rng = np.random.default_rng([seed, number])
    tokens = rng.integers(10, 10 + WORDS, rng.integers(12, 24)).astype(np.int32)
    hard = number % 5 == 0
    if hard:
        tokens[:4] = 7
    text = "".join(chr(97 + token % 26) for token in tokens)
    base = 400 if hard else 40
    lengths = rng.integers(base, 2 * base, 4).tolist()
    return Prompt(f"train/{epoch}/{number}", number, epoch, text, tokens, metadata={"difficulty": float(hard)}), lengths


def teach(predictor, numbers) -> None:
    for number in numbers:
        predictor.observe(*prompt(number))


def recall(predictor, numbers, epoch: int = 0) -> float:
    prompts = [prompt(number, epoch)[0] for number in numbers]
    return recall_of_longest(predictor.predict(prompts), np.array([max(prompt(n)[1]) for n in numbers]))


@pytest.mark.parametrize("kind", KINDS)
def test_new_prompts_are_ranked(kind: str) -> None:
    predictor = get_predictor(kind)
    assert np.isnan(predictor.predict([prompt(0)[0]])).all()
    teach(predictor, range(300))
    assert recall(predictor, range(1000, 1200)) >= 0.85
    found = predictor.predict([prompt(n)[0] for n in range(1000, 1200)])
    actual = np.array([max(prompt(n)[1]) for n in range(1000, 1200)])
    assert 0.5 < np.median(found) / np.median(actual) < 2  # tokens, not only scores
    assert predictor.predict([]).shape == (0,)


def test_history_knows_a_prompt_again_in_the_next_epoch() -> None:
    predictor = get_predictor("history", decay=0.5)
    first, _ = prompt(3)
    predictor.observe(first, [10, 100])
    predictor.observe(first, [200, 20])
    assert predictor.predict([prompt(3, epoch=1)[0]])[0] == 150


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_predictor_goes_on_as_if_it_had_not_stopped(kind: str) -> None:
    straight, stopped = get_predictor(kind), get_predictor(kind)
    teach(straight, range(60))
    teach(stopped, range(30))
    resumed = get_predictor(kind)
    resumed.restore(json.loads(json.dumps(stopped.to_json())))
    teach(resumed, range(30, 60))
    prompts = [prompt(number)[0] for number in range(100, 140)]
    np.testing.assert_array_equal(straight.predict(prompts), resumed.predict(prompts))


def test_the_ranker_is_a_function_of_its_seed() -> None:
    prompts = [prompt(number)[0] for number in range(100, 140)]
    found = []
    for seed in (1, 1, 2):
        ranker = get_predictor("ranker", seed=seed)
        teach(ranker, range(64))
        found.append(ranker.predict(prompts))
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_groups_without_samples_teach_nothing() -> None:
    for kind in KINDS:
        predictor = get_predictor(kind)
        predictor.observe(prompt(0)[0], [])
        assert np.isnan(predictor.predict([prompt(0)[0]])).all()


def test_oracle() -> None:
    first = prompt(0)[0]
    oracle = get_predictor("oracle", table={first.uid: 12})
    assert oracle.predict([first]).tolist() == [12.0]
    with pytest.raises(ValueError, match="lacks 1 prompts"):
        oracle.predict([prompt(1)[0]])


def test_recall() -> None:
    actual = np.arange(10.0)
    assert recall_of_longest(actual, actual) == 1.0
    assert recall_of_longest(-actual, actual) == 0.0
    half = actual.copy()
    half[9], half[0] = half[0], half[9]
    assert recall_of_longest(half, actual) == 0.5
    with pytest.raises(ValueError, match="the same prompts"):
        recall_of_longest(actual[:3], actual)


def test_faults() -> None:
    with pytest.raises(ValueError, match="one of features, history"):
        get_predictor("crystal")
    with pytest.raises(ValueError, match="do not suit"):
        get_predictor("features", depth=3)
    with pytest.raises(ValueError, match="state of a 'history' predictor"):
        get_predictor("history").restore(get_predictor("features").to_json())
    with pytest.raises(ValueError, match="settings that the run began with"):
        get_predictor("ranker", hidden=16).restore(get_predictor("ranker").to_json())
