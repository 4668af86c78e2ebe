"""Whole runs that stream: the same numbers as synchronous ones where nothing is stale, bounded staleness elsewhere."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rl.ledger import Ledger
from rl.metrics import read_metrics
from rl.timeline import read_timeline
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

STEPS = 6
LENGTHS = {"sampling__max_tokens": 24, "sampling__forced_lengths": {"median": 6, "sigma": 1.0}}


def run(directory: Path, **changes: Any) -> list[dict[str, float]]:
    """A whole run of a few steps; metrics of each."""
    directory.mkdir()
    settings = {"data__prompts_per_step": 4, "run__steps": STEPS, "trainer__optimizer": {"lr": 1e-4}} | LENGTHS
    command = Command(tiny_config(directory, **(settings | changes)))
    assert command.end(300) == 0, command.output()[-3000:]
    assert command.orphans() == []
    return [m for m in read_metrics(directory / "run").values() if "perf/step_time" in m]


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(tmp_path_factory.mktemp("stream") / "sync")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "changes",
    [
        {"stream__pipelining": True, "stream__chunk_tokens": 100},
        {"stream__pipelining": True, "stream__chunk_tokens": 100, "rollout__engines": 2, "stream__buffer_groups": 2},
        {"stream__colocated": True},
        {"stream__dispatch": "longest_first", "stream__predictor": "history"},
        {
            "stream__dispatch": "skew_aware",
            "stream__predictor": "ranker",
            "stream__latency_profile": "benchmarks/data/latency-tiny-cpu.json",
            "rollout__engines": 2,
        },
        {
            "stream__pipelining": True,
            "stream__chunk_tokens": 100,
            "balance": {"enabled": True, "foresight": True, "reorder": True, "reorder_by": "previous", "gate": False},
        },
    ],
    ids=["pipelining", "two engines", "colocated", "longest first", "skew aware", "foresight"],
)
def test_nothing_stale_the_same_numbers(
    tmp_path: Path, synchronous: list[dict[str, float]], changes: dict[str, Any]
) -> None:
    found = run(tmp_path / "run", **changes)
    for mine, theirs in zip(found, synchronous, strict=True):
        for name in ("train/loss", "train/grad_norm", "rollout/reward/mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
        assert mine["stream/staleness/max"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("in_flight", ["finish", "continue"])
def test_staleness_is_bounded_and_used(tmp_path: Path, in_flight: str) -> None:
    found = run(
        tmp_path / "run",
        stream__staleness=2,
        stream__in_flight=in_flight,
        sampling__max_tokens=100,
        sampling__forced_lengths={"median": 60, "sigma": 0.5},
    )
    assert max(m["stream/staleness/max"] for m in found) in (1, 2)
    assert all("train/importance_weight" in m for m in found), "stale samples are corrected by default"
    lines = ledger_lines(tmp_path / "run" / "run")
    taken = [tuple(p) for line in lines for p in line["consumed"]]
    assert len(set(taken)) == len(taken) == STEPS * 4
    names = {e["name"] for e in read_timeline(tmp_path / "run" / "run" / "timeline.json")}
    assert {"train", "old_logprob", "export", "weights of step 1"} <= names


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prompts_once_whatever_is_killed(tmp_path: Path) -> None:
    """An engine that dies is replaced and the run goes on; a driver that dies is resumed, in flight batches again."""
    config = tiny_config(
        tmp_path,
        data__prompts_per_step=4,
        rollout__engines=2,
        stream__staleness=1,
        stream__max_restarts=5,
        sampling__max_tokens=100,
        sampling__forced_lengths={"median": 60, "sigma": 0.5},
    )
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(2):
        command = Command(config, "--resume", "auto")
        try:
            begin = command.steps()
            command.wait_for(
                lambda c=command, b=begin: len(c.actors("EngineActor")) >= 2 and c.steps() > b, 180, "a step"
            )
            rng.choice(command.actors("EngineActor")).send_signal(signal.SIGKILL)
            time.sleep(rng.uniform(0, 3))
            if command.process.poll() is None:
                command.process.send_signal(signal.SIGKILL)
            command.end()
        finally:
            command.kill()
    command = Command(config, "--resume", "auto")
    try:
        begin = command.steps()
        command.wait_for(lambda: len(command.actors("EngineActor")) >= 2 and command.steps() > begin, 180, "a step")
        rng.choice(command.actors("EngineActor")).send_signal(signal.SIGKILL)
        assert command.end(300) == 0, command.output()[-3000:]
    finally:
        command.kill()
    ledger = Ledger.read(tmp_path / "run")
    ledger.verify_exactly_once(0, 32)
    samples = [s for record in ledger.records for s in record.sample_ids]
    assert len(samples) == len(set(samples))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][-1]["outcome"] == "finished"
