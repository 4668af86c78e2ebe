"""Whole runs of each family of models: rollout with captured routes, balanced training on them, weights to engines."""

from __future__ import annotations

import math

import pytest

from megatron_ultraep.telemetry import read
from rl.metrics import read_metrics
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

STEPS = 2
FAMILIES = {
    "qwen2_moe": {"layers": 3, "mlp_only_layers": [1]},
    "olmoe": {"layers": 2},
    "glm4_moe": {"layers": 3, "topk": 4, "groups": 4, "chosen_groups": 2},
    "deepseek_v3": {"layers": 3},
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_balanced_run(tmp_path, family):
    config = tiny_config(
        tmp_path,
        run__steps=STEPS,
        model__create=f"rl.models.tiny:{family}",
        model__create_args=FAMILIES[family],
        reward__path="tests.rl.orchestration.rewards:of_tokens",
        balance={"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0},
    )
    command = Command(config)
    assert command.end(1000) == 0, command.output()[-3000:]
    lines = ledger_lines(command.run_directory)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(len(line["route_digests"]) == 2 * 4 for line in lines)
    metrics = read_metrics(command.run_directory)
    for name, bar in (("train/rollout_logprob_abs_diff", 1e-4), ("train/grad_norm", math.inf)):
        values = [of_step[name] for of_step in metrics.values() if name in of_step]
        assert len(values) == STEPS
        assert all(0 < value < bar for value in values), (name, values)
    layers = {record.layer for record in read(command.run_directory)}
    # Megatron counts all layers from 1; dense ones have no record.
    assert layers == {"qwen2_moe": {1, 3}, "olmoe": {1, 2}}.get(family, {2, 3})
