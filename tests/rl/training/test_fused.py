"""Fused steps: gradients and log-probs are those of the models one after the other."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.pipeline.baselines import concatenated, random_schedule
from megatron_ultraep.pipeline.memory import MemoryReading
from megatron_ultraep.pipeline.problem import PipelineModel, Problem, Schedule
from megatron_ultraep.pipeline.simulate import simulate
from rl.models import tiny
from rl.models.weights import export_weights
from rl.training.accumulate import AccumulationError
from rl.training.fused import (
    FusedPart,
    FusedResult,
    Fusion,
    Learning,
    StageMemory,
    StageSeconds,
    TakingLogprobs,
    fused_outcome,
)
from rl.training.passes import PassSettings
from tests.ranks import RankError
from tests.rl.training.common import make_worker, merge, worst
from tests.rl.training.critics import POLICY, VALUES, critic_samples, critic_worker, part_of, with_head
from tests.rl.training.planning import BALANCE

FP64 = {"dtype": "float64", "distributed_optimizer": False}
SETTINGS = PassSettings(chunk_tokens=16)
REVERSED, REPLICAS = ((1, 0),), ((0,), (1,))
CASES = {
    # world, actor, critic, spec
    "pp2, reversed": (2, {"pp": 2}, {"pp": 2, "placement": REVERSED}, {}),
    "pp2, two replicas": (2, {"pp": 2}, {"placement": REPLICAS}, {}),
    "pp2xep2, reversed, balanced, recomputed": (
        4,
        {"pp": 2, "ep": 2},
        {"pp": 2, "ep": 2, "placement": REVERSED},
        {"balance": BALANCE, "recompute": ("full",)},
    ),
    # Stages of the actor send each other float32, the critic's bfloat16.
    "pp2, reversed, float32 stream": (
        2,
        {"pp": 2},
        {"pp": 2, "placement": REVERSED},
        {"dtype": "bfloat16", "float32_residual": True},
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return with_head(tiny.qwen3_moe(tmp_path_factory.mktemp("fused") / "m", seed=3, layers=3, tie_word_embeddings=True))


def problem_of(worker, batches, forward_only=False):
    """The problem of a fused step, with made-up times."""
    nodes = worker.spec.layout.pp
    models = []
    for name, batch in batches.items():
        layout = worker.spec.layout_of(name)
        placement = layout.placement or (tuple(range(nodes)),)
        microbatches = len(batch.layout.micro_batches[0])
        backward = 0.0 if forward_only and name != "actor" else 2.0
        stages = layout.pp
        models.append(
            PipelineModel(
                name,
                placement,
                microbatches,
                (1.0,) * stages,
                (backward,) * stages,
                (1.0,) * stages,
                forward_only=not backward,
            )
        )
    return Problem(nodes, tuple(models))


def gradients_of(worker, name):
    return {n: t.double().numpy().copy() for n, t in export_weights(worker.trained[name].model, source="main_grad")}


def found_of(worker, results):
    return {
        name: {
            "loss": result.loss,
            "sums": result.sums,
            "tensors": gradients_of(worker, name),
            "digests": result.routes.digests,
        }
        for name, result in results.items()
    }


def step(directory, layout, critic, fused, spec):
    """Both models' gradients from a fused step, or from two steps."""
    worker = critic_worker(directory, layout, critic, **FP64 | spec)
    samples = critic_samples(worker.actor.arch)
    objectives = {"actor": POLICY, "critic": VALUES}
    batches = {name: part_of(worker, name, samples) for name in objectives}
    if not fused:
        return found_of(worker, {n: worker.train(batches[n], 0, objectives[n], model=n) for n in objectives})
    fusion, problem = Fusion(worker, 60.0), problem_of(worker, batches)
    for schedule in (concatenated(problem), random_schedule(problem, seed=5)):
        result = fusion.train(
            schedule, [FusedPart(n, batches[n], 0, Learning(objectives[n], lr=0.0)) for n in objectives]
        )
        assert set(result.stages) == set(objectives)
        assert all(s.forward > 0 and s.backward > 0 for s in result.stages.values())
        assert 0 < max(s.forward for s in result.stages.values()) < result.makespan
    return found_of(worker, result.learnt)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_after_the_other(ranks, directory, case):
    world, actor, critic, spec = CASES[case]
    alone = ranks(world).run(step, directory, actor, critic, False, spec)
    fused = ranks(world).run(step, directory, actor, critic, True, spec)
    for name in ("actor", "critic"):
        want, got = (merge([r[name] for r in results]) for results in (alone, fused))
        assert worst(got["tensors"], want["tensors"]) <= 1e-8
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-9)
        assert got["sums"] == pytest.approx(want["sums"], abs=1e-6)
        assert set(got["digests"]) == set(want["digests"])
        assert all(np.array_equal(got["digests"][s], want["digests"][s]) for s in want["digests"])


