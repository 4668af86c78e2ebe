"""PPO in the loop: what advantages are made of, what the reward model is shown, and whole runs."""

import json

import numpy as np
import pytest

from rl.config import from_dict
from rl.metrics import METRICS, read_metrics
from rl.orchestration.critic import critic_metrics, scored_sample
from rl.orchestration.experience import train_samples, with_advantages
from rl.training.results import StepOutcome
from rl.types import Prompt, Sample
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config
from tests.rl.test_config import PPO, changed


def sample(name, prompt, response, reward, learnt=None):
    tokens = np.arange(1, 1 + prompt + response, dtype=np.int32)
    return Sample(
        sample_id=name,
        prompt=Prompt(name, 0, 0, "", tokens[:prompt]),
        response_tokens=tokens[prompt:],
        rollout_logprobs=np.zeros(response, np.float32),
        weight_versions=((0, 1),),
        finish_reason="stop",
        routes=None,
        histogram=None,
        learnt_tokens=learnt,
        reward=reward,
    )


SAMPLES = [sample("a", 2, 3, 1.0), sample("b", 1, 4, -1.0, learnt=2)]
VALUES = {"a": np.array([0, 0, 0.1, 0.2, 0.3]), "b": np.array([0, 0.5, 0.25, 0, 0])}


def advantages(*changes, old=None, reference=None, values=VALUES):
    config = from_dict(changed(*PPO, ("algorithm.gae", {"whiten": False}), *changes))
    return with_advantages(SAMPLES, train_samples(SAMPLES), config, old, reference, values)


def test_values_and_returns_lie_on_learnt_tokens():
    (a, b), metrics = advantages()
    # gamma = lambda = 1: returns are the reward, advantages what is left of it.
    assert a.returns.tolist() == pytest.approx([0, 0, 1, 1, 1])
    assert a.advantages.tolist() == pytest.approx([0, 0, 0.9, 0.8, 0.7])
    assert b.returns.tolist() == pytest.approx([0, -1, -1, 0, 0])
    assert b.advantages.tolist() == pytest.approx([0, -1.5, -1.25, 0, 0])
    assert a.values is VALUES["a"]
    assert metrics["critic/values/mean"] == pytest.approx(1.35 / 5)
    assert metrics["critic/returns/mean"] == pytest.approx(1 / 5)
    assert set(metrics) <= set(METRICS)


def test_the_kl_is_a_reward_of_every_token():
    old = {"a": np.array([0, 0, -1.0, -1.0, -1.0]), "b": np.array([0, -1.0, -1.0, 0, 0])}
    reference = {"a": np.array([0, 0, -2.0, -1.0, -1.5]), "b": np.array([0, -1.0, -4.0, 0, 0])}
    (a, b), _ = advantages(
        ("algorithm.kl", {"coef": 0.1, "in": "reward", "estimator": "k1"}), old=old, reference=reference
    )
    assert a.returns.tolist() == pytest.approx([0, 0, 0.85, 0.95, 0.95])
    assert b.returns.tolist() == pytest.approx([0, -1.3, -1.3, 0, 0])


def test_the_kl_in_the_loss_is_in_no_reward():
    old = {name: np.zeros(5) for name in "ab"}
    reference = {name: -np.ones(5) for name in "ab"}
    (a, _), _ = advantages(("algorithm.kl", {"coef": 0.1, "in": "loss"}), old=old, reference=reference)
    assert a.returns.tolist() == pytest.approx([0, 0, 1, 1, 1])


def test_without_advantages_the_critic_still_learns():
    (a, b), _ = advantages(("algorithm.zero_advantages", True))
    assert not a.advantages.any()
    assert not b.advantages.any()
    assert a.returns.tolist() == pytest.approx([0, 0, 1, 1, 1])


def test_gae_takes_samples_of_different_prompts_together():
    """Whitening is over all tokens, whatever group they are of."""
    found, _ = advantages(("algorithm.gae", {"whiten": True}), ("data.samples_per_prompt", 1))
    learnt = np.concatenate([s.advantages[s.loss_mask] for s in found])
    assert learnt.mean() == pytest.approx(0, abs=1e-6)
    assert learnt.std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_the_reward_model_sees_the_last_learnt_token():
    shown = scored_sample(SAMPLES[0])
    assert shown.tokens.tolist() == [1, 2, 3, 4, 5, 0]
    assert shown.rows == 5, "rows are fed with all tokens of the sample"
    assert shown.loss_mask.tolist() == [False] * 5 + [True]
    assert scored_sample(SAMPLES[1]).tokens.tolist() == [1, 2, 3, 0]


