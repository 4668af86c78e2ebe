"""One Megatron rank of the trainer; free of Ray, so that tests run it in plain processes.

worker = TrainWorker(TrainerSpec(...), rank, world)     # torch.distributed is initialised
worker.load("model/")
old, _ = worker.logprobs(part, "actor", "old_logprob", step, "replay")
values = worker.values(part, step)                          # with a critic
result = worker.train(part, step, PolicyObjective(...))     # or accumulate(chunk, ...) ..., apply(scale)
result = worker.train(part, step, ValueObjective(...), model="critic")
worker.offload()                                            # colocated: engines generate now
worker.onload()
chunks = list(worker.export(bucket_bytes))
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.layout import Pass
from megatron_ultraep.megatron import compat, microbatch
from megatron_ultraep.megatron.attach import Balancer, attach, moe_layers
from megatron_ultraep.megatron.checkpoint import home_slot_of
from megatron_ultraep.megatron.groups import ModelGroups, create_groups
from megatron_ultraep.megatron.migrate import MoveGroup, MoveReport, make_move_group, move_experts
from megatron_ultraep.megatron.router_replay import RoutingReplay
from megatron_ultraep.runtime.ranges import ranged
from rl.models.architecture import read_architecture
from rl.models.builder import DTYPES, BuiltModel, build_model
from rl.models.critic import build_scalar_model, load_scalar_weights
from rl.models.names import sent_dtype
from rl.models.weights import copy_weights, export_weights, load_weights
from rl.training.batch import MiniBatch
from rl.training.foresight import RankBalance, StagePlans, rank_balance
from rl.training.objectives import Objective, PolicyObjective, SupervisedObjective, ValueObjective
from rl.training.offload import Offloader, OffloadReport, Part
from rl.training.passes import PassRunner, PassSettings, RouteMode, RouteReport, RouteSource, local_routes
from rl.training.results import AccumulateResult, TrainResult
from rl.training.spec import CriticSpec, OptimizerSpec, ScorerSpec, TrainerSpec
from rl.training.trained import TrainedModel, reset_optimizer_state

__all__ = [
    "CriticSpec",
    "Objective",
    "OptimizerSpec",
    "PolicyObjective",
    "ScorerSpec",
    "SupervisedObjective",
    "TrainResult",
    "TrainWorker",
    "TrainerSpec",
    "ValueObjective",
    "initialize",
    "model_exists",
    "reset_optimizer_state",
]


class TrainWorker:
    """Models, optimizer and passes of one rank; a collective with all other ranks of the trainer.

    Args:
        spec: what to build; the same on all ranks.
        routes: where captured routes come from.

    Attributes:
        trained: models that learn, ``"actor"`` and perhaps ``"critic"``.
        frozen: those that do not, ``"reference"`` and ``"scorer"``.
        runners: of the passes of all of them.
    """

    def __init__(self, spec: TrainerSpec, routes: RouteSource = local_routes) -> None:
        self.spec, self.routes = spec, routes
        _check_float64(spec)
        microbatch.install()
        # Groups and models are made in one order on all ranks: actor, reference, critic, scorer.
        self.groups = self._groups("actor")
        self.trained: dict[str, TrainedModel] = {}
        self.frozen: dict[str, BuiltModel] = {}
        self.runners: dict[str, PassRunner] = {}
        self.actor = build_model(
            read_architecture(spec.model_path),
            self.groups,
            name="actor",
            dtype=DTYPES[spec.dtype],
            recompute=spec.recompute,
            seed=spec.seed,
            permute_fusion=spec.permute_fusion,
            float32_head=spec.float32_head,
            float32_residual=spec.float32_residual,
        )
        load_weights(self.actor, spec.model_path)
        self.replay = self._replay_of(self.actor)
        self._train("actor", self.actor, self.replay, spec.optimizer)
        self.reference = self._reference() if spec.reference else None
        self.critic = self._critic(spec.critic) if spec.critic is not None else None
        if spec.scorer is not None:
            self._scorer(spec.scorer)
        self._balance()
        self._move_group: MoveGroup | None = None
        if spec.reorder:
            self._move_group = self._make_move_group()
        self.offloader = Offloader(self)

    # ---------------------------------------------------------------- building

    def _groups(self, model: str) -> ModelGroups:
        return create_groups(self.spec.layout_of(model), timeout_s=self.spec.collective_s)

    def _train(self, name: str, model: BuiltModel, replay: RoutingReplay | None, optimizer: OptimizerSpec) -> None:
        """Wrap a model and give it an optimizer and a runner."""
        spec = self.spec
        self.runners[name] = PassRunner(model, replay, self.routes)
        self.trained[name] = TrainedModel(
            model,
            self.runners[name],
            optimizer,
            distributed_optimizer=spec.distributed_optimizer,
            overlap=spec.overlap,
            fuse_gradients=spec.fuse_gradients,
        )

    def _reference(self) -> BuiltModel:
        spec = self.spec
        own = spec.reference_layout not in (None, spec.layout)
        groups = self._groups("reference") if own else self.groups
        model = build_model(
            read_architecture(spec.model_path),
            groups,
            name="reference",
            dtype=DTYPES[spec.dtype],
            seed=spec.seed,
            float32_head=spec.float32_head,
            float32_residual=spec.float32_residual,
        )
        load_weights(model, spec.model_path)
        self.frozen["reference"] = model
        self.runners["reference"] = PassRunner(model, self._replay_of(model), self.routes)
        return model

    def _critic(self, critic: CriticSpec) -> BuiltModel:
        """Groups of its own even where its layout is the actor's: both may be under way at the same time."""
        spec = self.spec
        model = build_scalar_model(
            read_architecture(critic.model_path),
            self._groups("critic"),
            name="critic",
            dtype=DTYPES[spec.dtype],
            recompute=critic.recompute,
            seed=spec.seed,
            permute_fusion=spec.permute_fusion,
        )
        load_scalar_weights(model, critic.model_path)
        self._train("critic", model, None, critic.optimizer)
        return model

    def _scorer(self, scorer: ScorerSpec) -> None:
        model = build_scalar_model(
            read_architecture(scorer.model_path),
            self._groups("scorer"),
            name="scorer",
            dtype=DTYPES[self.spec.dtype],
            seed=self.spec.seed,
        )
        load_scalar_weights(model, scorer.model_path, head_required=True)
        self.frozen["scorer"] = model
        self.runners["scorer"] = PassRunner(model, None)

    def _replay_of(self, model: BuiltModel) -> RoutingReplay | None:
        return RoutingReplay(model.chunks, model.arch.moe_layer_of()) if model.arch.is_moe else None

    def _balance(self) -> None:
        """Balance every model whose experts are on several ranks; only the actor leaves records."""
        balance = self.spec.balance
        self.balancer: Balancer | None = None
        if balance is None or not balance.enabled:
            return
        silent = dataclasses.replace(balance, record="")
        for name, model in self.frozen.items():
            if self.spec.layout_of(name).ep > 1:
                attach(model.chunks, silent, timeout_s=self.spec.collective_s)
        if self.critic is not None and self.spec.layout_of("critic").ep > 1:
            self.trained["critic"].balancer = attach(self.critic.wrapped, silent, timeout_s=self.spec.collective_s)
        self.balancer = attach(self.actor.wrapped, balance, timeout_s=self.spec.collective_s)
        self.trained["actor"].balancer = self.balancer

    @property
    def optimizer(self) -> Any:
        """The actor's."""
        return self.trained["actor"].optimizer

    @property
    def scheduler(self) -> Any:
        """Of the actor's learning rate."""
        return self.trained["actor"].scheduler

    # ---------------------------------------------------------------- passes

    @ranged("logprobs")
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
        with (
            self.trained["actor"].foreseen(batch, pass_, step, plans, first_micro_batch)
            if model == "actor"
            else contextlib.nullcontext()
        ):
            return self.runners[model].logprobs(
                batch, settings, pass_=pass_, step=step, routes=routes, first_micro_batch=first_micro_batch
            )

    @ranged("values")
    def values(
        self, batch: MiniBatch, step: int, *, model: str = "critic", first_micro_batch: int = 0
    ) -> dict[str, Any]:
        """What the critic (or the ``"scorer"``) says before every learnt token, see :meth:`PassRunner.values`.

        Args:
            batch: this rank's part, laid out for the model's layout.
            step, first_micro_batch: of the micro-batch keys.
            model: whose head.

        Raises:
            ValueError: the trainer has no such model.
        """
        self.offloader.require("values", "weights")
        if model not in self.runners:
            raise ValueError(f"expected a trainer with a {model}, got {', '.join(self.runners)}: configure one")
        return self.runners[model].values(batch, pass_="old_logprob", step=step, first_micro_batch=first_micro_batch)

    @ranged("gradients")
    def gradients(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        plans: StagePlans | None = None,
        *,
        model: str = "actor",
    ) -> tuple[float, dict[str, float], RouteReport]:
        """Forward and backward of one mini-batch, gradients reduced and left in ``main_grad``; see :meth:`train`."""
        self.offloader.require("gradients", "weights", "gradients", "optimizer")
        return self._trained(model).gradients(batch, step, objective, plans)

    @ranged("train")
    def train(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        *,
        lr: float | None = None,
        plans: StagePlans | None = None,
        model: str = "actor",
    ) -> TrainResult:
        """One optimizer step.

        Args:
            batch: this data-parallel rank's part.
            step: of the micro-batch keys.
            objective: the loss.
            lr: learning rate of this step; None follows the schedule.
            plans: made ahead, of this rank; given to all ranks or to none. None plans on exact loads.
            model: which one learns, ``"actor"`` or ``"critic"``; the batch is laid out for its layout.

        Raises:
            ForesightMismatch: on all ranks, before the optimizer steps, where routes are not those planned for.
        """
        self.offloader.require("gradients", "weights", "gradients", "optimizer")
        return self._trained(model).train(batch, step, objective, lr=lr, plans=plans)

    def _trained(self, model: str) -> TrainedModel:
        if model not in self.trained:
            raise ValueError(f"expected a trainer that trains a {model}, got {', '.join(self.trained)}: configure one")
        return self.trained[model]

    # ---------------------------------------------------------------- sets that arrive in chunks

    @ranged("accumulate")
    def accumulate(
        self,
        batch: MiniBatch,
        step: int,
        objective: Objective,
        *,
        plans: StagePlans | None = None,
        first: bool,
        model: str = "actor",
    ) -> AccumulateResult:
        """Forward and backward of one chunk of a set; gradients stay in ``main_grad``, not reduced.

        Args:
            batch: this data-parallel rank's part of the chunk, with denominators estimated for the whole set, the same
                ones for all its chunks.
            step: of the micro-batch keys, the same for all chunks.
            objective: the loss.
            plans: of this chunk; see :meth:`train`.
            first: begins a set.
            model: whose set; see :meth:`train`.

        Raises:
            AccumulationError: a set begun twice or not at all, or gradients that are reduced during backward.
            ForesightMismatch: see :meth:`train`; the set is discarded.
        """
        self.offloader.require("gradients", "weights", "gradients", "optimizer")
        return self._trained(model).accumulator.accumulate(batch, step, objective, plans=plans, first=first)

    @ranged("apply")
    def apply(self, scale: float, *, lr: float | None = None, model: str = "actor") -> TrainResult:
        """End a set: scale its gradients, reduce them once, and step.

        Args:
            scale: estimated denominator / true one, see ``Counts.scale``; the same on all ranks.
            lr: learning rate of this step; None follows the schedule.
            model: whose set.

        Returns:
            what all chunks did together.

        Raises:
            AccumulationError: no set is open.
            ValueError: a scale that is no positive number.
        """
        return self._trained(model).accumulator.apply(scale, lr)

    def discard(self) -> None:
        """Drop open sets, if there are any."""
        for trained in self.trained.values():
            trained.accumulator.discard()

    def _require_no_set(self, what: str) -> None:
        for trained in self.trained.values():
            trained.require_no_set(what)

    # ---------------------------------------------------------------- colocated mode

    @ranged("offload")
    def offload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Make room on the device; see ``rl.training.offload``."""
        self._require_no_set("offloading")
        return self.offloader.offload(what)

    @ranged("onload")
    def onload(self, what: Sequence[Part] | None = None) -> OffloadReport:
        """Bring back what was offloaded."""
        return self.offloader.onload(what)

    # ---------------------------------------------------------------- between steps

    @ranged("reorder")
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
        self.trained["actor"].empty_gradients()
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

    def _send_experts_back(self) -> None:
        """All experts to where Megatron has them."""
        layers = moe_layers(self.actor.chunks)
        away = [layer for layer in layers if home_slot_of(layer) != tuple(range(layer.config.num_moe_experts))]
        if away:
            self.reorder({int(layer.layer_number): tuple(range(layer.config.num_moe_experts)) for layer in away})

    def end_warmup(self) -> None:
        """Forget the optimizer's moments, go back to the schedule; reference and critic take today's weights.

        A critic with weights of its own (another ``model_path``) keeps them, and so does every critic its head.
        """
        self.offloader.require("the end of the warm-up", "weights", "gradients", "optimizer")
        self.trained["actor"].forget()
        compat.synchronize_parameters(self.actor.wrapped)
        if self.critic is not None and self.spec.critic and self.spec.critic.model_path == self.spec.model_path:
            copy_weights(self.actor, self.critic)
            self.trained["critic"].refresh()
        if self.reference is None:
            return
        if self.reference.groups is not self.groups:
            copy_weights(self.actor, self.reference)
        else:
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
            copy = tensor.detach().to("cpu", sent_dtype(name, dtype), copy=True).contiguous()
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


def _check_float64(spec: TrainerSpec) -> None:
    if spec.dtype != "float64":
        return
    if spec.distributed_optimizer:
        raise ValueError("Megatron's distributed optimizer takes no float64: set distributed_optimizer to false")
    clips = {"optimizer": spec.optimizer} | ({"critic.optimizer": spec.critic.optimizer} if spec.critic else {})
    for name, optimizer in clips.items():
        if optimizer.clip_grad:
            raise ValueError(f"Megatron clips no float64 gradients: set {name}.clip_grad to 0")


def initialize(rank: int, world: int, address: str, backend: str, timeout_s: float, gpu: int = 0) -> None:
    """Join the trainer's process group.

    Args:
        rank, world: place among the trainer's ranks.
        address: ``host:port`` where rank 0 listens.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout_s: limit of joining and of every collective, in seconds.
        gpu: index of this rank's own, with ``"nccl"``.
    """
    from datetime import timedelta

    if backend == "nccl":
        torch.cuda.set_device(gpu)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def model_exists(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()
