"""Whole runs whose gradients are reduced, and parameters gathered, beside the passes: the same losses."""

import pytest

from rl.metrics import read_metrics
from tests.rl.orchestration.command import Command, tiny_config


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_those_without(tmp_path):
    found = {}
    for overlap in (False, True):
        directory = tmp_path / str(overlap)
        directory.mkdir()
        config = tiny_config(
            directory,
            run__steps=3,
            reward__path="tests.rl.orchestration.rewards:of_tokens",
            algorithm__mini_batches=2,
            balance={"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0},
            stream={"colocated": True},
            rollout__engines=2,
            trainer__overlap=overlap,
        )
        command = Command(config)
        try:
            assert command.end(400) == 0, command.output()[-3000:]
        finally:
            command.kill()
        steps = read_metrics(command.run_directory).values()
        found[overlap] = [(m["train/loss"], m["train/grad_norm"]) for m in steps if "train/loss" in m]
    assert len(found[True]) == 3
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)
