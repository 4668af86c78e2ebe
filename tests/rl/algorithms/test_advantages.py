"""Advantages: hand-computed groups, degenerate groups, and refusals."""

from __future__ import annotations

import pytest
import torch

from rl.algorithms.advantages import (
    ADVANTAGES,
    AdvantageConfig,
    AdvantageInput,
    get_advantage_fn,
    grpo,
)


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
    with pytest.raises(ValueError, match="choose one of grpo, zero"):
        get_advantage_fn("grop")
