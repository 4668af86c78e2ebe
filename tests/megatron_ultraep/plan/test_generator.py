"""Simulated routes have the imbalance asked for, distinct experts in a token, and depend on the seed only."""

import numpy as np
import pytest

from megatron_ultraep.plan import imbalance
from megatron_ultraep.plan.generator import draw_routes, expected_imbalance, expert_weights, simulate

SHAPE = {"ranks": 8, "experts": 32, "tokens": 2048, "topk": 4}


@pytest.mark.parametrize("target", [1.0, 1.5, 2.0, 3.0])
def test_imbalance_and_loads(target):
    assert expected_imbalance(expert_weights(8, 32, 4, target), 8, 4) == pytest.approx(target, rel=1e-6)
    routes, loads = simulate(**SHAPE, target_imbalance=target, seed=1)
    assert imbalance(loads.sum(axis=0).reshape(8, 4).sum(axis=1)) == pytest.approx(target, rel=0.03)
    assert loads.shape == (8, 32)
    assert loads.dtype == np.int64
    for of_rank, load in zip(routes, loads, strict=True):
        assert of_rank.shape == (2048, 4)
        assert (np.diff(np.sort(of_rank, axis=1), axis=1) > 0).all()
        assert np.array_equal(np.bincount(of_rank.ravel(), minlength=32), load)


def test_one_seed_one_draw():
    one, two, other = (simulate(**SHAPE, target_imbalance=2.0, seed=seed)[1] for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])  # ranks draw on their own


def test_draws_without_replacement():
    # P(expert 2 is missed by two draws) = 0.5 * 0.3/0.5 + 0.3 * 0.5/0.7 for weights 0.5, 0.3, 0.2.
    routes = draw_routes(np.array([0.5, 0.3, 0.2]), 40_000, 2, np.random.default_rng(0))
    missed = 1 - (routes == 2).any(axis=1).mean()
    assert missed == pytest.approx(0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7, abs=0.01)


def test_one_expert_per_rank_and_all_experts():
    _, loads = simulate(ranks=4, experts=4, tokens=4000, topk=1, target_imbalance=2.0, seed=0)
    # The inclusion probabilities are an approximation, at its worst for one draw from few experts.
    assert imbalance(loads.sum(axis=0)) == pytest.approx(2.0, rel=0.15)
    _, loads = simulate(ranks=2, experts=4, tokens=10, topk=4, target_imbalance=1.0, seed=0)
    assert (loads == 10).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 5}, "divide"),
        ({"topk": 33}, "topk"),
        ({"target_imbalance": 9.0}, "the most that 32 experts on 8 ranks"),
    ],
)
def test_what_cannot_be_reached_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        simulate(**(SHAPE | {"target_imbalance": 1.5, "seed": 0} | changes))
