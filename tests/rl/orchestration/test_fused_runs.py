"""Whole runs with fused training: the same losses as without, and what they write down."""

import pytest

from rl.metrics import read_metrics
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMON = {"run__steps": 3, "data__prompts_per_step": 4, "sampling__max_tokens": 24, "trainer__parallel": {"pp": 2}}
PPO = {"algorithm__advantage": "gae", "critic": {"optimizer": {"lr": 1e-3}, "warmup_steps": 1}}
GRPO = {"algorithm__kl__coef": 0.1, "algorithm__mini_batches": 2, "trainer__parallel": {"pp": 2}}
NAMES = ("train/loss", "train/kl", "train/grad_norm", "critic/loss", "critic/grad_norm")


def train(directory, mode, changes, module="rl.cli"):
    directory.mkdir()
    # Few tokens a micro-batch: a pipeline wants several.
    config = tiny_config(directory, **COMMON | changes, fuse__training={"mode": mode, "solve_s": 1.0})
    command = Command(config, module=module)
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
    assert len(fused) == len(plain) == 3
    for ours, theirs in zip(fused, plain, strict=True):
        for name in NAMES:
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


@pytest.mark.parametrize(("changes", "partner"), [(PPO, "critic"), (GRPO, "reference")], ids=["ppo", "grpo"])
def test_without_room_losses_are_the_same_and_with_room_steps_are_fused(tmp_path, changes, partner):
    """Trainer ranks say that they are GPUs: full in the first iteration that could be fused, then not."""
    module = "tests.rl.orchestration.made_up_memory"
    command, fused, lines = train(tmp_path / "full", "on", changes, module)
    _, plain, _ = train(tmp_path / "off", "off", changes)
    assert "fused training: off: one micro-batch of the actor takes 1.00 GiB" in command.output()
    assert f"fused training: on, the {partner} in the actor's pipeline bubbles" in command.output()
    for ours, theirs in zip(fused, plain, strict=True):
        for name in NAMES:
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name
    noted = [line["extra"]["fused"] for line in lines if "fused" in line["extra"]]
    assert "but 0.00 GiB are free" in noted[0]["off"]
    assert noted[-1]["cap_gib"] == [80.0, 80.0]
    assert 2 <= max(noted[-1]["planned_peak_gib"]) <= 80
    assert fused[-1]["fuse/training/planned_peak_gib"] == pytest.approx(max(noted[-1]["planned_peak_gib"]))


def test_grpo_alone_says_why_nothing_is_fused(tmp_path):
    command, _, lines = train(tmp_path / "run", "auto", {"run__steps": 1})
    assert "fused training: off: grpo without a critic and without a reference" in command.output()
    assert "fused" not in lines[0]["extra"]
