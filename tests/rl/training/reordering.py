"""Training runs whose experts change their homes before every step, for tests and ``scripts/check_reorder.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron.attach import moe_layers
from megatron_ultraep.megatron.checkpoint import home_slot_of
from rl.models.architecture import read_architecture
from rl.training import checkpoint
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, PolicyObjective, TrainWorker
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker

LIMIT_BYTES = 20_000  # several waves a layer


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        layout: parallel sizes.
        dtype: ``"float64"`` with the plain optimizer, else also with the distributed one.
        distributed: the optimizer.
        overlap: gradients and parameters travel while the model computes.
        steps: first step, and one past the last.
        seed: of the homes that experts move to before every step; None moves none.
        balance: None trains without the plugin.
        load: checkpoint to begin from.
        save: step after which a checkpoint is written, before the next move, and where to.
    """

    layout: dict[str, Any]
    dtype: str = "float64"
    distributed: bool = False
    overlap: bool = False
    steps: tuple[int, int] = (0, 20)
    seed: int | None = None
    balance: BalanceConfig | None = None
    load: str = ""
    save: tuple[int, str] | None = None


def homes_of_step(seed: int, step: int, layers: range, experts: int) -> dict[int, tuple[int, ...]]:
    """A permutation of its own for every step and layer."""
    rng = np.random.default_rng((seed, step))
    return {number: tuple(rng.permutation(experts).tolist()) for number in layers}


def train(directory: str, run: Run) -> dict[str, Any]:
    """This rank's losses, exported weights, and what moved.

    In float64 routers choose by themselves; else they replay routes: a token whose top-k flips changes a loss more than
    rounding does.
    """
    own = run.dtype == "float64"
    worker = make_worker(
        directory,
        run.layout,
        balance=run.balance,
        dtype=run.dtype,
        distributed_optimizer=run.distributed,
        overlap=run.overlap,
        optimizer=OptimizerSpec(lr=3e-4, clip_grad=0.0 if own else 1.0),
    )
    if own and worker.replay is not None:
        worker.replay.detach()
        worker.runners["actor"].replay = None
    arch = read_architecture(directory)
    objective = PolicyObjective(
        LOSS, PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=64), "own" if own else "replay"
    )
    if run.load:
        checkpoint.load(worker, run.load)
    losses, reports = [], []
    for step in range(*run.steps):
        if run.seed is not None:
            homes = homes_of_step(run.seed, step, range(1, arch.layers + 1), arch.experts)
            reports.append(worker.reorder(homes, limit_bytes=LIMIT_BYTES))
        samples = make_samples(arch, seed=step % 4)
        batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout, 64))
        losses.append(worker.train(batch.part(worker.groups.coordinates["dp"]), step, objective).loss)
        if run.save is not None and run.save[0] == step:
            checkpoint.save(worker, run.save[1])
    return {
        "losses": losses,
        "weights": exported(worker),
        "moved": sum(report.experts for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "waves": sum(report.waves for report in reports),
        "seconds": sum(report.seconds for report in reports),
        "away": sum(
            slot != expert
            for layer in moe_layers(worker.actor.chunks)
            for expert, slot in enumerate(home_slot_of(layer))
        ),
        "replicas": 0 if worker.balancer is None else worker.balancer.replicas,
    }


def exported(worker: TrainWorker) -> dict[str, np.ndarray]:
    """What this rank hands to the rollout engines."""
    buckets = worker.export(1 << 30, torch.float64)
    return {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket.items()}


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole model's view from all ranks' results."""
    weights: dict[str, np.ndarray] = {}
    for result in results:
        assert not set(weights) & set(result["weights"]), "a tensor was handed over twice"
        weights |= result["weights"]
    merged = {
        name: max(r[name] for r in results) for name in ("moved", "bytes", "waves", "seconds", "away", "replicas")
    }
    return merged | {"losses": np.sum([r["losses"] for r in results], axis=0), "weights": weights}


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest relative difference of losses."""
    return float(np.abs(one / other - 1).max())
