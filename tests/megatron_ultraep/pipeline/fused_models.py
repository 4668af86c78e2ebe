"""Actor and critic of one worker, trained by fused schedules, for tests that compare them with the stock schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.pipeline.agreement import share_schedule
from megatron_ultraep.pipeline.baselines import concatenated, one_f_one_b, random_schedule
from megatron_ultraep.pipeline.communication import Links
from megatron_ultraep.pipeline.executor import ExecutionReport, FusedExecutor
from megatron_ultraep.pipeline.problem import PipelineModel, Problem, Schedule
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch, unpack_rows
from rl.training.fused import stage_work
from rl.training.passes import PreparedPass, row_values
from rl.training.worker import TrainWorker
from tests.rl.training.common import make_layout
from tests.rl.training.critics import POLICY, VALUES, critic_samples, critic_worker

OBJECTIVES = {"actor": POLICY, "critic": VALUES}
BUDGETS = {"actor": 64, "critic": 40}  # rows of a micro-batch: the models differ in the number of them


def nodes_of(worker: TrainWorker, model: str) -> tuple[tuple[int, ...], ...]:
    """Where a model's stages lie."""
    layout = worker.spec.layout_of(model)
    return layout.placement or (tuple(range(layout.pp)),)


def problem_of(worker: TrainWorker, counts: dict[str, int], forward_only: Collection[str] = ()) -> Problem:
    """The models' problem; a micro-batch of the critic takes half the time of one of the actor."""
    models = []
    for i, (name, count) in enumerate(counts.items()):
        nodes = nodes_of(worker, name)
        stages, time = len(nodes[0]), 1 / (1 + i)
        frozen = name in forward_only
        backward = (0.0,) * stages if frozen else (2 * time,) * stages
        models.append(
            PipelineModel(name, nodes, count, (time,) * stages, backward, (1.0,) * stages, forward_only=frozen)
        )
    return Problem(worker.spec.layout.pp, tuple(models))


def schedule_of(problem: Problem, kind: str | int) -> Schedule:
    """Random for a seed, or by name."""
    if isinstance(kind, int):
        return random_schedule(problem, kind)
    return concatenated(problem) if kind == "concatenated" else one_f_one_b(problem, 0)


class Fused:
    """A worker and the links between its stages.

    Args:
        directory, layout, critic, spec: as for ``critic_worker``.
        models: which of its models run.
    """

    def __init__(
        self, directory: str, layout: dict[str, Any], critic: dict[str, Any], models: tuple[str, ...], **spec: Any
    ) -> None:
        self.worker = critic_worker(directory, layout, critic, **({"distributed_optimizer": False} | spec))
        self.samples = critic_samples(self.worker.actor.arch)
        self.models = models
        placements = [nodes_of(self.worker, name) for name in models]
        self.links = Links(placements, self.worker.spec.layout.pp, timeout_s=60)

    def part_of(self, name: str) -> MiniBatch:
        """This rank's part of the mini-batch of a model."""
        layout = self.worker.spec.layout_of(name)
        rank = self.worker.runners[name].model.groups.coordinates["dp"]
        return MiniBatch.make(self.samples, make_layout(self.samples, layout, BUDGETS[name])).part(rank)

    def gradients(
        self, kind: str | int, step: int = 0, *, counts: dict[str, int] | None = None, more_rows: int = 0
    ) -> tuple[dict[str, Any], ExecutionReport]:
        """Gradients left in ``main_grad``; by model what each run's loss, sums and routes were.

        Args:
            kind: of the schedule.
            counts: micro-batches of models in the schedule, where they are to be wrong.
            more_rows: than there are, for the same reason.
        """
        with contextlib.ExitStack() as prepared_passes:
            prepared = {}
            for name in self.models:
                trained = self.worker.trained[name]
                trained.empty_gradients()
                passing = trained.prepare(self.part_of(name), step, OBJECTIVES[name])
                prepared[name] = prepared_passes.enter_context(passing)
            report = self.run(kind, prepared, counts or {}, more_rows)
            found = {}
            for name, kept in zip(self.models, report.kept, strict=True):
                loss, sums = self.worker.trained[name].add_up(kept)
                found[name] = {"loss": loss, "sums": sums, "digests": prepared[name].finish().digests}
        return found, report

    def gradients_and_values(self, kind: str | int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The actor's gradients and the critic's values, from one schedule."""
        critic, batch = self.worker.runners["critic"], self.part_of("critic")
        actor = self.worker.trained["actor"]
        actor.empty_gradients()
        with (
            actor.prepare(self.part_of("actor"), 0, POLICY) as training,
            critic.prepare(
                batch,
                pass_="eval",
                step=0,
                routes="own",
                per_micro_batch=lambda output, packed, micro_batch: row_values(output),
                forward_only=True,
            ) as valuing,
        ):
            report = self.run(kind, {"actor": training, "critic": valuing}, {}, 0)
            loss, sums = actor.add_up(report.kept[0])
            mine = batch.layout.micro_batches[critic.model.groups.coordinates["dp"]]
            values: dict[str, Any] = {}
            for micro_batch, rows in zip(mine, report.kept[1], strict=False):
                values |= unpack_rows(micro_batch, batch.samples, rows.numpy())
            return {"actor": {"loss": loss, "sums": sums, "digests": training.finish().digests}}, values

    def run(
        self, kind: str | int, prepared: dict[str, PreparedPass], counts: dict[str, int], more_rows: int
    ) -> ExecutionReport:
        right = {name: passing.microbatches for name, passing in prepared.items()}
        forward_only = {name for name, passing in prepared.items() if passing.forward_only}
        mine = (
            schedule_of(problem_of(self.worker, right | counts, forward_only), kind) if dist.get_rank() == 0 else None
        )
        executor = FusedExecutor(share_schedule(mine), self.links)
        works = [stage_work(passing) for passing in prepared.values()]
        return executor.run([replace(w, rows=tuple(r + more_rows for r in w.rows)) for w in works])

    def tensors(self, name: str, source: str = "main_grad") -> dict[str, Any]:
        model = self.worker.trained[name].model
        return {n: t.double().cpu().numpy().copy() for n, t in export_weights(model, source=source)}


def fused_gradients(
    directory: str,
    layout: dict[str, Any],
    critic: dict[str, Any],
    kind: str | int,
    models: tuple[str, ...] = ("actor", "critic"),
    **spec: Any,
) -> dict[str, Any]:
    """Loss, sums and gradients in logical order of both models, as this rank sees them."""
    fused = Fused(directory, layout, critic, models, **spec)
    found, _ = fused.gradients(kind)
    for name in models:
        found[name]["tensors"] = fused.tensors(name)
        found[f"{name} balance"] = fused.worker.trained[name].balance_metrics()
    return found


def trained_weights(
    directory: str, layout: dict[str, Any], critic: dict[str, Any], kind: str | int | None, steps: int = 2, **spec: Any
) -> dict[str, Any]:
    """Weights of both models after some steps; gradients come from a fused schedule, or (None) the stock one."""
    fused = Fused(directory, layout, critic, ("actor", "critic"), **spec)
    for step in range(steps):
        if kind is not None:
            fused.gradients(kind, step)
        for name in fused.models:
            trained = fused.worker.trained[name]
            if kind is None:
                trained.gradients(fused.part_of(name), step, OBJECTIVES[name])
            trained.optimizer_step(1e-2)
    for name in fused.models:
        compat.synchronize_parameters(fused.worker.trained[name].model.wrapped)
    return {name: fused.tensors(name, "parameter") for name in fused.models}
