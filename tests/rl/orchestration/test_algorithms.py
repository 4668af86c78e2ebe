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


def run_preset(directory, preset, **changes):
    settings = {
        "run__steps": STEPS,
        "run__limits": {"generate_s": 600.0},
        "reward__path": "tests.rl.orchestration.test_algorithms:rare",
        "algorithm": {"preset": preset},
        "evaluation__at_start": False,
        "evaluation__at_end": False,
        "checkpoint__every": 0,
        **changes,
    }
    if preset == "ppo":
        settings["critic"] = {}
    command = Command(tiny_config(directory, **settings))
    assert command.end(1500) == 0, command.output()[-3000:]
    return ledger_lines(command.run_directory), read_metrics(command.run_directory)


def of_step(metrics, name):
    return [values[name] for step, values in sorted(metrics.items()) if name in values]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_twenty_steps(tmp_path, preset):
    lines, metrics = run_preset(tmp_path, preset)
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
