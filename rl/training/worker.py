"""One Megatron rank of the trainer; free of Ray, so that tests run it in plain processes.

worker = TrainWorker(TrainerSpec(...), rank, world)     # torch.distributed is initialised
worker.load("model/")
old, _ = worker.logprobs(part, "actor", "old_logprob", step, "replay")
result = worker.train(part, step, PolicyObjective(...))
chunks = list(worker.export(bucket_bytes))
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.layout import MicroBatch, MicroBatchKey, Pass
from megatron_ultraep.megatron import compat, microbatch
from megatron_ultraep.megatron.attach import Balancer, attach, moe_layers
from megatron_ultraep.megatron.checkpoint import home_slot_of
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.megatron.migrate import MoveGroup, MoveReport, make_move_group, move_experts
from megatron_ultraep.megatron.router_replay import RoutingReplay
from rl.algorithms.losses import Normaliser, PolicyLossConfig, PolicyTokens, policy_loss
from rl.models.architecture import read_architecture
from rl.models.builder import DTYPES, BuiltModel, Recompute, build_model
from rl.models.weights import export_weights, load_weights
from rl.training.batch import MiniBatch, PackedTensors, pack_field
from rl.training.foresight import RankBalance, StagePlans, foreseen, rank_balance
from rl.training.passes import PassRunner, PassSettings, RouteMode, RouteReport, RouteSource, local_routes


@dataclass(frozen=True)
class OptimizerSpec:
    """Adam and its schedule, counted in optimizer steps; see ``rl.config.OptimizerSection`` for the fields."""

    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class TrainerSpec:
    """What every rank builds.

    Attributes:
        model_path: Hugging Face directory of architecture and first weights.
        layout: parallel sizes.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float64"``.
        recompute: activation recomputation.
        distributed_optimizer: shard optimizer state over data-parallel ranks.
        optimizer: its settings.
        reference: build the frozen reference model too.
        seed: of Megatron's random-number tracker.
        collective_s: limit of every collective, in seconds.
        balance: how experts are balanced; None, or not enabled: not at all.
        fuse_gradients: Transformer Engine's kernels add weight gradients to ``main_grad`` themselves.
        permute_fusion: Transformer Engine's kernels permute tokens; needs Transformer Engine.
        overlap: reduce gradients while backward runs, gather the distributed optimizer's parameters while forward runs.
        reorder: experts will change their homes; whether they can is asked at start.
    """

    model_path: str
    layout: ParallelLayout
    dtype: str = "float32"
    recompute: Recompute = field(default_factory=Recompute)
    distributed_optimizer: bool = True
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    reference: bool = False
    seed: int = 0
    collective_s: float = 300.0
    balance: BalanceConfig | None = None
    overlap: bool = False
    fuse_gradients: bool = False
    permute_fusion: bool = False
    reorder: bool = False


class Objective(Protocol):
    """From one micro-batch's logits to its additive share of the mini-batch loss and sums of metrics."""

    routes: RouteMode

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class PolicyObjective:
    """The policy loss of ``rl.algorithms.losses``."""

    loss: PolicyLossConfig
    settings: PassSettings
    routes: RouteMode = "replay"

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, entropy = runner.token_logprobs(logits, packed, self.settings)

        def given(name: str) -> torch.Tensor | None:
            return pack_field(micro_batch, batch.samples, name, logprobs.device, logprobs.dtype)

        advantages = given("advantages")
        if advantages is None:
            raise ValueError("expected advantages of every sample of a policy mini-batch, got none")
        any_sample = next(iter(batch.samples.values()), None)
        tokens = PolicyTokens(
            logprobs=logprobs,
            advantages=advantages,
            mask=packed.mask,
            sample_index=packed.sample_index,
            old_logprobs=given("old_logprobs") if any_sample and any_sample.old_logprobs is not None else None,
            rollout_logprobs=given("rollout_logprobs"),
            ref_logprobs=given("ref_logprobs") if any_sample and any_sample.ref_logprobs is not None else None,
            entropy=entropy if self.loss.entropy_coef or entropy is None else entropy.detach(),
        )
        normaliser = Normaliser(
            total_tokens=float(max(1, batch.total_tokens)),
            total_sequences=float(max(1, batch.total_sequences)),
            sequence_tokens=packed.segment_tokens,
        )
        return policy_loss(tokens, self.loss, normaliser)


