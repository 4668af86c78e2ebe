"""Training runs whose steps are planned ahead, for tests: skewed routes, plans made by every rank for itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.layout import BatchLayout, ExpertLayout, MicroBatchKey
from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.plan.foresight import solve_step
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.replay import histogram
from rl.models.architecture import Architecture
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch, TrainSample
from rl.training.foresight import (
    ExpertGroup,
    PassPlans,
    RankBalance,
    StagePlans,
    choose_homes,
    counts_needed,
    expert_groups,
    group_loads,
)
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, PolicyObjective, TrainWorker
from rl.types import RouteRef
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker
from tests.rl.training.reordering import exported, homes_of_step

# Every token off the busiest rank counts, and nothing is too small to copy.
BALANCE = BalanceConfig(slots=2, min_tokens=1, gate=False, tolerance=0.0)
SETTINGS = PassSettings(temperature=0.7, with_entropy=True, chunk_tokens=64)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        layout: parallel sizes.
        balance: None trains without the plugin.
        foresight: plan every pass ahead.
        homes: before every step experts move ``"nowhere"``, to ``"random"`` homes or where they are ``"chosen"`` to be.
        steps: optimizer steps.
        wrong: step whose plans are made of other routes than those that are replayed.
        grossly: those routes leave out experts that tokens go to; else they only count others.
        only_train: the pass for old log-probs is planned on exact loads.
        spec: fields of ``TrainerSpec``.
    """

    layout: dict[str, Any]
    balance: BalanceConfig | None = BALANCE
    foresight: bool = True
    homes: str = "nowhere"
    steps: int = 3
    wrong: int | None = None
    grossly: bool = False
    only_train: bool = False
    spec: dict[str, Any] = field(default_factory=dict)


def skewed_samples(arch: Architecture, seed: int) -> list[TrainSample]:
    """Samples whose routes prefer some experts: low-numbered ones, and others in every layer and batch."""
    rng = np.random.default_rng((7, seed))
    found = []
    for sample in make_samples(arch, seed=seed):
        scores = rng.gumbel(size=(sample.rows, len(arch.moe_layers), arch.experts))
        scores -= np.linspace(0, 2.5, arch.experts)
        scores += 0.7 * np.random.default_rng((9, seed)).normal(size=(1, len(arch.moe_layers), arch.experts))
        routes = np.argsort(-scores, axis=-1)[..., : arch.topk].astype(np.uint8)
        reference = RouteRef(routes, 0, routes.shape, "uint8")
        found.append(replace(sample, routes=reference, histogram=histogram(routes, arch.experts)))
    return found


def told(layout: ParallelLayout, experts: int = 8, layers: int = 4, **shape: int) -> list[RankBalance]:
    """What the ranks of a layout would tell."""
    per_stage = layers // layout.pp
    found = []
    for rank in range(layout.world):
        stage = layout.coordinates(rank)["pp"]
        numbers = range(1 + stage * per_stage, 1 + (stage + 1) * per_stage)
        layouts = {n: ExpertLayout(experts, layout.ep, slots=2, **shape) for n in numbers}
        found.append(RankBalance(PlanSettings(1), layouts, {n: n - 1 for n in range(1, layers + 1)}, 1000))
    return found


def everybody(worker: TrainWorker) -> tuple[ExpertGroup, ...]:
    """The trainer's expert-parallel groups, as the driver learns them."""
    told: list[RankBalance | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, worker.balance())
    return expert_groups(worker.spec.layout, [each for each in told if each is not None])


def loads_of(
    groups: tuple[ExpertGroup, ...],
    samples: list[TrainSample],
    batch: BatchLayout,
    layout: ParallelLayout,
    arch: Architecture,
) -> list[np.ndarray]:
    """Exact loads of each group."""
    routes = {s.sample_id: s.routes.handle for s in samples if s.routes is not None}
    counted = {
        (sample, first, rows): histogram(routes[sample][first : first + rows], arch.experts)
        for sample, first, rows in counts_needed(groups, batch, layout.tp)
    }
    histograms = {s.sample_id: s.histogram for s in samples if s.histogram is not None}
    return group_loads(groups, batch, histograms, counted, topk=arch.topk, tp_size=layout.tp)


