"""What fused steps may take, from measurements that are given here."""

import pytest

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.orchestration.fused_memory import GIB, FusedMemory, StepMemory
from rl.orchestration.fused_schedules import FusedModel
from rl.training.fused import FusedOutcome, StageMemory
from rl.training.offload import MemoryReport

MODELS = {
    "actor": FusedModel(ParallelLayout(world=4, pp=2), layers=8, hidden=64),
    "critic": FusedModel(ParallelLayout(world=4, pp=2, placement=((1, 0),)), layers=4, hidden=64),
}
ROWS = {"actor": 1000, "critic": 500}


def expected(name, stage, rows):
    """Of the actor 100 bytes a row are held in the first stage and 200 in the second; of the critic 10 and 20."""
    return {"actor": 100.0, "critic": 10.0}[name] * (stage + 1) * rows, {"actor": 7.0, "critic": 9.0}[name] * rows


def reports(*free, total=1_000_000):
    return [MemoryReport(0, 0, 0, total, each) for each in free]


def outcome(rows, held, passing):
    """Alike in all stages of both models."""
    stage = StageMemory(rows, held, passing)
    return FusedOutcome({}, {}, {}, 1.0, dict.fromkeys(MODELS, (stage, stage)), (1, 1))


@pytest.fixture
def memory():
    return FusedMemory(MODELS, expected, margin=0.1)


def test_before_anything_was_measured_models_are_counted(memory):
    step = memory.of_step(ROWS, reports(900_000, 800_000, 700_000, 950_000))
    assert step.activations == {"actor": (100_000, 200_000), "critic": (5_000, 10_000)}
    assert step.passing == (7_000, 7_000)
    # The fullest rank of each node, less a tenth of the device.
    assert step.free == (700_000, 600_000)
    assert step.caps == (693_000, 593_000)
    assert not step.measured


def test_measurements_take_over_and_scale_with_rows(memory):
    memory.observe(outcome(1000, held=50.0, passing=3.0))
    step = memory.of_step(ROWS, reports(*[900_000] * 4))
    assert step.measured
    assert step.activations == {"actor": (50_000, 50_000), "critic": (25_000, 25_000)}
    assert step.passing == (3_000, 3_000)
    # The first step made what is made once: a second one replaces it.
    memory.observe(outcome(1000, held=45.0, passing=3.0))
    assert memory.of_step(ROWS, reports(*[900_000] * 4)).activations["actor"] == (45_000, 45_000)
    # Then the most so far, of steps of a like size.
    memory.observe(outcome(800, held=60.0, passing=2.0))
    memory.observe(outcome(300, held=900.0, passing=900.0))
    step = memory.of_step({"actor": 2000, "critic": 100}, reports(*[900_000] * 4))
    assert step.activations == {"actor": (120_000, 120_000), "critic": (30_000, 30_000)}
    assert step.passing == (6_000, 6_000)
    # Much larger ones say more than all before.
    memory.observe(outcome(4000, held=40.0, passing=1.0))
    assert memory.of_step(ROWS, reports(*[900_000] * 4)).activations["actor"] == (80_000, 80_000)


def test_there_is_nothing_to_count_on_cpus(memory):
    assert memory.of_step(ROWS, [MemoryReport(1, 1, 1)] * 4) is None
    memory.observe(FusedOutcome({}, {}, {}, 1.0))
    assert not memory.of_step(ROWS, reports(*[900_000] * 4)).measured


def test_what_does_not_fit_is_told_with_figures():
    held = {"actor": (3.0 * GIB, 3.0 * GIB), "critic": (1.0 * GIB, 1.0 * GIB)}
    assert StepMemory(held, (1.0 * GIB,) * 2, (4.0 * GIB,) * 2, True).complaint(MODELS) == ""
    said = StepMemory(held, (1.0 * GIB, 1.5 * GIB), (3.9 * GIB, 4.2 * GIB), True).complaint(MODELS)
    assert said.startswith("one micro-batch of the actor takes 3.00 GiB on ranks of pipeline stage 1, and 1.50 GiB")
    assert "(measured), but 4.20 GiB are free; lower trainer.tokens_per_micro_batch" in said
    assert "\n" not in said
    none = StepMemory(held, (1.0 * GIB,) * 2, (0.5 * GIB, 9 * GIB), False).complaint(MODELS)
    assert "pipeline stage 0" in none
    assert "counted from the models" in none