@dataclass(frozen=True)
class SupervisedObjective:
    """Mean negative log-likelihood of the learnt tokens; routers choose by themselves.

    The sum ``exact`` counts samples whose learnt tokens are what greedy decoding would write.
    """

    settings: PassSettings = field(default_factory=PassSettings)
    routes: RouteMode = "own"

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, _ = runner.token_logprobs(logits, packed, self.settings)
        total = -(torch.where(packed.mask, logprobs, torch.zeros_like(logprobs))).sum()
        wrong = packed.mask & ~runner.most_likely(logits, packed)
        errors = torch.zeros_like(packed.segment_tokens).index_add_(0, packed.sample_index, wrong.to(torch.int64))
        exact = ((errors == 0) & (packed.segment_tokens > 0)).sum()
        return total / max(1, batch.total_tokens), {"nll": total.detach(), "exact": exact}


@dataclass
class TrainResult:
    """What one optimizer step did, on this rank.

    Attributes:
        loss: this rank's share of the mini-batch loss; 0 but on the last stage's first tensor-parallel ranks.
        sums: metric sums over this rank's learnt tokens, empty elsewhere; the driver adds them over ranks.
        grad_norm: global norm before clipping, the same on all ranks.
        lr: of the step.
        updated: False when Megatron skipped the step.
        routes: what routers did.
        seconds: by part.
        balance: metrics of balancing this step, from one rank of each expert-parallel group; empty on the others.
    """

    loss: float
    sums: dict[str, float]
    grad_norm: float
    lr: float
    updated: bool
    routes: RouteReport
    seconds: dict[str, float]
    balance: dict[str, float] = field(default_factory=dict)


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
        actor.config.finalize_model_grads_func = compat.finalize_grads_summed(self.groups.collection)
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
    ) -> tuple[dict[str, Any], RouteReport]:
        """Log-probs of learnt tokens, see :meth:`PassRunner.logprobs`; model ``"actor"`` or ``"reference"``.

        Plans are those of the actor; see :meth:`train`.
        """
        with self._foreseen(batch, pass_, step, plans):
            return self.runners[model].logprobs(batch, settings, pass_=pass_, step=step, routes=routes)

    def _foreseen(self, batch: MiniBatch, pass_: Pass, step: int, plans: StagePlans | None) -> Any:
        mine = batch.layout.micro_batches[self.groups.coordinates["dp"]]
        keys = [MicroBatchKey(self.actor.name, pass_, step, i) for i in range(len(mine))]
        ids = batch.layout.sample_ids
        samples = {
            key: [ids[s.sample] for s in micro_batch.segments] for key, micro_batch in zip(keys, mine, strict=True)
        }
        return foreseen(self.balancer, plans, keys, samples, self.actor.device)

    def gradients(
        self, batch: MiniBatch, step: int, objective: Objective, plans: StagePlans | None = None
    ) -> tuple[float, dict[str, float], RouteReport]:
        """Forward and backward of one mini-batch, gradients reduced and left in ``main_grad``; see :meth:`train`."""
        self._empty_gradients()
        runner = self.runners["actor"]

        def per_micro_batch(logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch) -> Any:
            loss, sums = objective(runner, batch, logits, packed, micro_batch)
            return loss, {"loss": loss.detach(), **sums}

        with self._foreseen(batch, "train", step, plans):
            kept, report = runner.run(
                batch,
                pass_="train",
                step=step,
                routes=objective.routes,
                per_micro_batch=per_micro_batch,
                forward_only=False,
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
        if self.balancer is not None:
            self.balancer.metrics()  # of passes before this one
        loss, sums, report = self.gradients(batch, step, objective, plans)
        computed = time.perf_counter()
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        used = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0
        updated, grad_norm, _ = self.optimizer.step()
        if lr is None:
            self.scheduler.step(increment=1)
        ended = time.perf_counter()
        return TrainResult(
            loss=loss,
            sums=sums,
            grad_norm=float(grad_norm) if grad_norm is not None else float("nan"),
            lr=used,
            updated=bool(updated),
            routes=report,
            seconds={"forward_backward": computed - started, "optimizer": ended - computed},
            balance=self.balancer.metrics() if self.balancer is not None and self.groups.coordinates["ep"] == 0 else {},
        )

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
        self._empty_gradients()
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

    def _empty_gradients(self) -> None:
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
                if "step" not in group:  # TE's fused Adam counts per group, torch's per parameter
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
