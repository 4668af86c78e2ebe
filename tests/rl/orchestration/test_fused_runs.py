"""Whole runs with fused training: the same losses as without, and what they write down."""

import pytest

from rl.metrics import read_metrics
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMON = {"run__steps": 3, "data__prompts_per_step": 4, "sampling__max_tokens": 24, "trainer__parallel": {"pp": 2}}
PPO = {"algorithm__advantage": "gae", "critic": {"optimizer": {"lr": 1e-3}, "warmup_steps": 1}}
GRPO = {"algorithm__kl__coef": 0.1, "algorithm__mini_batches": 2, "trainer__parallel": {"pp": 2}}


def train(directory, mode, changes):
    directory.mkdir()
    # Few tokens a micro-batch: a pipeline wants several.
    config = tiny_config(directory, **COMMON | changes, fuse__training={"mode": mode, "solve_s": 1.0})
    command = Command(config)
    try:
        assert command.end(400) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    steps = [m for m in read_metrics(directory / "run").values() if "train/loss" in m or "critic/loss" in m]
    return command, steps, ledger_lines(directory / "run")


@pytest.mark.parametrize(
    ("changes", "partner", "fused_steps"),
    [(PPO, "critic", [0, 1, 1]), (GRPO, "reference", [1, 1, 1])],
    ids=["ppo", "grpo with a reference"],
)
def test_losses_are_those_of_one_model_after_the_other(tmp_path, changes, partner, fused_steps):
    command, fused, lines = train(tmp_path / "on", "on", changes)
    _, plain, _ = train(tmp_path / "off", "off", changes)
    assert f"fused training: on, the {partner} in the actor's pipeline bubbles" in command.output()
    names = ("train/loss", "train/kl", "train/grad_norm", "critic/loss", "critic/grad_norm")
    assert len(fused) == len(plain) == 3
    for ours, theirs in zip(fused, plain, strict=True):
        for name in names:
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name
    assert [line["extra"].get("fused", {}).get("steps", 0) for line in lines] == fused_steps
    last = lines[-1]["extra"]["fused"]
    assert last["partner"] == partner
    assert last["makespan_s"] > 0
    assert last["predicted_s"] > 0
    assert fused[-1]["fuse/training/over_bound"] >= 1
    assert not any("fuse/training/makespan" in m for m in plain)


def test_grpo_alone_says_why_nothing_is_fused(tmp_path):
    command, _, lines = train(tmp_path / "run", "auto", {"run__steps": 1})
    assert "fused training: off: grpo without a critic and without a reference" in command.output()
    assert "fused" not in lines[0]["extra"]