def train(directory: str, run: Run) -> dict[str, Any]:
    """This rank's losses, first gradients and last weights, and what was planned."""
    worker = make_worker(
        directory,
        run.layout,
        balance=run.balance,
        dtype="float64",
        distributed_optimizer=False,
        optimizer=OptimizerSpec(lr=3e-4, clip_grad=0.0),
        reorder=run.homes != "nowhere",
        **run.spec,
    )
    arch, layout = worker.actor.arch, worker.spec.layout
    objective = PolicyObjective(LOSS, SETTINGS, "replay")
    groups = everybody(worker) if run.balance is not None else ()
    homes: dict[int, tuple[int, ...]] = {}
    losses, gradients, moved, taken, old = [], {}, 0, 0, {}
    for step in range(run.steps):
        samples = skewed_samples(arch, step)
        batch_layout = make_layout(samples, layout, 64)
        part = MiniBatch.make(samples, batch_layout).part(worker.groups.coordinates["dp"])
        if run.homes == "random":
            homes = homes_of_step(4, step, range(1, arch.layers + 1), arch.experts)
        loads = loads_of(groups, samples, batch_layout, layout, arch) if groups else []
        if run.homes == "chosen":
            chosen = choose_homes(groups, homes, loads, move_ns_per_mib=0, horizon=1)
            homes = {number: plan.layout.home_slot for number, plan in chosen.items()}
        if run.homes != "nowhere":
            moved += worker.reorder(homes).experts
        plans = None
        if run.foresight:
            if step == run.wrong:
                loads = [np.roll(x, 1, axis=-1) if run.grossly else _exchanged(x) for x in loads]
            steps = [
                solve_step(of_group, group.layouts(homes), group.settings)
                for group, of_group in zip(groups, loads, strict=True)
            ]
            parts, of_rank = PassPlans(groups, tuple(steps)).parts(layout.world)
            plans = parts[of_rank[dist.get_rank()]]
            assert isinstance(plans, StagePlans)
            taken += _count_taken(worker, plans, step, batch_layout)
        logprobs, _ = worker.logprobs(
            part, "actor", "old_logprob", step, "replay", SETTINGS, None if run.only_train else plans
        )
        if step == 0:
            old = logprobs
            worker.gradients(part, step, objective, plans)
            gradients = {n: t.double().numpy().copy() for n, t in export_weights(worker.actor, source="main_grad")}
        losses.append(worker.train(part, step, objective, plans=plans).loss)
    return {
        "losses": losses,
        "old": old,
        "tensors": gradients,
        "weights": exported(worker),
        "moved": moved,
        "taken": taken,
        "replicas": 0 if worker.balancer is None else worker.balancer.replicas,
    }


def _exchanged(loads: np.ndarray) -> np.ndarray:
    """Other loads ``[M, N, G, E]`` of as many tokens, of the same experts."""
    found = loads.copy()
    for m, n in np.ndindex(loads.shape[:2]):
        busy = np.nonzero(loads[m, n].min(axis=0) > 0)[0]
        found[m, n][:, busy] = loads[m, n][:, np.roll(busy, 1)]
    assert (found != loads).any()
    return found


def _count_taken(worker: TrainWorker, plans: StagePlans, step: int, batch: BatchLayout) -> int:
    """How many (micro-batch, layer) of a pass would find a plan, by asking the layers themselves."""
    keys = [MicroBatchKey("actor", "eval", step, m) for m in range(batch.num_microbatches)]
    if plans.step is None or plans.index is None or worker.balancer is None:
        return 0
    worker.balancer.foresee(plans.step, keys, plans.index)
    foresight = worker.balancer._foresight
    found = 0 if foresight is None else len(foresight)
    worker.balancer.end_foresight(check=False)
    return found


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole model's view from all ranks' results."""
    merged: dict[str, Any] = {"losses": np.sum([r["losses"] for r in results], axis=0)}
    for name in ("old", "tensors", "weights"):
        merged[name] = {key: value for r in results for key, value in r[name].items()}
    return merged | {name: max(r[name] for r in results) for name in ("moved", "taken", "replicas")}
