"""One Megatron rank of the trainer; free of Ray, so that tests run it in plain processes.

worker = TrainWorker(TrainerSpec(...), rank, world)     # torch.distributed is initialised
worker.load("model/")
old, _ = worker.logprobs(part, "actor", "old_logprob", step, "replay")
result = worker.train(part, step, PolicyObjective(...))     # or accumulate(chunk, ...) ..., apply(scale)
worker.offload()                                            # colocated: engines generate now
worker.onload()
chunks = list(worker.export(bucket_bytes))
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.layout import MicroBatch, MicroBatchKey, Pass
from megatron_ultraep.megatron import compat, microbatch
from megatron_ultraep.megatron.attach import Balancer, attach, moe_layers
from megatron_ultraep.megatron.checkpoint import home_slot_of
from megatron_ultraep.megatron.groups import create_groups
from megatron_ultraep.megatron.migrate import MoveGroup, MoveReport, make_move_group, move_experts
from megatron_ultraep.megatron.router_replay import RoutingReplay
from rl.models.architecture import read_architecture
from rl.models.builder import DTYPES, BuiltModel, build_model
from rl.models.weights import export_weights, load_weights
from rl.training.accumulate import AccumulationError, Accumulator
from rl.training.batch import MiniBatch, PackedTensors
from rl.training.foresight import RankBalance, StagePlans, foreseen, rank_balance
from rl.training.objectives import Objective, PolicyObjective, SupervisedObjective
from rl.training.offload import Offloader, OffloadReport, Part
from rl.training.passes import PassRunner, PassSettings, RouteMode, RouteReport, RouteSource, local_routes
from rl.training.results import AccumulateResult, TrainResult
from rl.training.spec import OptimizerSpec, TrainerSpec

__all__ = [
    "Objective",
    "OptimizerSpec",
    "PolicyObjective",
    "SupervisedObjective",
    "TrainResult",
    "TrainWorker",
    "TrainerSpec",
    "initialize",
    "model_exists",
    "reset_optimizer_state",
]


class TrainWorker:
    """Models, optimizer and passes of one rank; a collective with all other ranks of the trainer.

    Args:
        spec: what to build; the same on all ranks.
        routes: where captured routes come from.
    """

    def __init__(self, spec: TrainerSpec, routes: RouteSource = local_routes) -> None:
        self.spec = spec
        arch = read_architecture(spec.model_path)
        dtype = DTYPES[spec.dtype]
        if dtype == torch.float64 and spec.distributed_optimizer:
            raise ValueError("Megatron's distributed optimizer takes no float64: set distributed_optimizer to false")
        if dtype == torch.float64 and spec.optimizer.clip_grad:
            raise ValueError("Megatron clips no float64 gradients: set optimizer.clip_grad to 0")
        microbatch.install()
        self.groups = create_groups(spec.layout, timeout_s=spec.collective_s)
        self.actor = build_model(
            arch,
            self.groups,
            name="actor",
            dtype=dtype,
            recompute=spec.recompute,
            seed=spec.seed,
            permute_fusion=spec.permute_fusion,
        )
        load_weights(self.actor, spec.model_path)
        self.replay = self._replay_of(self.actor)
        self._wrap_and_optimize()
        self.runners = {"actor": PassRunner(self.actor, self.replay, routes)}
        self.reference: BuiltModel | None = None
        if spec.reference:
            self.reference = build_model(arch, self.groups, name="reference", dtype=dtype, seed=spec.seed)
            load_weights(self.reference, spec.model_path)
            self.runners["reference"] = PassRunner(self.reference, self._replay_of(self.reference), routes)
        self.balancer = self._balance()
        self._move_group: MoveGroup | None = None
        if spec.reorder:
            self._move_group = self._make_move_group()
        self.accumulator = Accumulator(self)
        self.offloader = Offloader(self)

    def _replay_of(self, model: BuiltModel) -> RoutingReplay | None:
        return RoutingReplay(model.chunks, model.arch.moe_layer_of()) if model.arch.is_moe else None

    def _balance(self) -> Balancer | None:
        """Balance the actor, and the reference too, which leaves no records."""
        balance = self.spec.balance
        if balance is None or not balance.enabled:
            return None
        if self.reference is not None:
            attach(self.reference.chunks, dataclasses.replace(balance, record=""), timeout_s=self.spec.collective_s)
        return attach(self.actor.wrapped, balance, timeout_s=self.spec.collective_s)

    def _wrap_and_optimize(self) -> None:
        spec, actor = self.spec, self.actor
        chunks = list(actor.chunks)
        if actor.dtype == torch.bfloat16:
            chunks = [compat.float16_module(actor.config, chunk) for chunk in chunks]
        actor.wrapped = compat.distributed_data_parallel(
            actor.config,
            chunks,
            self.groups.collection,
            distributed_optimizer=spec.distributed_optimizer,
            grad_dtype_fp32=actor.dtype != torch.float64,
            overlap=spec.overlap,
        )
        if spec.fuse_gradients:
            compat.fuse_weight_gradients(actor.wrapped)
        o = spec.optimizer
        self.optimizer = compat.optimizer(
            actor.wrapped,
            self.groups.collection,
            lr=o.lr,
            min_lr=o.min_lr,
            adam_beta1=o.betas[0],
            adam_beta2=o.betas[1],
            adam_eps=o.eps,
            weight_decay=o.weight_decay,
            clip_grad=o.clip_grad,
            bf16=actor.dtype == torch.bfloat16,
            params_dtype=actor.dtype,
            use_distributed_optimizer=spec.distributed_optimizer,
        )
        self.scheduler = compat.parameter_scheduler(
            self.optimizer,
            max_lr=o.lr,
            min_lr=o.min_lr if o.schedule != "constant" else min(o.min_lr, o.lr),
            warmup_steps=o.warmup_steps,
            decay_steps=o.decay_steps,
            style=o.schedule,
            weight_decay=o.weight_decay,
        )
        self._finalize = compat.finalize_grads_summed(self.groups.collection)
        actor.config.finalize_model_grads_func = self._finalize
        actor.config.grad_scale_func = self.optimizer.scale_loss

    # ---------------------------------------------------------------- passes

    def logprobs(
        self,
        batch: MiniBatch,
        model: str,
        pass_: Pass,
        step: int,
        routes: RouteMode,
        settings: PassSettings,
        plans: StagePlans | None = None,
        first_micro_batch: int = 0,
    ) -> tuple[dict[str, Any], RouteReport]:
        """Log-probs of learnt tokens, see :meth:`PassRunner.logprobs`; model ``"actor"`` or ``"reference"``.

        Plans are those of the actor; see :meth:`train`. Needs no more than weights on the device.
        """
        self.offloader.require("log-probs", "weights")
        with self._foreseen(batch, pass_, step, plans, first_micro_batch):
            return self.runners[model].logprobs(
                batch, settings, pass_=pass_, step=step, routes=routes, first_micro_batch=first_micro_batch
            )

    def _foreseen(self, batch: MiniBatch, pass_: Pass, step: int, plans: StagePlans | None, first: int) -> Any:
        mine = batch.layout.micro_batches[self.groups.coordinates["dp"]]
        keys = [MicroBatchKey(self.actor.name, pass_, step, first + i) for i in range(len(mine))]
        ids = batch.layout.sample_ids
        samples = {
            key: [ids[s.sample] for s in micro_batch.segments] for key, micro_batch in zip(keys, mine, strict=True)
        }
        return foreseen(self.balancer, plans, keys, samples, self.actor.device)

    def gradients(
        self, batch: MiniBatch, step: int, objective: Objective, plans: StagePlans | None = None
    ) -> tuple[float, dict[str, float], RouteReport]:
        """Forward and backward of one mini-batch, gradients reduced and left in ``main_grad``; see :meth:`train`."""
        self._require_no_set("a mini-batch")
        self.offloader.require("gradients", "weights", "gradients", "optimizer")
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
            batch, step, objective, plans: as for :meth:`train`.
            first_micro_batch: see :meth:`PassRunner.run`.
        """
        runner = self.runners["actor"]

        def per_micro_batch(logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch) -> Any:
            loss, sums = objective(runner, batch, logits, packed, micro_batch)
            return loss, {"loss": loss.detach(), **sums}

        with self._foreseen(batch, "train", step, plans, first_micro_batch):
            kept, report = runner.run(
                batch,
                pass_="train",
                step=step,
                routes=objective.routes,
                per_micro_batch=per_micro_batch,
                forward_only=False,
                first_micro_batch=first_micro_batch,
            )
        sums: dict[str, float] = {}
        if self.groups.coordinates["tp"] == 0:
            for entry in kept:
                for name, value in entry.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        return sums.pop("loss", 0.0), sums, report

    def train(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        *,
        lr: float | None = None,
        plans: StagePlans | None = None,
    ) -> TrainResult:
        """One optimizer step.

        Args:
            batch: this data-parallel rank's part.
            step: of the micro-batch keys.
            objective: the loss.
            lr: learning rate of this step; None follows the schedule.
            plans: made ahead, of this rank; given to all ranks or to none. None plans on exact loads.

        Raises:
            ForesightMismatch: on all ranks, before the optimizer steps, where routes are not those planned for.
        """
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
        return found if self.groups.coordinates["ep"] == 0 else {}

    # ---------------------------------------------------------------- sets that arrive in chunks

    def accumulate(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        *,
        plans: StagePlans | None = None,
        first: bool,
    ) -> AccumulateResult:
        """Forward and backward of one chunk of a set; gradients stay in ``main_grad``, not reduced.

        Args:
            batch: this data-parallel rank's part of the chunk, with denominators estimated for the whole set, the same
                ones for all its chunks.
            step: of the micro-batch keys, the same for all chunks.
            objective: the loss.
            plans: of this chunk; see :meth:`train`.
            first: begins a set.

        Raises:
            AccumulationError: a set begun twice or not at all, or gradients that are reduced during backward.
            ForesightMismatch: see :meth:`train`; the set is discarded.
        """
        self.offloader.require("gradients", "weights", "gradients", "optimizer")
        return self.accumulator.accumulate(batch, step, objective, plans=plans, first=first)

    def apply(self, scale: float, *, lr: float | None = None) -> TrainResult:
        """End a set: scale its gradients, reduce them once, and step.

        Args:
            scale: estimated denominator / true one, see ``Counts.scale``; the same on all ranks.
            lr: learning rate of this step; None follows the schedule.

        Returns:
            what all chunks did together.

        Raises:
            AccumulationError: no set is open.
            ValueError: a scale that is no positive number.
        """
        return self.accumulator.apply(scale, lr)

    def discard(self) -> None:
        """Drop the open set, if there is one."""
        self.accumulator.discard()

    def finalize_gradients(self) -> None:
        """Reduce what is in ``main_grad`` over ranks, as Megatron does at the end of its schedules."""
        self._finalize(self.actor.wrapped)

    def _require_no_set(self, what: str) -> None:
        if self.accumulator.is_open:
            raise AccumulationError(
                f"{what} would empty the gradients of the set that is open: apply() or discard() it"
            )

    # ---------------------------------------------------------------- colocated mode

    def offload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Make room on the device; see ``rl.training.offload``."""
        self._require_no_set("offloading")
        return self.offloader.offload(what)

    def onload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Bring back what was offloaded."""
        return self.offloader.onload(what)

    # ---------------------------------------------------------------- between steps

    def reorder(self, homes: Mapping[int, Sequence[int]], *, limit_bytes: int = 256 * 2**20) -> MoveReport:
        """Move the actor's experts to new homes, with all that the optimizer knows of them; between steps.

        Collective over all ranks. Nothing else of the trainer notices: losses, exported weights and checkpoints are by
        logical expert. The reference stays as it is.

        Args:
            homes: ``{Megatron's layer number: [experts] home slots}``, the same on every rank; layers left out stay.
            limit_bytes: most bytes staged on a rank at once.

        Raises:
            ValueError: without balancing, or homes that are none.
            Unsupported: an optimizer whose states cannot be moved.
            TornStateError: when it failed half-way.
        """
        if self.balancer is None:
            raise ValueError("only balanced layers send tokens to experts that changed their homes: enable balancing")
        self._require_no_set("moving experts")
        self.offloader.require("moving experts", "weights", "gradients", "optimizer")
        self.empty_gradients()
        if self._move_group is None:
            self._move_group = self._make_move_group()
        report = move_experts(self.actor.wrapped, self.optimizer, homes, self._move_group, limit_bytes=limit_bytes)
        self.balancer.rehome({number: tuple(home_slot) for number, home_slot in homes.items()})
        return report

    def _make_move_group(self) -> MoveGroup:
        return make_move_group(
            self.actor.wrapped, self.optimizer, self.groups.collection, timeout_s=self.spec.collective_s
        )

    def balance(self) -> RankBalance | None:
        """What the driver has to know to plan ahead; None without balancing."""
        if self.balancer is None:
            return None
        return rank_balance(self.balancer, self.actor.chunks, self.actor.arch.moe_layer_of())

    def empty_gradients(self) -> None:
        """Zeros in ``main_grad``."""
        for chunk in self.actor.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _send_experts_back(self) -> None:
        """All experts to where Megatron has them."""
        layers = moe_layers(self.actor.chunks)
        away = [layer for layer in layers if home_slot_of(layer) != tuple(range(layer.config.num_moe_experts))]
        if away:
            self.reorder({int(layer.layer_number): tuple(range(layer.config.num_moe_experts)) for layer in away})

    def end_warmup(self) -> None:
        """Forget the optimizer's moments, go back to the schedule; the reference takes today's weights."""
        self.offloader.require("the end of the warm-up", "weights", "gradients", "optimizer")
        reset_optimizer_state(self.optimizer)
        self.scheduler.step(increment=0)
        if self.reference is not None:
            self._send_experts_back()  # the reference has never moved
            with torch.no_grad():
                for mine, theirs in zip(self.actor.chunks, self.reference.chunks, strict=True):
                    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                        q.copy_(p)

    # ---------------------------------------------------------------- weights

    def export(self, bucket_bytes: int, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's share of the weights in Hugging Face names, in buckets on the CPU; a collective."""
        self.offloader.require("exporting weights", "weights")
        compat.synchronize_parameters(self.actor.wrapped)
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in export_weights(self.actor):
            copy = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            bucket[name] = copy
            size += copy.numel() * copy.element_size()
            if size >= bucket_bytes:
                yield bucket
                bucket, size = {}, 0
        if bucket:
            yield bucket

    def close(self) -> None:
        """Write what is left of the load records."""
        if self.balancer is not None:
            self.balancer.close()


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


def initialize(rank: int, world: int, address: str, backend: str, timeout_s: float) -> None:
    """Join the trainer's process group.

    Args:
        rank, world: place among the trainer's ranks.
        address: ``host:port`` where rank 0 listens.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout_s: limit of joining and of every collective, in seconds.
    """
    from datetime import timedelta

    if backend == "nccl":
        torch.cuda.set_device(0)  # Ray shows each actor its own GPU only
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def model_exists(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()
