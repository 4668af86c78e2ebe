"""Critics for tests: directories with a head, samples with values and returns, steps of actor and critic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models.architecture import Architecture
from rl.models.builder import Recompute
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch, TrainSample
from rl.training.objectives import PolicyObjective, ValueObjective
from rl.training.passes import PassSettings
from rl.training.spec import CriticSpec, OptimizerSpec
from rl.training.worker import TrainWorker
from tests.rl.training.common import LENGTHS, LOSS, make_layout, make_samples, make_worker

VALUES = ValueObjective(clip=0.2)
POLICY = PolicyObjective(LOSS, PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=16))


def with_head(directory: str | Path, seed: int = 7) -> str:
    """Give a model directory a scalar head: ``score.weight``, standard normal."""
    from safetensors.torch import load_file, save_file

    file = Path(directory) / "model.safetensors"
    tensors = load_file(file)
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    tensors["score.weight"] = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
    save_file(tensors, file, metadata={"format": "pt"})
    return str(directory)


def critic_samples(arch: Architecture, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[TrainSample]:
    """Samples of ``make_samples`` with old values and returns."""
    rng = np.random.default_rng([seed, 1])
    samples = []
    for sample in make_samples(arch, lengths, seed):
        values = np.where(sample.loss_mask, rng.normal(size=len(sample.tokens)), 0)
        returns = np.where(sample.loss_mask, values + rng.normal(size=len(sample.tokens)), 0)
        samples.append(dataclasses.replace(sample, values=values, returns=returns))
    return samples


def critic_worker(directory: str, layout: dict[str, Any], critic: dict[str, Any], **spec: Any) -> TrainWorker:
    """A worker with an actor and a critic of the same directory; ``critic`` are the sizes of its layout."""
    clip = 0.0 if spec.get("dtype") == "float64" else 1.0
    recompute = spec.get("recompute")
    return make_worker(
        directory,
        layout,
        critic=CriticSpec(
            directory,
            ParallelLayout(world=dist.get_world_size(), **critic),
            OptimizerSpec(lr=2e-3, clip_grad=clip),
            Recompute(*recompute) if recompute else Recompute(),
        ),
        **spec,
    )


def part_of(worker: TrainWorker, model: str, samples: list[TrainSample]) -> MiniBatch:
    """This rank's part, laid out for the model."""
    layout = worker.spec.layout_of(model)
    rank = worker.runners[model].model.groups.coordinates["dp"]
    return MiniBatch.make(samples, make_layout(samples, layout)).part(rank)


def both_gradients(directory: str, layout: dict[str, Any], critic: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """Loss, metric sums and gradients in logical order of actor and critic, as this rank sees them; and values."""
    worker = critic_worker(directory, layout, critic, distributed_optimizer=False, **spec)
    samples = critic_samples(worker.actor.arch)
    values = worker.values(part_of(worker, "critic", samples), 0)
    found: dict[str, Any] = {"values": values, "planned": 0}
    for name, objective in (("actor", POLICY), ("critic", VALUES)):
        loss, sums, report = worker.gradients(part_of(worker, name, samples), 0, objective, model=name)
        model = worker.trained[name].model
        tensors = {n: t.numpy().copy() for n, t in export_weights(model, source="main_grad")}
        found[name] = {"loss": loss, "sums": sums, "tensors": tensors, "digests": report.digests}
        metrics = worker.trained[name].balance_metrics()
        found[f"{name} balance"] = metrics
    return found
