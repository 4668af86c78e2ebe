"""Whole runs of every preset, and what dynamic sampling and overlong shaping do to them."""

from __future__ import annotations

import math

import pytest

from rl.config.algorithm import PRESETS
from rl.metrics import read_metrics
from rl.types import Sample
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

STEPS = 20


def rare(sample: Sample, args: object) -> float:
    """1 for a quarter of first tokens: some groups agree, some do not."""
    return float(len(sample.response_tokens) > 0 and int(sample.response_tokens[0]) % 4 == 0)


def settings_of(algorithm, **changes):
    settings = {
        "run__steps": STEPS,
        "run__limits": {"generate_s": 600.0},
        "reward__path": "tests.rl.orchestration.test_algorithms:rare",
        "algorithm": algorithm,
        "evaluation__at_start": False,
        "evaluation__at_end": False,
        "checkpoint__every": 0,
        **changes,
    }
    if algorithm["preset"] == "ppo":
        settings["critic"] = {}
    return settings


def run_steps(directory, algorithm, **changes):
    command = Command(tiny_config(directory, **settings_of(algorithm, **changes)))
    assert command.end(1500) == 0, command.output()[-3000:]
    return ledger_lines(command.run_directory), read_metrics(command.run_directory)


def of_step(metrics, name):
    return [values[name] for step, values in sorted(metrics.items()) if name in values]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_twenty_steps(tmp_path, preset):
    lines, metrics = run_steps(tmp_path, {"preset": preset})
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses, norms = of_step(metrics, "train/loss"), of_step(metrics, "train/grad_norm")
    assert len(losses) == len(norms) == STEPS
    assert all(map(math.isfinite, losses + norms))
    assert max(norms) > 0
    if preset != "dapo":
        return
    taken = [tuple(prompt) for line in lines for prompt in line["consumed"]]
    assert taken == [(i // 32, i % 32) for i in range(len(taken))]  # every prompt once, in order, over epochs
    dropped = [uid for line in lines for uid in line["extra"]["dynamic_sampling"]["dropped"]]
    assert dropped
    trained = {sample.rsplit("/", 1)[0] for line in lines for sample in line["sample_ids"]}
    assert not trained & set(dropped)
    assert {f"train/{epoch}/{ordinal}" for epoch, ordinal in taken} == trained | set(dropped)
    assert all(value == 0 for value in of_step(metrics, "train/equal_groups"))
    assert min(of_step(metrics, "train/overlong_penalty")) < 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_corrections_together(tmp_path):
    """Two steps an iteration, so that ratios are not 1; KL, importance weights and masks, and filtered responses."""
    algorithm = {
        "preset": "dr_grpo",
        "mini_batches": 2,
        "dual_clip": 3.0,
        "kl": {"coef": 0.05, "estimator": "k3", "weighted": True},
        "importance": {"band": [0.9, 1.1], "level": "sequence_mean", "truncation": 1.05},
        "overlong": {"buffer": 16, "filter": True},
    }
    # One of some 200 tokens ends a response, so about a quarter of them end before they are cut off.
    lines, metrics = run_steps(tmp_path, algorithm, run__steps=6, sampling__max_tokens=64, data__prompts_per_step=4)
    assert len(lines) == 6
    assert all(line["extra"]["optimizer_steps"] == 2 for line in lines)
    assert all(map(math.isfinite, of_step(metrics, "train/loss")))
    assert any(abs(ratio - 1) > 1e-4 for ratio in of_step(metrics, "train/ratio"))
    assert any(value > 0 for value in of_step(metrics, "train/kl"))
    assert len(of_step(metrics, "train/importance_dropped")) == 6
    assert max(of_step(metrics, "train/overlong_filtered_fraction")) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dynamic_sampling_goes_on_after_a_crash_with_the_prompts_that_follow(tmp_path):
    config = tiny_config(tmp_path, **settings_of({"preset": "dapo"}, run__steps=8, checkpoint__every=2))
    first = Command(config)
    first.wait_for(lambda: first.steps() >= 5, 1500, "five steps")
    first.kill()
    again = Command(config, "--resume", "auto")
    assert again.end(1500) == 0, again.output()[-3000:]
    lines = ledger_lines(again.run_directory)
    assert [line["step"] for line in lines] == list(range(1, 9))
    taken = [tuple(prompt) for line in lines for prompt in line["consumed"]]
    assert taken == [divmod(i, 32) for i in range(len(taken))]
    assert sum(len(line["extra"]["dynamic_sampling"]["dropped"]) for line in lines) > 0
