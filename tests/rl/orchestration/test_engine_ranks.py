"""Whole runs with an engine of two tensor-parallel ranks."""

import pytest

from rl.metrics import read_metrics
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

STEPS = 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transfer", ["store", "gloo"])
def test_rollout_and_training_agree_and_nothing_is_left(tmp_path, transfer):
    config = tiny_config(
        tmp_path,
        run__steps=STEPS,
        rollout__tensor_parallel=2,
        stream={"transfer": transfer},
        balance={"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0},
        profile={"steps": [2], "engines": True},
    )
    command = Command(config)
    try:
        assert command.end(600) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    lines = ledger_lines(command.run_directory)
    assert [line["step"] for line in lines] == [1, 2]
    metrics = read_metrics(command.run_directory)
    for step in (1, 2):
        # Step 2 was sampled with weights that the trainer sent.
        assert 0 < metrics[step]["train/rollout_logprob_abs_diff"] <= 1e-4
    assert "from the object store" not in command.output(), "a direct transfer broke off"
    assert (command.run_directory / "profile" / "step_00002_engine_0.json.gz").is_file()
