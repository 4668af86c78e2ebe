"""Passes beside the tail of generation give what they give after it, whatever runs them, and are not repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.metrics import METRICS, read_metrics
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.orchestration.blocks import blocks_of, mini_batch_on
from rl.orchestration.experience import Packing
from rl.orchestration.tail import Inferred, Work
from rl.rollout.streams import TailReport
from rl.simulation.threshold import Choice
from rl.timeline import read_timeline
from rl.training.batch import TrainSample
from rl.training.passes import PassSettings
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config
from tests.rl.training.common import make_samples, make_worker

STEPS = 4
# Half of the prompts are many times as long as the others.
LENGTHS = {"sampling__max_tokens": 60, "sampling__forced_lengths": {"median": 8, "sigma": 1.5}}
PROFILE = "benchmarks/data/latency-tiny-cpu.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("tail") / "m", seed=3))


def in_parts(directory: str, layout: dict[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """Log-probs of all samples at once, and in chunks of which the first runs on the last block of ranks only."""
    worker = make_worker(directory, layout, dtype="float64", distributed_optimizer=False, reference=True)
    rank, settings = dist.get_rank(), PassSettings(temperature=0.7)
    samples = make_samples(read_architecture(directory))
    packing = Packing(worker.spec.layout, 64)
    everyone = tuple(range(worker.spec.layout.world))

    def run(chunk: list[TrainSample], ranks: tuple[int, ...], first: int) -> dict[str, np.ndarray]:
        if rank not in ranks:
            return {}
        part = mini_batch_on(packing, chunk, ranks).part(worker.groups.coordinates["dp"])
        found = {}
        for model, routes in (("actor", "replay"), ("reference", "own")):
            values, _ = worker.logprobs(part, model, "old_logprob", 0, routes, settings, None, first)
            found |= {f"{model} {name}": value for name, value in values.items()}
        return found

    whole = run(samples, everyone, 0)
    parts = run(samples[:4], blocks_of(worker.spec.layout)[-1], 100)
    dist.barrier()
    parts |= run(samples[4:7], everyone, 200)
    parts |= run(samples[7:], everyone, 300)
    return {"whole": whole, "parts": parts}


@pytest.mark.parametrize("layout", [{"ep": 2}, {"pp": 2}, {"tp": 2, "ep": 2}])
def test_chunks_and_blocks_give_the_same_numbers(ranks: Any, directory: str, layout: dict[str, int]) -> None:
    assert len(blocks_of(ParallelLayout(4, **layout))) == 2
    results = ranks(4).run(in_parts, directory, layout)
    whole, parts = ({n: v for r in results for n, v in r[key].items()} for key in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert len(whole) == 20
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=0, atol=1e-10)


def test_what_is_known_of_other_tokens_does_not_count() -> None:
    found = Inferred(tokens={"values": {"a": np.arange(5)}})
    mask = np.ones(5, bool)
    assert found.has("values", TrainSample("a", np.arange(5), mask))
    assert not found.has("reference", TrainSample("a", np.arange(5), mask))
    assert not found.has("values", TrainSample("a", np.arange(5) + 1, mask))
    assert not found.has("values", TrainSample("b", np.arange(5), mask))


def test_metrics_count_what_was_hidden() -> None:
    report = TailReport(began=90.0, gathered=91.0, unfinished=4, kept=(0,), freed=(1, 2), moved=3, kept_tokens=70)
    work = [
        Work("old_logprob", 92.0, 96.0, 0.5, 30),
        Work("reference", 98.0, 103.0, 0.5, 10),
        Work("old_logprob", 104.0, 106.0, 1.0, 60),
    ]
    found = Inferred(work=work, report=report)
    found.batch_done = 100.0
    metrics = found.metrics(Choice(4, False, "", 8.0, 10.0))
    assert metrics == {
        "fuse/tail/threshold": 4.0,
        "fuse/tail/migrated_samples": 3.0,
        "fuse/tail/kept_tokens": 70.0,
        "fuse/tail/freed_engines": 2.0,
        "fuse/tail/seconds": 10.0,
        "fuse/tail/hidden_seconds": 4.0 + 2.0,
        "fuse/tail/hidden_fraction": 0.4,
        "fuse/tail/predicted_saving_seconds": 2.0,
    }
    assert set(metrics) <= set(METRICS)
    assert found.seconds_per_token(4) == pytest.approx(4 * ((4 * 0.5 + 2 * 1.0) / 90 + 5 * 0.5 / 10))


def run(directory: Path, **changes: Any) -> list[dict[str, float]]:
    """A whole run of a few steps; metrics of each."""
    directory.mkdir()
    settings = {
        "data__prompts_per_step": 6,
        "data__train": {"reasoning_gym": "chain_sum", "args": {}, "size": 64, "seed": 0},
        "run__steps": STEPS,
        "rollout__engines": 2,
        "trainer__optimizer": {"lr": 1e-4},
        "algorithm__kl": {"coef": 0.01},
        "reward__path": "tests.rl.orchestration.rewards:of_tokens",
        "evaluation__at_start": False,
        "evaluation__at_end": False,
        "checkpoint__every": 0,
    }
    command = Command(tiny_config(directory, **(settings | LENGTHS | changes)))
    assert command.end(400) == 0, command.output()[-3000:]
    assert command.orphans() == []
    return [m for m in read_metrics(directory / "run").values() if "perf/step_time" in m]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("critic", [False, True], ids=["grpo", "ppo"])
def test_beside_generation_the_same_numbers(tmp_path: Path, critic: bool) -> None:
    """Trainer ranks of their own: nothing moves, and passes run whenever samples are there; a critic's too."""
    names = ["train/loss", "train/grad_norm", "train/kl", "rollout/reward/mean"]
    changes: dict[str, Any] = {}
    if critic:
        names += ["critic/loss", "critic/grad_norm", "critic/values/mean"]
        changes = {"algorithm__advantage": "gae", "critic": {"parallel": {"pp": 2}}}
    plain = run(tmp_path / "plain", **changes)
    found = run(tmp_path / "tail", **changes, fuse__tail={"enabled": True, "chunk_tokens": 100})
    for mine, theirs in zip(found, plain, strict=True):
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
        assert mine["train/grad_norm"] > 0.01
        assert mine["fuse/tail/migrated_samples"] == 0
    assert sum(m["fuse/tail/hidden_fraction"] for m in found) > 0.2
    if critic:
        spans = {e["name"] for e in read_timeline(tmp_path / "tail" / "run" / "timeline.json")}
        assert {"values", "reference", "old_logprob", "train_critic"} <= spans
    (reason,) = {line["extra"]["tail"]["reason"] for line in ledger_lines(tmp_path / "tail" / "run")}
    assert "devices of their own" in reason


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("threshold", [10, "auto"])
def test_colocated_the_tail_is_gathered(tmp_path: Path, threshold: Any) -> None:
    """Samples that move draw other tokens, so the test is that old log-probs are those of the step: the ratio is 1."""
    found = run(
        tmp_path / "tail",
        stream__colocated=True,
        stream__latency_profile=PROFILE,
        fuse__tail={"enabled": True, "threshold": threshold, "chunk_tokens": 100},
    )
    for metrics in found:
        assert abs(metrics["train/ppo_kl"]) < 1e-5
        assert metrics["train/pg_clipfrac"] == 0
        assert metrics["train/rollout_logprob_abs_diff"] < 1e-3
    lines = ledger_lines(tmp_path / "tail" / "run")
    choices = [line["extra"]["tail"] for line in lines]
    assert len({s for line in lines for s in line["sample_ids"]}) == STEPS * 6 * 4
    if threshold == "auto":
        assert choices[0]["reason"] == "no lengths have been seen yet"
        assert "first lengths" in choices[1]["reason"]
        return
    assert sum(m["fuse/tail/migrated_samples"] for m in found) > 0
    assert sum(m["fuse/tail/kept_tokens"] for m in found) > 0
    assert sum(m["fuse/tail/hidden_fraction"] for m in found) > 0
    assert {choice["threshold"] for choice in choices} == {10}
    names = {e["name"] for e in read_timeline(tmp_path / "tail" / "run" / "timeline.json")}
    assert {"migrate", "old_logprob", "reference"} <= names
