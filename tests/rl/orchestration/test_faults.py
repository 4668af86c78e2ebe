"""Killed at random points and resumed, a run takes every prompt exactly once, and leaves nothing behind."""

import random
import signal
import time

import pytest

from rl.ledger import Ledger
from rl.training import checkpoint
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

PROMPTS = 32
VICTIMS = {"driver": None, "engine": "EngineActor", "trainer": "TrainerActor"}


@pytest.mark.timeout(1200)
def test_every_prompt_exactly_once_however_often_it_is_killed(tmp_path):
    config = tiny_config(tmp_path, stream__max_restarts=0)  # else a dead engine would be replaced
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    # Each at least once, in any order.
    victims = [*VICTIMS, *rng.choices(list(VICTIMS), k=2)]
    rng.shuffle(victims)
    print(f"seed {seed}: {victims}")
    for victim in victims:
        command = Command(config, "--resume", "auto")
        try:
            begin = command.steps()
            wanted = begin + rng.choice([0, 1, 2])
            command.wait_for(lambda c=command: c.actors("EngineActor") and c.actors("TrainerActor"), 120, "actors")
            command.wait_for(lambda c=command, n=wanted: c.steps() != n - 1 and c.steps() >= n, 180, f"step {wanted}")
            time.sleep(rng.uniform(0, 2.0))
            if victim == "driver":
                command.process.send_signal(signal.SIGKILL)
            else:
                rng.choice(command.actors(VICTIMS[victim])).send_signal(signal.SIGKILL)
            code = command.end()
            print(f"killed the {victim} after {command.steps()} steps: exit code {code}")
            assert code == (-signal.SIGKILL if victim == "driver" else 1), command.output()[-3000:]
            if victim != "driver":
                named = "engine 0" if victim == "engine" else "trainer rank"
                assert named in command.output().rsplit("run failed:", 1)[1]
            assert command.orphans() == []
        finally:
            command.kill()
    command = Command(config, "--resume", "auto")
    assert command.end(300) == 0, command.output()[-3000:]
    assert command.orphans() == []
    ledger = Ledger.read(tmp_path / "run")
    ledger.verify_exactly_once(0, PROMPTS)
    assert len(ledger.run["sessions"]) == len(victims) + 1
    # Weights went to the engines once a step: versions rise, and no sample is trained on twice.
    lines = ledger_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    samples = [s for line in lines for s in line["sample_ids"]]
    assert len(samples) == len(set(samples))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_saves_a_checkpoint_and_leaves_nothing(tmp_path, name):
    command = Command(tiny_config(tmp_path, checkpoint__every=0))
    try:
        command.wait_for(lambda: command.steps() >= 2, 240, "two steps")
        command.descendants()
        command.process.send_signal(getattr(signal, name))
        assert command.end() == 130, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    done = command.steps()
    saved = checkpoint.loop_state(checkpoint.complete(tmp_path / "run" / "checkpoints")[-1])["step"]
    # In the middle of an optimizer step there is no whole state to save: then the one before is what there is.
    assert saved == done or "continues from step 0" in command.output()
    assert "--resume" in command.output()
    assert Ledger.read(tmp_path / "run").run["sessions"][-1]["outcome"] == "interrupted"


@pytest.mark.timeout(600)
def test_sigusr1_stops_after_the_iteration_and_resume_goes_on(tmp_path):
    config = tiny_config(tmp_path, checkpoint__every=0)
    command = Command(config)
    try:
        command.wait_for(lambda: command.steps() >= 1, 240, "a step")
        command.process.send_signal(signal.SIGUSR1)
        assert command.end() == 75, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    done = command.steps()
    total = PROMPTS // 2
    assert 1 <= done < total, "the run was over before it was asked to stop"
    assert checkpoint.loop_state(checkpoint.complete(tmp_path / "run" / "checkpoints")[-1])["step"] == done
    ledger = Ledger.read(tmp_path / "run")
    assert ledger.run["sessions"][-1]["outcome"] == "stopped"
    assert ledger.last_step == done
    assert not (tmp_path / "run" / "steps.rolled_back.jsonl").exists()
