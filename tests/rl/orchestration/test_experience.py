"""What is done to rewards and masks on the way to advantages, and the loss that a configuration asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.config import from_dict
from rl.orchestration.experience import policy_loss_config, train_samples, value_metrics, with_advantages
from rl.training.batch import Counts
from rl.types import Prompt, Sample
from tests.rl.test_config import changed


def sample(k: int, response: int, reward: float) -> Sample:
    return Sample(
        sample_id=f"train/0/0/{k}",
        prompt=Prompt("train/0/0", 0, 0, "", np.array([1, 2], np.int32)),
        response_tokens=np.arange(response, dtype=np.int32),
        rollout_logprobs=np.zeros(response, np.float32),
        weight_versions=((0, 1),),
        finish_reason="length" if response == 10 else "stop",
        routes=None,
        histogram=None,
        reward=reward,
    )


SAMPLES = [sample(0, 4, 1.0), sample(1, 9, 1.0), sample(2, 10, 0.0)]


def advantages(*changes, samples=SAMPLES):
    config = from_dict(changed(("sampling.max_tokens", 10), ("algorithm.advantage", "dr_grpo"), *changes))
    return with_advantages(samples, train_samples(samples), config, None, None)


def test_long_responses_lose_reward_before_they_are_compared():
    # Buffer 4, penalty 2: 0, -1.5 and -2. Rewards 1, -0.5, -2 with mean -0.5.
    given, metrics = advantages(("algorithm.overlong", {"buffer": 4, "penalty": 2.0}))
    assert [s.advantages[-1] for s in given] == pytest.approx([1.5, 0.0, -1.5])
    assert metrics["train/overlong_penalty"] == pytest.approx(-3.5 / 3)
    assert [s.reward for s in SAMPLES] == [1.0, 1.0, 0.0]  # what was measured stays what it was
    plain, metrics = advantages()
    assert [s.advantages[-1] for s in plain] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert "train/overlong_penalty" not in metrics


def test_responses_that_were_cut_off_are_not_learnt_from_but_compared_with():
    given, metrics = advantages(("algorithm.overlong.filter", True))
    assert [s.advantages[2] for s in given] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert [int(s.loss_mask.sum()) for s in given] == [4, 9, 0]
    assert Counts.of(given) == Counts(tokens=13, sequences=2)
    assert metrics["train/overlong_filtered_fraction"] == pytest.approx(1 / 3)


def test_whitening_does_not_see_what_is_not_learnt():
    given, _ = advantages(("algorithm", {"advantage": "reinforce++", "overlong": {"filter": True}}))
    learnt = np.concatenate([s.advantages[s.loss_mask] for s in given])
    assert learnt == pytest.approx(np.zeros(13), abs=1e-6)  # both have reward 1
    assert given[2].advantages.tolist() == [0.0] * 12


def test_the_kl_in_the_reward_of_estimators_per_sample_and_per_token():
    reference = {s.sample_id: np.where(np.arange(s.length) >= 2, -0.1, 0.0) for s in SAMPLES}
    old = {s.sample_id: np.zeros(s.length) for s in SAMPLES}
    kl = ("algorithm.kl", {"coef": 1.0, "in": "reward", "estimator": "k1"})
    config = from_dict(changed(("sampling.max_tokens", 10), ("algorithm.advantage", "rloo"), kl))
    given, _ = with_advantages(SAMPLES, train_samples(SAMPLES), config, old, reference)
    # Rewards 1 - 0.4, 1 - 0.9, 0 - 1.0, each less the mean of the other two.
    assert [s.advantages[-1] for s in given] == pytest.approx([0.6 + 0.45, 0.1 + 0.2, -1.0 - 0.35], abs=1e-6)
    config = from_dict(changed(("sampling.max_tokens", 10), ("algorithm.advantage", "reinforce++"), kl))
    given, metrics = with_advantages(SAMPLES, train_samples(SAMPLES), config, old, reference)
    first = given[0].advantages[2:]
    assert np.diff(first) == pytest.approx([0.1 / metrics["train/advantage_std"]] * 3, rel=1e-4)


def test_the_loss_that_the_configuration_asks_for():
    config = from_dict(
        changed(
            ("sampling.max_tokens", 10),
            (
                "algorithm",
                {
                    "preset": "dr_grpo",
                    "dual_clip": 3.0,
                    "kl": {"coef": 0.1, "weighted": True},
                    "importance": {"band": [0.5, 5], "level": "sequence_mean"},
                },
            ),
        )
    )
    loss = policy_loss_config(config)
    assert not loss.violations()
    assert (loss.name, loss.aggregation, loss.sequence_length, loss.dual_clip) == (
        "ppo_clip",
        "sequence_sum",
        10.0,
        3.0,
    )
    assert (loss.kl_coef, loss.kl_weighted) == (0.1, True)
    assert (loss.importance_band, loss.importance_level, loss.importance_cap) == ((0.5, 5.0), "sequence_mean", None)
    in_reward = from_dict(changed(("algorithm.kl", {"coef": 0.1, "in": "reward"})))
    assert policy_loss_config(in_reward) == replace(policy_loss_config(from_dict(changed())), sequence_length=256.0)


def test_values_of_nothing_that_is_learnt_are_numbers():
    assert set(value_metrics(torch.zeros(0), torch.zeros(0)).values()) == {0.0}
