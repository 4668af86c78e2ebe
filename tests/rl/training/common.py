"""Mini-batches with made-up samples and routes, and runs of one training step under a layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.algorithms.losses import PolicyLossConfig
from rl.models.architecture import Architecture, read_architecture
from rl.models.builder import Recompute
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch, TrainSample
from rl.training.passes import PassSettings, RouteMode
from rl.training.worker import OptimizerSpec, PolicyObjective, TrainerSpec, TrainWorker
from rl.types import RouteRef

LENGTHS = (12, 31, 7, 25, 18, 40, 9, 22, 15, 33)


def random_routes(rng: np.random.Generator, rows: int, arch: Architecture) -> np.ndarray:
    """Valid routes: distinct experts per token."""
    scores = rng.random((rows, len(arch.moe_layers), arch.experts))
    return np.argsort(scores, axis=-1)[..., : arch.topk].astype(np.uint8)


def make_samples(arch: Architecture, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[TrainSample]:
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lengths):
        mask = np.arange(length) >= max(1, length // 3)
        routes = random_routes(rng, length - 1, arch) if arch.is_moe else None
        noise = np.where(mask, rng.normal(-5, 1, length), 0)
        samples.append(
            TrainSample(
                sample_id=f"s{i}",
                tokens=rng.integers(3, arch.vocab, length).astype(np.int32),
                loss_mask=mask,
                routes=None if routes is None else RouteRef(routes, 0, routes.shape, "uint8"),
                advantages=np.where(mask, rng.normal(), 0),
                rollout_logprobs=noise,
                old_logprobs=noise + np.where(mask, rng.normal(0, 0.05, length), 0),
                ref_logprobs=noise + np.where(mask, rng.normal(0, 0.05, length), 0),
            )
        )
    return samples


def make_layout(samples: list[TrainSample], layout: ParallelLayout, budget: int = 64) -> BatchLayout:
    return BatchLayout.pack(
        [s.sample_id for s in samples],
        [s.rows for s in samples],
        data_parallel=layout.dp,
        tokens_per_micro_batch=budget,
        row_multiple=layout.tp,
        micro_batch_multiple=layout.pp if layout.vpp else 1,
    )


def megatron_version() -> str:
    """Of the ranks, which may differ from what this process would import."""
    return compat.version()


LOSS = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0, clip_high=0.28)


def make_worker(directory: str, layout: dict[str, Any], **spec: Any) -> TrainWorker:
    recompute = spec.pop("recompute", None)
    clip = 0.0 if spec.get("dtype") == "float64" else 1.0  # Megatron clips no float64 gradients
    return TrainWorker(
        TrainerSpec(
            model_path=directory,
            layout=ParallelLayout(world=dist.get_world_size(), **layout),
            recompute=Recompute(*recompute) if recompute else Recompute(),
            optimizer=spec.pop("optimizer", OptimizerSpec(lr=1e-3, clip_grad=clip)),
            collective_s=60.0,
            **spec,
        )
    )


def one_step(
    directory: str,
    layout: dict[str, Any],
    *,
    routes: RouteMode = "replay",
    replay: bool = True,
    budget: int = 64,
    **spec: Any,
) -> dict:
    """Loss, gradients in logical order and route digests of one mini-batch, as this rank sees them.

    Without ``replay`` the routers are Megatron's own: no handles of ours in them.
    """
    worker = make_worker(directory, layout, **spec)
    if not replay and worker.replay is not None:
        worker.replay.detach()
        worker.runners["actor"].replay = None
    samples = make_samples(read_architecture(directory))
    whole = MiniBatch.make(samples, make_layout(samples, worker.spec.layout, budget))
    batch = whole.part(worker.groups.coordinates["dp"])
    objective = PolicyObjective(LOSS, PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=16), routes)
    loss, sums, report = worker.gradients(batch, 0, objective)
    tensors = {name: t.double().cpu().numpy().copy() for name, t in export_weights(worker.actor, source="main_grad")}
    return {"loss": loss, "sums": sums, "tensors": tensors, "digests": report.digests, "differing": report.differing}


def merge(results: list[dict]) -> dict:
    """The whole model's view from all ranks' results."""
    tensors: dict[str, np.ndarray] = {}
    digests: dict[str, np.ndarray] = {}
    sums: dict[str, float] = {}
    for r in results:
        assert not set(tensors) & set(r["tensors"]), "a tensor was handed over twice"
        tensors |= r["tensors"]
        for name, value in r["digests"].items():
            with np.errstate(over="ignore"):
                digests[name] = digests.get(name, np.zeros_like(value)) + value
        for name, value in r["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
    return {"loss": sum(r["loss"] for r in results), "tensors": tensors, "digests": digests, "sums": sums}


def worst(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """max|a - b| / max|b| of the worst tensor."""
    assert set(a) == set(b), set(a) ^ set(b)
    return max(float(np.abs(a[n] - b[n]).max() / max(np.abs(b[n]).max(), 1e-30)) for n in b)
