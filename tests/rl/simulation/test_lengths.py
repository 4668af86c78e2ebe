import numpy as np
import pytest

from rl.rollout.predictors import recall_of_longest
from rl.simulation.lengths import LengthLaw, draw_groups, with_predictions


def test_lengths_follow_the_law() -> None:
    lengths = np.array([g.lengths for g in draw_groups(LengthLaw(median=1000, sigma=0.8), 4000, 4, 0)], dtype=float)
    assert np.median(lengths) == pytest.approx(1000, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(0.8, rel=0.05)
    assert np.log(lengths).std(axis=1, ddof=1).mean() < 0.5  # mostly between prompts
    capped = np.array([g.lengths for g in draw_groups(LengthLaw(sigma=2.0, cap=5000), 200, 4, 0)])
    assert capped.max() == 5000
    assert capped.min() >= 1
    two = np.array([g.lengths for g in draw_groups(LengthLaw("bimodal", 1000, 0.1, hard_factor=8), 2000, 2, 0)])
    assert (two > 4000).mean() == pytest.approx(0.1, abs=0.02)


def test_same_arguments_same_groups() -> None:
    law = LengthLaw()
    assert draw_groups(law, 10, 4, 1) == draw_groups(law, 10, 4, 1)
    assert draw_groups(law, 10, 4, 1) != draw_groups(law, 10, 4, 2)
    assert draw_groups(law, 10, 4, 1, batch=1)[0].lengths != draw_groups(law, 10, 4, 1)[0].lengths


@pytest.mark.parametrize("recall", [0.5, 0.87, 1.0])
def test_predictions_have_the_recall_asked_for(recall: float) -> None:
    for seed in range(3):
        groups = with_predictions(draw_groups(LengthLaw(), 500, 8, seed), recall, seed)
        predicted = np.array([g.predicted_tokens for g in groups])
        actual = np.array([max(g.lengths) for g in groups], dtype=float)
        assert recall_of_longest(predicted, actual) == pytest.approx(recall, abs=0.03)
        assert sorted(predicted) == sorted(actual)


def test_faults() -> None:
    with pytest.raises(ValueError, match="lognormal"):
        LengthLaw("pareto")
    with pytest.raises(ValueError, match="recall"):
        with_predictions([], 0.0, 0)
