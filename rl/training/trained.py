"""One model that is trained on this rank: wrapped in DDP, with optimizer and schedule, and its way to a step.

Several of them live in one process (actor and critic), each with process groups, optimizer and runner of its own; they
share nothing but the ranks.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_ultraep.layout import MicroBatch, MicroBatchKey, Pass
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.attach import Balancer
from megatron_ultraep.runtime.ranges import ranged
from rl.models.builder import BuiltModel
from rl.training.accumulate import AccumulationError, Accumulator
from rl.training.batch import MiniBatch, PackedTensors
from rl.training.foresight import StagePlans, foreseen
from rl.training.objectives import Objective
from rl.training.passes import PassRunner, PreparedPass, RouteReport
from rl.training.results import TrainResult
from rl.training.spec import OptimizerSpec


class TrainedModel:
    """A model with everything that a step of it takes.

    Args:
        model: with its weights; gets ``wrapped``.
        runner: of its passes.
        settings: of its optimizer.
        distributed_optimizer: shard optimizer state over data-parallel ranks.
        overlap: reduce gradients while backward runs, gather parameters while forward runs.
        fuse_gradients: Transformer Engine's kernels add weight gradients to ``main_grad`` themselves.

    Attributes:
        balancer: of its experts; None until whoever balances it sets it.
        accumulator: its open set.
    """

    def __init__(
        self,
        model: BuiltModel,
        runner: PassRunner,
        settings: OptimizerSpec,
        *,
        distributed_optimizer: bool,
        overlap: bool = False,
        fuse_gradients: bool = False,
    ) -> None:
        self.model, self.runner, self.overlap = model, runner, overlap
        self.balancer: Balancer | None = None
        chunks = list(model.chunks)
        if model.dtype == torch.bfloat16:
            chunks = [compat.float16_module(model.config, chunk) for chunk in chunks]
        model.wrapped = compat.distributed_data_parallel(
            model.config,
            chunks,
            model.groups.collection,
            distributed_optimizer=distributed_optimizer,
            grad_dtype_fp32=model.dtype != torch.float64,
            overlap=overlap,
        )
        if fuse_gradients:
            compat.fuse_weight_gradients(model.wrapped)
        self.optimizer = compat.optimizer(
            model.wrapped,
            model.groups.collection,
            lr=settings.lr,
            min_lr=settings.min_lr,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            bf16=model.dtype == torch.bfloat16,
            params_dtype=model.dtype,
            use_distributed_optimizer=distributed_optimizer,
        )
        self.scheduler = compat.parameter_scheduler(
            self.optimizer,
            max_lr=settings.lr,
            min_lr=settings.min_lr if settings.schedule != "constant" else min(settings.min_lr, settings.lr),
            warmup_steps=settings.warmup_steps,
            decay_steps=settings.decay_steps,
            style=settings.schedule,
            weight_decay=settings.weight_decay,
        )
        self._finalize = compat.finalize_grads_summed(model.groups.collection)
        model.config.finalize_model_grads_func = self._finalize
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.accumulator = Accumulator(self)

    # ---------------------------------------------------------------- gradients

    def gradients(
        self, batch: MiniBatch, step: int, objective: Objective, plans: StagePlans | None = None
    ) -> tuple[float, dict[str, float], RouteReport]:
        """Forward and backward of one mini-batch, gradients reduced and left in ``main_grad``."""
        self.require_no_set("a mini-batch")
        self.empty_gradients()
        return self.forward_backward(batch, step, objective, plans)

    def forward_backward(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        plans: StagePlans | None = None,
        *,
        first_micro_batch: int = 0,
    ) -> tuple[float, dict[str, float], RouteReport]:
        """Add gradients to ``main_grad``, and finalize them if the model's configuration says so.

        Args:
            batch, step, objective, plans: as for ``TrainWorker.train``.
            first_micro_batch: see :meth:`PassRunner.run`.
        """
        with (
            self.foreseen(batch, "train", step, plans, first_micro_batch),
            self.prepare(batch, step, objective, first_micro_batch=first_micro_batch) as prepared,
        ):
            kept = self.runner.run_prepared(prepared)
            report = prepared.finish()
        loss, sums = self.add_up(kept)
        return loss, sums, report

    def prepare(self, batch: MiniBatch, step: int, objective: Objective, *, first_micro_batch: int = 0) -> PreparedPass:
        """Forward and backward of a mini-batch, ready to run by any schedule; gradients will add to ``main_grad``.

        What the last stage keeps of each micro-batch is for :meth:`add_up`. The schedule finalizes gradients once.
        """

        def per_micro_batch(output: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch) -> Any:
            loss, sums = objective(self.runner, batch, output, packed, micro_batch)
            return loss, {"loss": loss.detach(), **sums}

        return self.runner.prepare(
            batch,
            pass_="train",
            step=step,
            routes=objective.routes,
            per_micro_batch=per_micro_batch,
            forward_only=False,
            first_micro_batch=first_micro_batch,
        )

    def add_up(self, kept: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, float]]:
        """This rank's share of loss and metric sums; nothing but on the first tensor-parallel rank."""
        sums: dict[str, float] = {}
        if self.model.groups.coordinates["tp"] == 0:
            for entry in kept:
                for name, value in entry.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        return sums.pop("loss", 0.0), sums

    def foreseen(self, batch: MiniBatch, pass_: Pass, step: int, plans: StagePlans | None, first: int) -> Any:
        """A context in which the model's passes over a batch take plans that were made ahead."""
        mine = batch.layout.micro_batches[self.model.groups.coordinates["dp"]]
        keys = [MicroBatchKey(self.model.name, pass_, step, first + i) for i in range(len(mine))]
        ids = batch.layout.sample_ids
        samples = {
            key: [ids[s.sample] for s in micro_batch.segments] for key, micro_batch in zip(keys, mine, strict=True)
        }
        return foreseen(self.balancer, plans, keys, samples, self.model.device)

    # ---------------------------------------------------------------- steps

    def train(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        *,
        lr: float | None = None,
        plans: StagePlans | None = None,
    ) -> TrainResult:
        """One optimizer step; see ``TrainWorker.train``."""
        started = time.perf_counter()
        self.balance_metrics()  # of passes before this one
        loss, sums, report = self.gradients(batch, step, objective, plans)
        computed = time.perf_counter()
        grad_norm, used, updated = self.optimizer_step(lr)
        ended = time.perf_counter()
        return TrainResult(
            loss=loss,
            sums=sums,
            grad_norm=grad_norm,
            lr=used,
            updated=updated,
            routes=report,
            seconds={"forward_backward": computed - started, "optimizer": ended - computed},
            balance=self.balance_metrics(),
        )

    @ranged("optimizer")
    def optimizer_step(self, lr: float | None) -> tuple[float, float, bool]:
        """Step on the gradients that are in ``main_grad``, finalized; ``(norm before clipping, lr, updated)``."""
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        used = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0
        updated, grad_norm, _ = self.optimizer.step()
        if lr is None:
            self.scheduler.step(increment=1)
        return float(grad_norm) if grad_norm is not None else float("nan"), used, bool(updated)

    def balance_metrics(self) -> dict[str, float]:
        """Of balancing since the last call, on one rank of each expert-parallel group; empty on the others."""
        found = self.balancer.metrics() if self.balancer is not None else {}
        return found if self.model.groups.coordinates["ep"] == 0 else {}

    @ranged("reduce gradients")
    def finalize_gradients(self) -> None:
        """Reduce what is in ``main_grad`` over ranks, as Megatron does at the end of its schedules."""
        self._finalize(self.model.wrapped)

    def empty_gradients(self) -> None:
        """Zeros in ``main_grad``."""
        for chunk in self.model.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Forget the optimizer's moments; go back to the schedule's learning rate."""
        reset_optimizer_state(self.optimizer)
        self.scheduler.step(increment=0)

    def refresh(self) -> None:
        """Take over parameters that were changed from outside into the optimizer's own copies of them."""
        self.optimizer.reload_model_params()

    def require_no_set(self, what: str) -> None:
        """See that no set is open.

        Raises:
            AccumulationError: one is; ``what`` would empty its gradients.
        """
        if self.accumulator.is_open:
            raise AccumulationError(
                f"{what} would empty the gradients of the set that is open: apply() or discard() it"
            )


def reset_optimizer_state(optimizer: Any) -> None:
    """Adam's moments and step counts to zero; makes them where the first step has not yet."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = inner.optimizer
        if adam is None:
            continue
        for group in adam.param_groups:
            for p in group["params"]:
                state = adam.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p)
                # TE's fused Adam counts per group, from its first step on; torch's per parameter.
                if "step" not in group and not hasattr(adam, "name_to_dtype_map"):
                    state["step"] = torch.zeros((), dtype=torch.float32)
            if "step" in group:
                group["step"] = 0