def test_metrics_of_the_critics_steps():
    outcomes = [
        StepOutcome(loss=1.0, sums={"clipfrac": 2.0, "abs_error": 6.0}, tokens=4, grad_norm=2.0, lr=0.1),
        StepOutcome(loss=3.0, sums={"clipfrac": 0.0, "abs_error": 2.0}, tokens=4, grad_norm=4.0, lr=0.2),
    ]
    found = critic_metrics(outcomes)
    assert found["critic/loss"] == 2.0
    assert found["critic/clipfrac"] == 0.25
    assert found["critic/abs_error"] == 1.0
    assert (found["critic/grad_norm"], found["critic/lr"]) == (3.0, 0.2)
    assert set(found) <= set(METRICS)
    assert critic_metrics([]) == {}


RUNS = {
    "synchronous": {"algorithm__mini_batches": 2, "algorithm__kl": {"coef": 0.01, "in": "reward"}},
    "arriving": {
        "stream": {"pipelining": True, "staleness": 1},
        "algorithm__gae": {"whiten": False},
        "algorithm__old_logprobs": "rollout",
        "algorithm__mini_batches": 2,
    },
    "colocated": {"stream": {"colocated": True}, "algorithm__kl": {"coef": 0.01}, "reference": {"parallel": {"pp": 2}}},
    "foreseen": {"balance": {"enabled": True, "foresight": True, "reorder": True, "min_tokens": 1, "gate": False}},
}


def ppo_config(directory, **changes):
    """Four iterations, the first for the critic alone; actor ep2, critic pp2."""
    return tiny_config(
        directory,
        data__prompts_per_step=8,
        data__samples_per_prompt=1,
        algorithm__advantage="gae",
        critic={"warmup_steps": 1, "parallel": {"pp": 2}, "optimizer": {"lr": 1e-3}},
        **changes,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", RUNS)
def test_a_run(tmp_path, kind):
    command = Command(ppo_config(tmp_path, **RUNS[kind]))
    try:
        assert command.end(360) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    metrics, lines = read_metrics(tmp_path / "run"), ledger_lines(tmp_path / "run")
    for step in range(1, 5):
        assert all(np.isfinite(v) for n, v in metrics[step].items() if n.startswith("critic/")), metrics[step]
        assert metrics[step]["critic/lr"] == pytest.approx(1e-3)
    assert "train/loss" not in metrics[1]
    assert all(np.isfinite(metrics[step]["train/loss"]) for step in (2, 3, 4))
    # Nothing was sent after the critic's own iteration.
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4]
    assert [line["extra"]["optimizer_steps"] > 0 for line in lines] == [False, True, True, True]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_a_critic_and_a_reward_model_resumes(tmp_path):
    from rl.models import tiny
    from tests.rl.training.critics import with_head

    reward_model = with_head(tiny.qwen3_moe(tmp_path / "reward", layers=2, hidden=32, seed=9))
    config = ppo_config(
        tmp_path,
        reward={
            "path": "rl.rewards.builtin:reasoning_gym",
            "model": {"path": reward_model, "weight": 0.5, "parallel": {"pp": 2}},
        },
        checkpoint__every=1,
    )
    command = Command(config)
    try:
        command.wait_for(lambda: command.steps() >= 2, 240, "two steps")
        command.process.terminate()
        command.end()
    finally:
        command.kill()
    command = Command(config, "--resume", "auto")
    try:
        assert command.end(300) == 0, command.output()[-3000:]
    finally:
        command.kill()
    metrics = read_metrics(tmp_path / "run")
    assert all(metrics[step]["rollout/reward_model/std"] > 0 for step in range(1, 5))
    assert all(metrics[step]["critic/returns/mean"] != 0 for step in range(1, 5))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "loop.json").read_text())
    assert (state["critic_steps"], state["optimizer_steps"]) == (4, 3)
    assert (tmp_path / "run" / "checkpoints" / "step_00000004" / "critic").is_dir()
