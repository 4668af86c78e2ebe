"""Fused steps as the loop takes them, where memory decides whether there are any."""

from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.pipeline.baselines import one_at_a_time
from rl.config import from_dict
from rl.orchestration import fused_schedules
from rl.orchestration.ahead import Pass
from rl.orchestration.experience import Packing
from rl.orchestration.fused import FusedTraining
from rl.orchestration.fused_memory import GIB, FusedMemory
from rl.orchestration.fused_schedules import FusedModel, FusedSchedules
from rl.training.batch import TrainSample
from rl.training.fused import FusedOutcome, StageMemory, StageSeconds
from rl.training.offload import MemoryReport
from rl.training.passes import PassSettings
from tests.rl.test_config import PPO, changed

LAYOUT = ParallelLayout(world=2, pp=2)
PP2 = [("trainer.ranks", 2), ("trainer.parallel", {"pp": 2})]
CHANGES = {"critic": [*PP2, *PPO], "reference": [*PP2, ("algorithm.kl.coef", 0.1), ("algorithm.mini_batches", 2)]}
# 16 rows in a micro-batch of two samples: 1 GiB is held and as much passes.
EXPECTED = GIB / 16


class Pool:
    """Solves at once."""

    def __init__(self, *_, **__):
        self.solved = 0

    def submit(self, solve, problem, seconds):
        self.solved += 1
        future = Future()
        future.set_result(one_at_a_time(problem))
        return future


class FakeTrainer:
    """Notes what it is asked to do; ``free`` GiB on each rank."""

    def __init__(self):
        self.free, self.asked = 0.0, []
        self.spec = SimpleNamespace(layout_of=lambda name: LAYOUT)

    def memory(self):
        return [MemoryReport(0, 0, 0, 10 * GIB, round(self.free * GIB))] * 2

    def train(self, batch, objective, *, plans=None, model="actor"):
        self.asked.append(f"train {model}")
        return f"outcome of {model}"

    def logprobs(self, batch, model, pass_, *, routes, settings):
        self.asked.append(f"logprobs {model}, {routes}")
        return {batch.layout.sample_ids[0]: np.zeros(3)}, None

    def train_fused(self, schedule, parts):
        self.asked.append(f"fused {' '.join(part.model for part in parts)}")
        stage = StageMemory(16, GIB / 8, GIB / 32)
        names = [part.model for part in parts]
        seconds = (StageSeconds(1.0, 2.0),) * 2
        return FusedOutcome(
            {}, {}, dict.fromkeys(names, seconds), 3.0, dict.fromkeys(names, (stage,) * 2), (GIB, 2 * GIB)
        )


def samples():
    mask = np.arange(9) > 5
    return [TrainSample(name, np.arange(9, dtype=np.int32), mask) for name in "abcd"]


@pytest.fixture(params=["critic", "reference"])
def run(request, monkeypatch):
    """A run's fused training, its trainer and what it says."""
    monkeypatch.setattr(fused_schedules, "ProcessPoolExecutor", Pool)
    partner = request.param
    models = {
        "actor": FusedModel(LAYOUT, layers=2, hidden=8),
        partner: FusedModel(LAYOUT.opposed(2), layers=2, hidden=8, forward_only=partner == "reference"),
    }
    memory = FusedMemory(models, lambda name, stage, rows: (EXPECTED * rows, EXPECTED * rows), margin=0.1)
    fused = FusedTraining(partner, FusedSchedules(models, solve_s=1.0, drift=0.2), memory)
    said = []
    packing = Packing(LAYOUT, 16)
    return SimpleNamespace(
        config=from_dict(changed(*CHANGES[partner])),
        arch=SimpleNamespace(is_moe=True),
        fused=fused,
        trainer=FakeTrainer(),
        packing=packing,
        packing_of=lambda name: packing,
        phase=lambda name: nullcontext(),
        settings=PassSettings,
        say=said.append,
        said=said,
    )


def step(run):
    planned = Pass(run.packing.layout_of(samples()))
    if run.fused.partner == "critic":
        return run.fused.with_critic(run, samples(), planned, None)
    return run.fused.with_reference(run, samples(), planned, None, samples())


def test_without_room_models_run_one_after_the_other(run):
    run.trainer.free = 2.5
    run.fused.begin(run, [samples(), samples()])
    outcome = step(run)
    step(run)
    assert run.fused.schedules._pool.solved == 0
    assert outcome.learnt["actor"] == "outcome of actor"
    if run.fused.partner == "critic":
        assert run.trainer.asked == ["train critic", "train actor"] * 2
        assert outcome.learnt["critic"] == "outcome of critic"
    else:
        assert run.trainer.asked == ["logprobs reference, own", "train actor"] * 2
        assert set(outcome.logprobs["reference"]) == {"a"}
    [line] = run.said
    assert line.startswith("fused training: off: one micro-batch of the ")
    assert "takes 1.00 GiB" in line
    assert "but 1.50 GiB are free; lower trainer.tokens_per_micro_batch" in line
    noted = run.fused.to_json()
    assert (noted["partner"], noted["steps"]) == (run.fused.partner, 0)
    assert noted["off"] in line
    assert run.fused.metrics() == {}


def test_with_room_steps_are_fused_and_keep_what_they_took(run):
    run.trainer.free = 2.5
    step(run)
    run.trainer.free, run.trainer.asked = 5.0, []
    run.fused.begin(run, [samples(), samples()])
    assert run.fused.schedules._pool.solved == 1
    step(run)
    # Operations held twice as much as expected, and half as much passed.
    run.trainer.free = 3.6
    step(run)
    assert run.trainer.asked == [f"fused actor {run.fused.partner}"] * 2
    assert [line.startswith("fused training: off") for line in run.said] == [True, False]
    assert run.said[1] == f"fused training: on, the {run.fused.partner} in the actor's pipeline bubbles"
    noted = run.fused.to_json()
    assert noted["steps"] == 2
    assert noted["cap_gib"] == [2.6, 2.6]
    assert noted["planned_peak_gib"] == [2.5, 2.5]
    assert noted["peak_gib"] == [1.0, 2.0]
    metrics = run.fused.metrics()
    assert metrics["fuse/training/planned_peak_gib"] == pytest.approx((2.0 + 2.5) / 2)
    assert metrics["fuse/training/peak_gib"] == 2.0
    run.trainer.free = 3.4
    step(run)
    assert "(measured), but 2.40 GiB are free" in run.said[2]
