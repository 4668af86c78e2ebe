"""Balancing changes where experts are computed and nothing else: losses, gradients, weights, optimizer, checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron.attach import attach, detach
from rl.models.weights import export_weights
from rl.training import checkpoint
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, PolicyObjective, TrainWorker
from tests.rl.training.balancing import BALANCE, Watch, biased_model, merge_steps, several_steps
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker, worst

FLOAT64 = {"dtype": "float64", "distributed_optimizer": False}
FLOAT32 = {"dtype": "float32", "distributed_optimizer": True, "overlap": True}
# ranks, layout, what else; float64 with routers that choose, float32 on captured routes
CASES = {
    "ep2": (2, {"ep": 2}, FLOAT64),
    "ep4": (4, {"ep": 4}, FLOAT64),
    "ep2xdp2 overlapped": (4, {"ep": 2}, FLOAT64 | {"overlap": True}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}, FLOAT64),
    "pp2xvpp2xep2 overlapped": (4, {"pp": 2, "vpp": 2, "ep": 2}, FLOAT64 | {"overlap": True}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}, FLOAT64),
    "recompute full": (2, {"ep": 2}, FLOAT64 | {"recompute": ("full",)}),
    "recompute moe": (2, {"ep": 2}, FLOAT64 | {"recompute": ("selective", ("moe",))}),
    "distributed optimizer, overlapped": (2, {"ep": 2}, FLOAT32),
    "ep2xdp2, distributed optimizer, overlapped": (4, {"ep": 2}, FLOAT32),
}
SETTINGS = PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=64)
OBJECTIVE = PolicyObjective(LOSS, SETTINGS)
BARS = {"float64": (1e-7, 1e-8), "float32": (1e-5, 1e-5)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return biased_model(tmp_path_factory.mktemp("balancing") / "m", strength=25.0)


def both(ranks, directory, world, layout, spec, transport="auto", **more):
    """Merged results without and with balancing."""
    own = spec["dtype"] == "float64"
    arguments = {"steps": 3, "routes": "own" if own else "replay", "replay": not own, "budget": 64} | spec | more
    return [
        merge_steps(ranks(world).run(several_steps, directory, layout, balance=balance, **arguments))
        for balance in (None, dataclasses.replace(BALANCE, transport=transport))
    ]


@pytest.mark.parametrize("case", CASES)
def test_training_equals_stock(ranks, directory, case):
    compare(ranks, directory, case, "collective")


@pytest.mark.parametrize("case", ["ep4", "tp2xep2", "recompute moe", *(c for c in CASES if "overlapped" in c)])
def test_training_through_symmetric_memory_equals_stock(ranks, directory, case):
    compare(ranks, directory, case, "symmetric")


def compare(ranks, directory, case, transport):
    world, layout, spec = CASES[case]
    stock, balanced = both(ranks, directory, world, layout, spec, transport)
    losses, gradients = BARS[spec["dtype"]]
    assert np.abs(balanced["losses"] / stock["losses"] - 1).max() <= losses
    assert worst(balanced["tensors"], stock["tensors"]) <= gradients
    assert balanced["replicas"] > 0
    if spec["dtype"] == "float64":
        assert balanced["before_mean"] >= {2: 1.6, 4: 2.0}[layout["ep"]]
    assert balanced["over"] == 0, "left above max(1.05, bound + 1 token)"


class AttachedEarly(TrainWorker):
    """Balanced before DDP wraps the model and the optimizer is made."""

    def _train(self, name, model, *arguments):
        self.early = attach(model.chunks, BALANCE)
        super()._train(name, model, *arguments)


def early_gradients(directory, layout):
    """Gradients of one step of a model that was balanced before it was wrapped."""
    spec = make_worker(directory, layout, **FLOAT64).spec
    worker = AttachedEarly(spec)
    samples = make_samples(worker.actor.arch, seed=0)
    batch = MiniBatch.make(samples, make_layout(samples, spec.layout, 64)).part(worker.groups.coordinates["dp"])
    worker.gradients(batch, 0, PolicyObjective(LOSS, SETTINGS, "own"))
    tensors = {n: t.double().numpy().copy() for n, t in export_weights(worker.actor, source="main_grad")}
    return tensors, worker.early.replicas


def test_attached_before_wrapping(ranks, directory):
    stock, _ = both(ranks, directory, 2, {"ep": 2}, FLOAT64, steps=1)
    tensors = {}
    for found, replicas in ranks(2).run(early_gradients, directory, {"ep": 2}):
        tensors |= found
        assert replicas > 0
    assert worst(tensors, stock["tensors"]) <= 1e-8


def late_join(directory, layout):
    """Gradients of one step whose replica gradients come home only when DDP finishes: the mistake to be caught."""
    worker = make_worker(directory, layout, balance=BALANCE, overlap=True, **FLOAT64)
    samples = make_samples(worker.actor.arch, seed=0)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout, 64))
    batch = batch.part(worker.groups.coordinates["dp"])
    objective = PolicyObjective(LOSS, SETTINGS, "own")
    worker.gradients(batch, 0, objective)  # Megatron reduces the first batch without overlap
    late = []
    for layer in worker.balancer.layers:
        balancer = layer._ultraep.balancer

        def postpone(link, slots, balancer=balancer, send=balancer._send_home):
            kept = [None if s is None else s.clone() for s in slots]
            late.append(lambda: (send(link, kept), balancer.transport.await_home(balancer.pool)))

        balancer._send_home = postpone
        balancer._end_home = lambda link, homes: homes
    (chunk,) = worker.actor.wrapped
    finish = chunk.finish_grad_sync

    def finish_late(*arguments, **keywords):
        # Reduction has begun; let it end, or on a busy machine it may find what comes late.
        for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
            if group.grad_reduce_handle is not None:
                group.grad_reduce_handle.wait()
        with torch.no_grad():
            for join in late:
                join()
        return finish(*arguments, **keywords)

    chunk.finish_grad_sync = finish_late
    worker.gradients(batch, 1, objective)
    return {n: t.double().numpy().copy() for n, t in export_weights(worker.actor, source="main_grad")}, len(late)


def test_a_late_join_is_caught(ranks, directory):
    stock, _ = both(ranks, directory, 4, {"ep": 2}, FLOAT64 | {"overlap": True}, steps=1)
    tensors = {}
    for found, joins in ranks(4).run(late_join, directory, {"ep": 2}):
        tensors |= found
        assert joins > 0
    assert worst(tensors, stock["tensors"]) > 1e-3


def float32_worker(directory, layout, balance):
    """A rank with the distributed optimizer."""
    spec = {"dtype": "float32", "distributed_optimizer": True, "optimizer": OptimizerSpec(lr=1e-3)}
    return make_worker(directory, layout, balance=balance, **spec)


def what_others_see(directory, layout, balance, path):
    """Everything that must not know of replicas, after two steps; then the checkpoint is written."""
    worker = float32_worker(directory, layout, balance)
    watch = Watch(worker)
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    pools = []
    for step in range(3):
        result = worker.train(batch, step, OBJECTIVE)
        if balance is not None:
            pools.append(sorted(p.flat.data_ptr() for p in buffers(worker)))
    assert all(pool == pools[0] for pool in pools), "slots were allocated again"
    checkpoint.save(worker, path)
    ddp = worker.actor.wrapped[0]
    chained = getattr(worker.optimizer, "chained_optimizers", [worker.optimizer])
    return {
        "parameters": [n for c in worker.actor.chunks for n, _ in c.named_parameters()],
        "state": sorted(k for c in worker.actor.chunks for k in c.state_dict()),
        "buffers": [b.numel for b in ddp.buffers + ddp.expert_parallel_buffers],
        "optimizer": [[tuple(p.shape) for p in g["params"]] for o in chained for g in o.param_groups],
        "exported": {n: tuple(t.shape) for n, t in export_weights(worker.actor)},
        "norm": result.grad_norm,
        "replicas": sum(len(p.replicas) for p in watch.plans),
    }


def buffers(worker):
    """All slot buffers of a worker."""
    return [buffers for pool in worker.balancer._pools.values() for buffers in pool.buffers]


def trained_after(directory, layout, balance, path):
    """Weights after loading a checkpoint and one more step."""
    worker = float32_worker(directory, layout, balance)
    checkpoint.load(worker, path)
    samples = make_samples(worker.actor.arch, seed=9)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    worker.train(batch, 3, OBJECTIVE)
    return {n: t.double().numpy().copy() for n, t in export_weights(worker.actor)}


def test_replicas_are_nobodys_parameters(ranks, directory, tmp_path):
    """Not in DDP's buffers, the optimizer's groups, the gradient norm, checkpoints (which load either way), exports."""
    seen = {}
    for name, balance in (("stock", None), ("balanced", BALANCE)):
        (tmp_path / name).mkdir()
        seen[name] = ranks(2).run(what_others_see, directory, {"ep": 2}, balance, str(tmp_path / name))
    for stock, balanced in zip(seen["stock"], seen["balanced"], strict=True):
        assert balanced.pop("replicas") > 0
        assert stock.pop("replicas") == 0
        norms = stock.pop("norm"), balanced.pop("norm")
        assert abs(norms[0] - norms[1]) <= 1e-5 * norms[0]
        assert stock == balanced
    after = {}
    for name, balance in (("stock", BALANCE), ("balanced", None)):  # crosswise
        parts = ranks(2).run(trained_after, directory, {"ep": 2}, balance, str(tmp_path / name))
        after[name] = {n: t for part in parts for n, t in part.items()}
    assert worst(after["balanced"], after["stock"]) <= 1e-4


def given_back(directory, layout):
    """Losses of two equal steps, balanced and then detached, and what is left on the model."""
    worker = make_worker(
        directory, layout, balance=BALANCE, optimizer=OptimizerSpec(lr=1e-12, clip_grad=0.0), **FLOAT64
    )
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    layers = worker.balancer.layers
    losses = [worker.train(batch, 0, OBJECTIVE).loss]
    detach(worker.actor.wrapped)
    losses.append(worker.train(batch, 1, OBJECTIVE).loss)
    left = [(type(layer).__name__, hasattr(layer, "_ultraep")) for layer in layers]
    return losses, left, worker.balancer.layers, dist.get_rank()


def test_detach_gives_the_model_back(ranks, directory):
    for losses, left, layers, _ in ranks(2).run(given_back, directory, {"ep": 2}):
        assert losses[0] == pytest.approx(losses[1], rel=1e-7)
        assert left == [("MoELayer", False)] * 4
        assert layers == ()


def records_of_a_step(directory, layout, path):
    """One training step under full recomputation, with records."""
    balance = BalanceConfig(slots=2, min_tokens=1, gate=False, tolerance=0.0, record=path)
    worker = make_worker(directory, layout, balance=balance, recompute=("full",), **FLOAT64)
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout, 64))
    batch = batch.part(worker.groups.coordinates["dp"])
    result = worker.train(batch, 5, OBJECTIVE)
    worker.balancer.close()
    return len(batch.layout.micro_batches[0]), result.balance


def test_records_and_metrics(ranks, directory, tmp_path):
    """Each (micro-batch, layer) is recorded once, also when it is recomputed."""
    from megatron_ultraep.telemetry import read

    results = ranks(2).run(records_of_a_step, directory, {"ep": 2}, str(tmp_path))
    micro_batches, metrics = results[0]
    assert results[1][1] == {}
    found = list(read(tmp_path))
    assert sorted((r.key.step, r.key.microbatch, r.layer) for r in found) == [
        (5, i, layer) for i in range(micro_batches) for layer in (1, 2, 3, 4)
    ]
    assert {r.key.model for r in found} == {"actor"}
    assert metrics["moe/imbalance_after/max"] <= metrics["moe/imbalance_before/max"]
    assert metrics["moe/replicas/mean"] > 0