def with_reference(directory, fused):
    """Log-probs of a reference whose stages run in the other direction, and the actor's gradients."""
    worker = make_worker(
        directory,
        {"pp": 2},
        reference=True,
        reference_layout=ParallelLayout(world=2, pp=2, placement=REVERSED),
        **FP64,
    )
    samples = critic_samples(worker.actor.arch)
    batches = {name: part_of(worker, name, samples) for name in ("actor", "reference")}
    if not fused:
        taken, _ = worker.logprobs(batches["reference"], "reference", "old_logprob", 0, "own", SETTINGS)
        return taken, found_of(worker, {"actor": worker.train(batches["actor"], 0, POLICY)})["actor"]
    schedule = random_schedule(problem_of(worker, batches, forward_only=True), seed=7)
    parts = [
        FusedPart("reference", batches["reference"], 0, TakingLogprobs(SETTINGS)),
        FusedPart("actor", batches["actor"], 0, Learning(POLICY)),
    ]
    result = Fusion(worker, 60.0).train(schedule, parts)
    assert result.stages["reference"].backward == 0
    return result.logprobs["reference"][0], found_of(worker, result.learnt)["actor"]


def test_a_reference_takes_log_probs_while_the_actor_learns(ranks, directory):
    alone, fused = (ranks(2).run(with_reference, directory, how) for how in (False, True))
    want, got = ({k: v for taken, _ in results for k, v in taken.items()} for results in (alone, fused))
    assert worst(got, want) == 0
    want, got = (merge([found for _, found in results]) for results in (alone, fused))
    assert worst(got["tensors"], want["tensors"]) <= 1e-8


def with_an_open_set(directory):
    worker = critic_worker(directory, {"pp": 2}, {"pp": 2, "placement": REVERSED}, **FP64)
    samples = critic_samples(worker.actor.arch)
    batches = {name: part_of(worker, name, samples) for name in ("actor", "critic")}
    worker.accumulate(batches["critic"], 0, VALUES, first=True, model="critic")
    parts = [
        FusedPart("actor", batches["actor"], 0, Learning(POLICY)),
        FusedPart("critic", batches["critic"], 0, Learning(VALUES)),
    ]
    try:
        Fusion(worker, 60.0).train(concatenated(problem_of(worker, batches)), parts)
    except AccumulationError as error:
        raise RuntimeError(f"refused: {error}") from error


def test_an_open_set_is_not_emptied(ranks, directory):
    with pytest.raises(RankError, match="refused: a fused step would empty the gradients"):
        ranks(2).run(with_an_open_set, directory)


class Growing:
    """Readings of a device that takes 1,000,000 bytes more from each to the next, with peaks 500 above."""

    def __init__(self):
        self.read = 0

    def __call__(self):
        self.read += 1
        return MemoryReading(10**6 * self.read, 10**6 * self.read + 500)


def counted(directory):
    """Memory of a fused step, with and without readings, and the rows of micro-batches."""
    worker = critic_worker(directory, {"pp": 2}, {"pp": 2, "placement": REVERSED}, **FP64)
    samples = critic_samples(worker.actor.arch)
    batches = {name: part_of(worker, name, samples) for name in ("actor", "critic")}
    schedule, fusions = concatenated(problem_of(worker, batches)), (Fusion(worker, 60.0, Growing()), Fusion(worker, 60))
    parts = [
        FusedPart("actor", batches["actor"], 0, Learning(POLICY, lr=0.0)),
        FusedPart("critic", batches["critic"], 0, Learning(VALUES, lr=0.0)),
    ]
    results = [fusion.train(schedule, parts) for fusion in fusions]
    rows = {name: [m.rows for m in batch.layout.micro_batches[0]] for name, batch in batches.items()}
    return [(r.memory, r.peak) for r in results], rows, worker.actor.config.hidden_size, len(results[0].stages)


