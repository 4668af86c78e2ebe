"""Advantages: hand-computed groups, degenerate groups, and refusals."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms.advantages import (
    ADVANTAGES,
    PER_TOKEN,
    AdvantageConfig,
    AdvantageInput,
    get_advantage_fn,
    grpo,
    rloo,
)
from rl.config.algorithm import COMPARED, WHITENED


def test_grpo_by_hand():
    # Group 7: rewards 0, 0, 3; mean 1; deviations -1, -1, 2; variance (1 + 1 + 4) / 2 = 3.
    # Group 2: rewards 1, 5; mean 3; deviations -2, 2; variance (4 + 4) / 1 = 8.
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0, 5.0])
    group_ids = torch.tensor([7, 2, 7, 7, 2])
    result = grpo(rewards, group_ids, normalize_std=True, eps=0.0)
    expected = torch.tensor([-1 / 3**0.5, -2 / 8**0.5, -1 / 3**0.5, 2 / 3**0.5, 2 / 8**0.5])
    torch.testing.assert_close(result.advantages, expected)
    assert (result.groups, result.single_groups, result.equal_groups) == (2, 0, 0)


def test_without_std_only_the_mean_is_taken_off():
    result = grpo(torch.tensor([0.0, 1.0, 0.0, 3.0, 5.0]), torch.tensor([7, 2, 7, 7, 2]), normalize_std=False)
    torch.testing.assert_close(result.advantages, torch.tensor([-1.0, -2.0, -1.0, 2.0, 2.0]))


def test_eps_is_added_to_the_deviation():
    result = grpo(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), eps=1.0)
    torch.testing.assert_close(result.advantages, torch.tensor([-1.0, 1.0]) / (2**0.5 + 1))


@pytest.mark.parametrize("normalize_std", [True, False])
def test_degenerate_groups_get_exactly_zero_and_are_counted(normalize_std):
    # The mean of three times 0.1 is not 0.1 in floating point.
    rewards = torch.tensor([0.1, 0.1, 0.1, 9.0, 1.0, 2.0])
    group_ids = torch.tensor([0, 0, 0, 1, 2, 2])
    result = grpo(rewards, group_ids, normalize_std, eps=1e-12)
    assert result.advantages[:4].tolist() == [0.0] * 4
    assert result.advantages[4] < 0 < result.advantages[5]
    assert (result.groups, result.single_groups, result.equal_groups) == (3, 1, 1)


def test_groups_do_not_depend_on_order_or_on_each_other():
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(40, generator=generator)
    group_ids = torch.randint(0, 6, (40,), generator=generator)
    whole = grpo(rewards, group_ids).advantages
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(grpo(rewards[order], group_ids[order]).advantages, whole[order])
    alone = group_ids == 4
    torch.testing.assert_close(grpo(rewards[alone], group_ids[alone]).advantages, whole[alone])


def test_rloo_by_hand():
    # Group 7: rewards 0, 0, 3; the others' means are 1.5, 1.5 and 0. Group 2: 1, 5. Group 4: single. Group 5: equal.
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0, 5.0, 9.0, 0.1, 0.1])
    group_ids = torch.tensor([7, 2, 7, 7, 2, 4, 5, 5])
    result = rloo(rewards, group_ids)
    torch.testing.assert_close(result.advantages, torch.tensor([-1.5, -4.0, -1.5, 3.0, 4.0, 0.0, 0.0, 0.0]))
    assert (result.groups, result.single_groups, result.equal_groups) == (4, 1, 1)


def test_dr_grpo_leaves_the_deviation_out_whatever_the_settings():
    batch = AdvantageInput(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert ADVANTAGES["dr_grpo"](batch, AdvantageConfig(normalize_std=True)).advantages.tolist() == [-1, 1, 1]


def test_reinforce_plus_plus_by_hand():
    # Rewards 1 and -1 at the last learnt tokens, penalties before: to come 0.5, 1 | -1 (and one token not learnt).
    # Mean of 0.5, 1, -1 is 1/6; deviations 1/3, 5/6, -7/6; variance (4 + 25 + 49) / 36 / 2 = 13/12.
    batch = AdvantageInput(
        rewards=torch.tensor([1.0, -1.0]),
        group_ids=torch.tensor([0, 1]),
        lengths=torch.tensor([2, 2]),
        token_rewards=torch.tensor([-0.5, 0.0, 0.0, 9.0]),
        learnt=torch.tensor([2, 1]),
    )
    result = ADVANTAGES["reinforce++"](batch, AdvantageConfig(lam=0.3, whiten=False))
    std = (13 / 12) ** 0.5
    torch.testing.assert_close(result.advantages, torch.tensor([1 / 3 / std, 5 / 6 / std, -7 / 6 / std, 0.0]))
    assert result.returns is None
    assert result.metrics["advantage_mean"] == pytest.approx(1 / 6)
    # Discounted by 0.5: to come -0.5 + 0.5, 1 | -1.
    half = ADVANTAGES["reinforce++"](batch, AdvantageConfig(gamma=0.5))
    torch.testing.assert_close(half.advantages, torch.tensor([0.0, 1.0, -1.0, 0.0]))


def test_reinforce_plus_plus_baseline_by_hand():
    # Minus the group's mean: -1, 1 with 1 and 3 tokens, of which 1 and 1 are learnt: deviation sqrt(2).
    batch = AdvantageInput(
        torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), torch.tensor([1, 3]), learnt=torch.tensor([1, 1])
    )
    result = ADVANTAGES["reinforce++_baseline"](batch, AdvantageConfig())
    torch.testing.assert_close(result.advantages, torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0, 0.0]))
    assert result.metrics["groups"] == 1


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"zero"}))
def test_what_the_configuration_says_of_estimators(name):
    """Alone in their groups, samples of estimators that compare have advantage 0; others learn from their rewards."""
    rewards = torch.tensor([1.0, 0.0, 3.0])
    batch = AdvantageInput(rewards, torch.arange(3), torch.ones(3, dtype=torch.int64), values=torch.zeros(3))
    result = ADVANTAGES[name](batch, AdvantageConfig(whiten=False))
    assert bool((result.advantages == 0).all()) == (name in COMPARED)
    # Whitened over the batch: twice the rewards are the same advantages.
    groups = AdvantageInput(rewards, torch.zeros(3, dtype=torch.int64), batch.lengths, values=torch.zeros(3))
    twice = ADVANTAGES[name](dataclasses.replace(groups, rewards=2 * rewards), AdvantageConfig(normalize_std=False))
    once = ADVANTAGES[name](groups, AdvantageConfig(normalize_std=False))
    assert torch.allclose(once.advantages, twice.advantages) == (name in WHITENED | {"gae"})
    # Per token: a reward of a token is taken, or refused.
    paid = dataclasses.replace(groups, token_rewards=torch.tensor([0.5, 0.0, 0.0]))
    if name in PER_TOKEN:
        assert not torch.allclose(ADVANTAGES[name](paid, AdvantageConfig()).advantages, once.advantages)
    else:
        with pytest.raises(ValueError, match=re.escape(name)):
            ADVANTAGES[name](paid, AdvantageConfig())


def test_integer_rewards_are_accepted():
    assert grpo(torch.tensor([0, 1]), torch.tensor([0, 0])).advantages.dtype == torch.float32


def test_registry_gives_one_value_per_response_token():
    batch = AdvantageInput(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), torch.tensor([2, 3]))
    result = ADVANTAGES["grpo"](batch, AdvantageConfig(normalize_std=False))
    assert result.advantages.tolist() == [-1, -1, 1, 1, 1]
    assert [part.tolist() for part in result.split(batch.lengths)] == [[-1, -1], [1, 1, 1]]
    assert result.metrics["degenerate_groups"] == 0
    assert ADVANTAGES["zero"](batch, AdvantageConfig()).advantages.tolist() == [0] * 5


def test_refusals_name_the_samples():
    with pytest.raises(ValueError, match=r"\[1\] \(1 of 2 samples\)"):
        grpo(torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        grpo(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    batch = AdvantageInput(torch.zeros(1), torch.zeros(1), torch.ones(1), token_rewards=torch.zeros(1))
    with pytest.raises(ValueError, match="would be ignored"):
        ADVANTAGES["grpo"](batch, AdvantageConfig())
    with pytest.raises(ValueError, match="choose one of dr_grpo, gae, grpo"):
        get_advantage_fn("grop")


# ------------------------------------------------------------------ GAE


def gae_by_the_definition(rewards, token_rewards, values, lengths, learnt, gamma, lam):
    """Advantages and returns, token by token: the sum of discounted temporal differences to the last learnt token."""
    advantages, returns, start = [], [], 0
    for reward, length, last in zip(rewards, lengths, learnt, strict=True):
        mine, value = token_rewards[start : start + length], values[start : start + length]
        for t in range(length):
            total = 0.0
            for k in range(t, last):
                r = mine[k] + (reward if k == last - 1 else 0.0)
                following = value[k + 1] if k + 1 < last else 0.0
                total += (gamma * lam) ** (k - t) * (r + gamma * following - value[k])
            advantages.append(total if t < last else 0.0)
            returns.append(total + value[t] if t < last else 0.0)
        start += length
    return advantages, returns


@st.composite
def gae_cases(draw):
    numbers = st.floats(-5, 5, allow_nan=False, width=32)
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    learnt = [draw(st.one_of(st.just(length), st.integers(0, length))) for length in lengths]
    tokens = sum(lengths)
    fixed = {"min_size": tokens, "max_size": tokens}
    return (
        draw(st.lists(numbers, min_size=len(lengths), max_size=len(lengths))),
        draw(st.lists(numbers, **fixed)),
        draw(st.lists(numbers, **fixed)),
        lengths,
        learnt,
        draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        draw(st.sampled_from([0.0, 0.9, 1.0])),
    )


def gae_input(rewards, token_rewards, values, lengths, learnt):
    return AdvantageInput(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.zeros(len(rewards), dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        values=torch.tensor(values, dtype=torch.float64),
        token_rewards=None if token_rewards is None else torch.tensor(token_rewards, dtype=torch.float64),
        learnt=None if learnt is None else torch.tensor(learnt),
    )


@settings(deadline=None, max_examples=200)
@given(gae_cases())
def test_gae_is_its_definition(case):
    *what, gamma, lam = case
    result = get_advantage_fn("gae")(gae_input(*what), AdvantageConfig(gamma=gamma, lam=lam, whiten=False))
    advantages, returns = gae_by_the_definition(*case)
    torch.testing.assert_close(result.advantages, torch.tensor(advantages), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(result.returns, torch.tensor(returns), atol=1e-4, rtol=1e-5)


def test_gae_by_hand():
    # One sample of 3 tokens, reward 1, values 0.5 each, gamma 1, lambda 0.5:
    # deltas 0, 0, 0.5; advantages 0.125, 0.25, 0.5.
    batch = gae_input([1.0], None, [0.5, 0.5, 0.5], [3], None)
    result = get_advantage_fn("gae")(batch, AdvantageConfig(gamma=1.0, lam=0.5, whiten=False))
    torch.testing.assert_close(result.advantages, torch.tensor([0.125, 0.25, 0.5]))
    torch.testing.assert_close(result.returns, torch.tensor([0.625, 0.75, 1.0]))


def test_gae_whitens_advantages_over_learnt_tokens_and_leaves_returns():
    batch = gae_input([1.0, -2.0], None, [0.1, 0.2, 0.3, 0.4, 0.5], [2, 3], [2, 2])
    plain = get_advantage_fn("gae")(batch, AdvantageConfig(whiten=False))
    white = get_advantage_fn("gae")(batch, AdvantageConfig(whiten=True))
    learnt = white.advantages[:4]
    assert learnt.mean().item() == pytest.approx(0, abs=1e-6)
    assert learnt.std().item() == pytest.approx(1, abs=1e-5)
    assert white.advantages[4] == 0
    torch.testing.assert_close(white.returns, plain.returns)
    assert white.metrics["advantage_std"] == pytest.approx(plain.advantages[:4].std().item(), abs=1e-5)


@pytest.mark.parametrize(("rewards", "lengths"), [([2.0], [1]), ([1.0, 1.0], [1, 1]), ([], [])])
def test_gae_of_tokens_that_do_not_vary(rewards, lengths):
    batch = gae_input(rewards, None, [0.0] * sum(lengths), lengths, None)
    result = get_advantage_fn("gae")(batch, AdvantageConfig(whiten=True))
    assert result.advantages.abs().sum() == 0
    assert result.returns.tolist() == rewards


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"values": None}, {}, "run the critic's pass first"),
        ({"values": torch.zeros(3)}, {}, r"expected values \[2\]"),
        ({"values": torch.tensor([0.0, torch.nan])}, {}, "expected finite values"),
        ({"token_rewards": torch.zeros(1)}, {}, r"expected token_rewards \[2\]"),
        ({"learnt": torch.tensor([3])}, {}, "expected learnt tokens between"),
        ({}, {"gamma": 1.5}, r"expected gamma in \[0, 1\]"),
    ],
)
def test_gae_refuses_what_does_not_fit(change, config, message):
    batch = dataclasses.replace(gae_input([1.0], None, [0.0, 0.0], [2], None), **change)
    with pytest.raises(ValueError, match=message):
        get_advantage_fn("gae")(batch, AdvantageConfig(**config))
