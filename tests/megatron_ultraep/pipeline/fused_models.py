"""Actor and critic of one worker, trained by fused schedules, for tests that compare them with the stock schedule."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist

from megatron_ultraep.pipeline.agreement import share_schedule
from megatron_ultraep.pipeline.baselines import concatenated, one_f_one_b, random_schedule
from megatron_ultraep.pipeline.communication import Links
from megatron_ultraep.pipeline.executor import ExecutionReport, FusedExecutor
from megatron_ultraep.pipeline.problem import PipelineModel, Problem, Schedule
from megatron_ultraep.pipeline.stage import StageWork
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch, TrainSample
from rl.training.passes import PreparedPass
from rl.training.worker import TrainWorker
from tests.rl.training.common import make_layout
from tests.rl.training.critics import POLICY, VALUES, critic_samples, critic_worker

OBJECTIVES = {"actor": POLICY, "critic": VALUES}
BUDGETS = {"actor": 64, "critic": 40}  # rows of a micro-batch: the models differ in the number of them


def nodes_of(worker: TrainWorker, model: str) -> tuple[tuple[int, ...], ...]:
    """Where a model's stages lie."""
    layout = worker.spec.layout_of(model)
    return layout.placement or (tuple(range(layout.pp)),)


def part_of(worker: TrainWorker, model: str, samples: list[TrainSample]) -> MiniBatch:
    layout = worker.spec.layout_of(model)
    rank = worker.runners[model].model.groups.coordinates["dp"]
    return MiniBatch.make(samples, make_layout(samples, layout, BUDGETS[model])).part(rank)


def work_of(prepared: PreparedPass) -> StageWork:
    model = prepared.model
    return StageWork(
        chunk=model.run_chunks()[0],
        config=model.config,
        groups=model.groups,
        forward_step=prepared.forward_step,
        data=prepared.iterators[0],
        rows=prepared.rows,
        forward_only=prepared.forward_only,
    )


def problem_of(worker: TrainWorker, counts: dict[str, int]) -> Problem:
    """The models' problem, the critic half as long as the actor."""
    models = []
    for i, (name, count) in enumerate(counts.items()):
        nodes = nodes_of(worker, name)
        times = {"forward": (1 / (1 + i),) * len(nodes[0]), "backward": (2 / (1 + i),) * len(nodes[0])}
        models.append(PipelineModel(name, nodes, count, activation=(1.0,) * len(nodes[0]), **times))
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

    def gradients(self, kind: str | int, step: int = 0) -> tuple[dict[str, Any], ExecutionReport]:
        """Gradients left in ``main_grad``; by model what each run's loss, sums and routes were."""
        with contextlib.ExitStack() as prepared_passes:
            prepared = {}
            for name in self.models:
                trained = self.worker.trained[name]
                trained.empty_gradients()
                batch = part_of(self.worker, name, self.samples)
                prepared[name] = prepared_passes.enter_context(trained.prepare(batch, step, OBJECTIVES[name]))
            counts = {name: passing.microbatches for name, passing in prepared.items()}
            mine = schedule_of(problem_of(self.worker, counts), kind) if dist.get_rank() == 0 else None
            executor = FusedExecutor(share_schedule(mine), self.links)
            report = executor.run([work_of(passing) for passing in prepared.values()])
            found = {}
            for name, kept in zip(self.models, report.kept, strict=True):
                loss, sums = self.worker.trained[name].add_up(kept)
                routes = prepared[name].finish()
                found[name] = {"loss": loss, "sums": sums, "digests": routes.digests}
        return found, report

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