def test_memory_is_told_by_row_where_it_is_read(ranks, directory):
    for rank, (found, rows, hidden, models) in enumerate(ranks(2).run(counted, directory)):
        (memory, peak), nothing = found
        assert nothing == ({}, None)
        assert set(memory) == {"actor", "critic"}
        operations = sum(2 * len(some) for some in rows.values())
        assert models == 2
        # Before the step, at its start, and around each operation.
        assert peak == 10**6 * (1 + 2 * operations) + 500
        for name, stage in (("actor", rank), ("critic", 1 - rank)):
            # The first one's forward also makes what is made once.
            large = [n for n in rows[name][1:] if 2 * n >= max(rows[name])]
            assert memory[name].rows == max(rows[name])
            received = 8 * hidden if stage else 0  # float64
            assert memory[name].held == pytest.approx(10**6 / min(large) + received)
            assert memory[name].passing == 0  # all of it is still there at the end


def result_with(memory, peak):
    seconds = {name: StageSeconds(1.0, 2.0) for name in ("actor", "critic")}
    return FusedResult(stages=seconds, memory=memory, peak=peak)


def test_an_outcome_has_the_most_of_all_ranks():
    layouts = {
        "actor": ParallelLayout(world=4, pp=2),
        "critic": ParallelLayout(world=4, pp=2, placement=REVERSED),
    }
    results = [
        result_with({"actor": StageMemory(8, 10.0 + r, 5.0), "critic": StageMemory(6, 1.0, 2.0 * r)}, 100 * r)
        for r in range(4)
    ]
    outcome = fused_outcome(results, layouts, {})
    assert outcome.peaks == (100, 300)
    assert outcome.memory["actor"] == (StageMemory(8, 11.0, 5.0), StageMemory(8, 13.0, 5.0))
    # Its first stage lies on the second node.
    assert outcome.memory["critic"] == (StageMemory(6, 1.0, 6.0), StageMemory(6, 1.0, 2.0))
    nothing = fused_outcome([result_with({}, None)] * 4, layouts, {})
    assert (nothing.memory, nothing.peaks) == ({}, ())


class Storages(TorchDispatchMode):
    """Readings of the bytes of tensors that are made while it is on: real ones, of a process without an allocator to
    ask. What an operator needs for a moment inside is not seen."""

    def __init__(self):
        super().__init__()
        self.known, self.allocated, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def _see(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            size = storage.nbytes()
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size):
        self.allocated -= size

    def __call__(self):
        reading = MemoryReading(self.allocated, self.peak)
        self.peak = self.allocated
        return reading


def planned_and_measured(directory):
    """Peaks of this rank in steps by several schedules: by what the first step's operations took, and measured."""
    worker = critic_worker(directory, {"pp": 2}, {"pp": 2, "placement": REVERSED}, **FP64)
    samples = critic_samples(worker.actor.arch)
    batches = {name: part_of(worker, name, samples) for name in ("actor", "critic")}
    problem = problem_of(worker, batches)
    parts = [
        FusedPart("actor", batches["actor"], 0, Learning(POLICY, lr=0.0)),
        FusedPart("critic", batches["critic"], 0, Learning(VALUES, lr=0.0)),
    ]
    found, memory, node = [], None, worker.actor.groups.coordinates["pp"]
    with Storages() as counter:
        fusion = Fusion(worker, 60.0, counter)
        for schedule in (
            concatenated(problem),
            concatenated(problem),
            *(random_schedule(problem, seed) for seed in range(4)),
        ):
            result = fusion.train(schedule, parts)
            if memory is None:
                memory = result.memory
                continue
            models = [
                replace(model, activation=(memory[model.name].held * memory[model.name].rows,) * 2)
                for model in problem.models
            ]
            held = simulate(Schedule(replace(problem, models=tuple(models)), schedule.orders)).peak_memory[node]
            passing = max(each.passing * each.rows for each in memory.values())
            found.append((held + passing, result.peak))
    return found


def test_a_schedule_takes_no_more_than_is_planned(ranks, directory):
    """Counted in one step, by another schedule too: real bytes, and a bound that is not far off."""
    for found in ranks(2).run(planned_and_measured, directory):
        assert len(found) == 5
        for planned, measured in found:
            assert 0.8 * planned <= measured <= planned
