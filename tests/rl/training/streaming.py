"""Optimizer steps whose samples arrive in chunks, beside the same steps on whole mini-batches."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.plan.foresight import solve_step
from rl.models.weights import export_weights
from rl.training.batch import Counts, MiniBatch, TrainSample
from rl.training.foresight import ExpertGroup, PassPlans, StagePlans
from rl.training.objectives import PolicyObjective
from rl.training.passes import PassSettings
from rl.training.results import TrainResult
from rl.training.worker import OptimizerSpec, TrainWorker
from tests.rl.training.common import LOSS, make_layout, make_worker
from tests.rl.training.planning import everybody, loads_of, skewed_samples

SETTINGS = PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=16)
GROUP = 2  # samples of one prompt


def chunks_of(samples: Sequence[TrainSample], seed: int) -> Iterator[list[TrainSample]]:
    """Whole groups in a random order, cut into chunks at random places."""
    rng = np.random.default_rng((11, seed))
    groups = [list(samples[i : i + GROUP]) for i in range(0, len(samples), GROUP)]
    order = rng.permutation(len(groups))
    cuts = np.nonzero(rng.random(len(groups) - 1) < 0.6)[0] + 1
    for part in np.split(order, cuts):
        yield [sample for i in part for sample in groups[i]]


def objective_of(aggregation: str) -> PolicyObjective:
    return PolicyObjective(dataclasses.replace(LOSS, aggregation=aggregation), SETTINGS, "replay")


@contextlib.contextmanager
def float64_routers() -> Iterator[None]:
    """Megatron's routers take softmax in float32 whatever they are told.

    Rounding there depends on how a loss is scaled, so gradients of chunks would be equal to 1e-7 only.
    """
    from megatron.core.transformer.moe import moe_utils

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.softmax(scores, dim)

    before = moe_utils.torch.softmax
    assert moe_utils.torch is not torch  # see megatron_ultraep.megatron.cpu
    moe_utils.torch.softmax = softmax
    try:
        yield
    finally:
        moe_utils.torch.softmax = before


def plans_of(
    worker: TrainWorker, groups: tuple[ExpertGroup, ...], samples: list[TrainSample], layout: BatchLayout
) -> StagePlans:
    """This rank's plans of a mini-batch or chunk."""
    loads = loads_of(groups, samples, layout, worker.spec.layout, worker.actor.arch)
    solved = tuple(solve_step(x, group.layouts({}), group.settings) for group, x in zip(groups, loads, strict=True))
    parts, of_rank = PassPlans(groups, solved).parts(worker.spec.layout.world)
    return parts[of_rank[dist.get_rank()]]


def whole_step(
    worker: TrainWorker,
    samples: list[TrainSample],
    step: int,
    aggregation: str,
    lr: float | None,
    foresight: bool,
    budget: int = 64,
) -> TrainResult:
    """The stock step."""
    layout = make_layout(samples, worker.spec.layout, budget)
    batch = MiniBatch.make(samples, layout)
    plans = plans_of(worker, everybody(worker), samples, layout) if foresight else None
    return worker.train(
        batch.part(worker.groups.coordinates["dp"]), step, objective_of(aggregation), lr=lr, plans=plans
    )


def streamed_step(
    worker: TrainWorker,
    samples: list[TrainSample],
    step: int,
    aggregation: str,
    lr: float | None,
    foresight: bool,
    seed: int,
) -> TrainResult:
    """The same step from chunks, with denominators that are far off."""
    rng = np.random.default_rng((12, seed))
    estimate = Counts(int(rng.integers(1, 400)), int(rng.integers(1, 40)))
    groups = everybody(worker) if foresight else ()
    true = Counts()
    for number, chunk in enumerate(chunks_of(samples, seed)):
        layout = make_layout(chunk, worker.spec.layout)
        batch = MiniBatch.make(chunk, layout, estimate.tokens, estimate.sequences)
        plans = plans_of(worker, groups, chunk, layout) if foresight else None
        worker.accumulate(
            batch.part(worker.groups.coordinates["dp"]),
            step,
            objective_of(aggregation),
            plans=plans,
            first=number == 0,
        )
        true += batch.learnt
    return worker.apply(estimate.scale(aggregation, true), lr=lr)


def told(worker: TrainWorker, result: TrainResult) -> dict[str, Any]:
    """What this rank has to say of a step."""
    return {
        "loss": result.loss,
        "sums": result.sums,
        "digests": result.routes.digests,
        "rows": result.routes.rows,
        "grad_norm": result.grad_norm,
        "balance": result.balance,
        "tensors": {n: t.double().cpu().numpy().copy() for n, t in export_weights(worker.actor, source="main_grad")},
    }


def orders(
    directory: str, layout: dict[str, Any], count: int, *, foresight: bool = False, **spec: Any
) -> list[dict[str, Any]]:
    """Gradients of one set: as a mini-batch, then in ``count`` orders; with the even ones tokens weigh the same."""
    worker = make_worker(
        directory, layout, dtype="float64", distributed_optimizer=False, optimizer=OptimizerSpec(clip_grad=0.0), **spec
    )
    samples = skewed_samples(worker.actor.arch, seed=0)
    ways = ("token_mean", "sequence_mean")
    with float64_routers():
        found = [told(worker, whole_step(worker, samples, i, way, 0.0, foresight)) for i, way in enumerate(ways)]
        for seed in range(count):
            result = streamed_step(worker, samples, 2 + seed, ways[seed % 2], 0.0, foresight, seed)
            found.append(told(worker, result))
    return found


def steps(directory: str, layout: dict[str, Any], count: int, how: str, **spec: Any) -> dict[str, Any]:
    """Losses, gradient norms and last weights of some steps.

    Args:
        how: ``"stock"``, ``"streamed"`` from chunks, or ``"shuffled"``: stock with samples in other micro-batches.
    """
    worker = make_worker(directory, layout, optimizer=OptimizerSpec(lr=1e-3), **spec)
    losses, norms = [], []
    for step in range(count):
        samples = skewed_samples(worker.actor.arch, seed=step)
        if how == "shuffled":
            samples = [samples[i] for i in np.random.default_rng((13, step)).permutation(len(samples))]
        if how == "streamed":
            result = streamed_step(worker, samples, step, "token_mean", None, False, seed=step)
        else:
            budget = 48 if how == "shuffled" else 64
            result = whole_step(worker, samples, step, "token_mean", None, False, budget)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = {n: t.double().cpu().numpy().copy() for n, t in export_weights(worker.actor)}
    return {"losses": losses, "norms": norms, "weights": weights}
