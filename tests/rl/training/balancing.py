"""Training runs with and without balancing, for the parity tests and ``scripts/check_balance.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.plan.types import Plan, imbalance
from megatron_ultraep.runtime.planning import Planned
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings, RouteMode
from rl.training.worker import OptimizerSpec, PolicyObjective, TrainWorker
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker

# Every token off the busiest rank counts, and nothing is too small to copy.
BALANCE = BalanceConfig(slots=2, min_tokens=1, gate=False, tolerance=0.0)


def biased_model(path: str | Path, *, strength: float, seed: int = 3, **model: Any) -> str:
    """A tiny model whose routers prefer low-numbered experts.

    Args:
        strength: see :func:`skew`.
    """
    directory = tiny.qwen3_moe(path, seed=seed, **model)
    skew(Path(directory), strength, seed)
    return str(directory)


def biased_task_model(path: str | Path, *, strength: float, **model: Any) -> str:
    """A tiny model with the tokenizer of a reasoning-gym task, as the smoke recipe makes it, with such routers."""
    directory = tiny.for_reasoning_gym(path, **model)
    skew(Path(directory), strength, seed=3)
    return str(directory)


def skew(directory: Path, strength: float, seed: int) -> None:
    """Make a model's routers prefer low-numbered experts.

    One direction is added to every embedding, and to each router's row of expert e in proportion to ``-e``.

    Args:
        directory: of the model, in one file.
        strength: difference of the logits of the first and the last expert, roughly.
        seed: of the direction.
    """
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    direction = torch.randn(hidden, generator=torch.Generator().manual_seed(seed))
    direction /= direction.norm()
    embedding = tensors["model.embed_tokens.weight"]
    embedding += 4 * embedding.float().norm(dim=1).mean() * direction
    for name, gate in tensors.items():
        if name.endswith("mlp.gate.weight"):
            experts = gate.shape[0]
            preference = -torch.arange(experts) / (experts - 1)
            gate += (strength / hidden**0.5) * preference[:, None] * direction
    save_file(tensors, file, metadata={"format": "pt"})


class Watch:
    """Collects what every balanced layer planned."""

    def __init__(self, worker: TrainWorker) -> None:
        self.planned: list[Planned] = []
        if worker.balancer is not None:
            for layer in worker.balancer.layers:
                balancer = layer._ultraep.balancer
                balancer.observe = self._both(balancer.observe)

    def _both(self, observe: Any) -> Any:
        def call(planned: Planned) -> None:
            self.planned.append(planned)
            observe(planned)

        return call

    @property
    def plans(self) -> list[Plan]:
        """Of all calls so far; waits for the device."""
        return [each.plan for each in self.planned]

    def summary(self) -> dict[str, Any]:
        """Over all micro-batches and layers of this rank; ``over`` counts those above max(1.05, bound + 1 token)."""
        plans = self.plans
        before = [imbalance(p.before) for p in plans]
        after = [imbalance(p.after) for p in plans]
        over = 0
        for plan, value in zip(plans, after, strict=True):
            mean = plan.after.mean()
            bound = max(d.bound for d in plan.decisions)
            over += value > max(1.05, (bound + 1) / mean) + 1e-12
        return {
            "plans": len(plans),
            "replicas": sum(len(p.replicas) for p in plans),
            "before_mean": float(np.mean(before)) if before else 1.0,
            "before_min": min(before, default=1.0),
            "after_max": max(after, default=1.0),
            "over": over,
        }


def several_steps(
    directory: str,
    layout: dict[str, Any],
    *,
    steps: int,
    routes: RouteMode,
    balance: BalanceConfig | None,
    replay: bool = True,
    budget: int = 128,
    seeds: int = 4,
    **spec: Any,
) -> dict[str, Any]:
    """Losses of several optimizer steps on this rank, gradients of the first, and what balancing did.

    Args:
        steps: optimizer steps; mini-batches repeat after ``seeds`` of them.
        routes: replay captured routes, or let routers choose.
        replay: keep our replay handles in the routers; False leaves them as Megatron made them.
        balance: None is stock.
        spec: fields of ``TrainerSpec``.
    """
    clip = 0.0 if spec.get("dtype") == "float64" else 1.0
    worker = make_worker(directory, layout, balance=balance, optimizer=OptimizerSpec(lr=3e-4, clip_grad=clip), **spec)
    if not replay and worker.replay is not None:
        worker.replay.detach()
        worker.runners["actor"].replay = None
    watch = Watch(worker)
    arch = read_architecture(directory)
    objective = PolicyObjective(LOSS, PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=64), routes)
    losses, gradients = [], {}
    for step in range(steps):
        samples = make_samples(arch, seed=step % seeds)
        batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout, budget))
        batch = batch.part(worker.groups.coordinates["dp"])
        if step == 0:
            worker.gradients(batch, step, objective)
            if spec.get("overlap"):  # Megatron reduces the first batch without overlap
                worker.gradients(batch, step, objective)
            gradients = {
                n: t.double().cpu().numpy().copy() for n, t in export_weights(worker.actor, source="main_grad")
            }
            watch.planned.clear()
        losses.append(worker.train(batch, step, objective).loss)
    weights = {
        n: t.double().cpu().numpy().copy()
        for bucket in worker.export(1 << 30, torch.float64)
        for n, t in bucket.items()
    }
    names = sorted(n for chunk in worker.actor.chunks for n, _ in chunk.named_parameters())
    return {
        "losses": losses,
        "tensors": gradients,
        "weights": weights,
        "names": names,
        "slot_bytes": 0 if worker.balancer is None else worker.balancer.slot_bytes,
        **watch.summary(),
    }


def merge_steps(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole model's view from all ranks' results."""
    merged: dict[str, Any] = {"losses": np.sum([r["losses"] for r in results], axis=0), "tensors": {}, "weights": {}}
    for result in results:
        merged["tensors"] |= result["tensors"]
        merged["weights"] |= result["weights"]
    for name, how in (("plans", sum), ("replicas", sum), ("over", sum), ("before_min", min), ("after_max", max)):
        merged[name] = how(r[name] for r in results)
    merged["before_mean"] = float(np.mean([r["before_mean"] for r in results if r["plans"]] or [1.0]))
    return merged
