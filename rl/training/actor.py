"""One Megatron rank of the trainer as a Ray actor: the calls that ``rl.training.group.Trainer`` makes."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from megatron_ultraep.layout import Pass
from megatron_ultraep.megatron.migrate import MoveReport
from megatron_ultraep.pipeline.problem import Schedule
from megatron_ultraep.runtime.profiler import ProfileSettings
from megatron_ultraep.runtime.ranges import ranged
from rl.training.batch import MiniBatch
from rl.training.engine_routes import RoutesOfEngines
from rl.training.foresight import Homes, StagePlans
from rl.training.fused import FusedResult, Learning, TakingLogprobs
from rl.training.objectives import Objective
from rl.training.offload import MemoryReport, OffloadReport, Part
from rl.training.passes import PassSettings, RouteMode, RouteReport
from rl.training.results import AccumulateResult, TrainResult
from rl.training.spec import TrainerSpec
from rl.transfer.ipc import IpcHandles
from rl.transfer.links import Membership
from rl.transfer.plan import Holding, TransferPlan
from rl.transfer.sender import SendReport, Snapshot
from rl.transfer.staging import StagingHandles
from rl.transfer.turns import Turn

_BUCKET_BYTES = 64 << 20


class TrainerActor:
    """One rank's process. Heavy imports happen in its calls, so that all ranks import at the same time."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.worker: Any = None
        self._sender: Any = None
        self._fusion: Any = None
        self._shared: Any = None
        self._window: Any = None

    def listen_address(self) -> str:
        """``host:port`` for rank 0's store; the port was free a moment ago."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind((host, 0))
            return f"{host}:{s.getsockname()[1]}"

    def start(self, spec: TrainerSpec, world: int, address: str, backend: str, routes_s: float) -> dict[str, Any]:
        """Join the group and build everything; returns what was built.

        Args:
            spec: what to build.
            world: ranks of the trainer.
            address: ``host:port`` of rank 0's store.
            backend: ``"gloo"`` or ``"nccl"``.
            routes_s: limit of fetching routes, in seconds.
        """
        import os

        from rl.shared_gpus import own_gpu
        from rl.training import worker

        started = time.perf_counter()
        gpu = own_gpu() if backend == "nccl" else 0
        worker.initialize(self.rank, world, address, backend, spec.collective_s, gpu)
        self.routes = RoutesOfEngines(routes_s)
        self.worker = worker.TrainWorker(spec, self.routes)
        arch = self.worker.actor.arch
        return {
            "pid": os.getpid(),
            "coordinates": self.worker.groups.coordinates,
            "seconds": time.perf_counter() - started,
            "balance": self.worker.balance(),
            "moe_layers": arch.moe_layers,
            "experts": arch.experts,
            "topk": arch.topk,
        }

    def connect(self, engines: list[Any]) -> None:
        self.routes.engines = engines

    def logprobs(
        self,
        part: MiniBatch,
        model: str,
        pass_: Pass,
        step: int,
        routes: RouteMode,
        settings: PassSettings,
        plans: StagePlans | None,
        first_micro_batch: int,
    ) -> tuple[dict[str, np.ndarray], RouteReport]:
        return self.worker.logprobs(part, model, pass_, step, routes, settings, plans, first_micro_batch)

    def values(self, part: MiniBatch, step: int, model: str, first_micro_batch: int) -> dict[str, np.ndarray]:
        return self.worker.values(part, step, model=model, first_micro_batch=first_micro_batch)

    def train(
        self, part: MiniBatch, step: int, objective: Objective, lr: float | None, plans: StagePlans | None, model: str
    ) -> TrainResult:
        return self.worker.train(part, step, objective, lr=lr, plans=plans, model=model)

    def train_fused(
        self,
        schedule: Schedule,
        whats: Sequence[tuple[str, int, Learning | TakingLogprobs]],
        timeout_s: float,
        *parts_and_plans: Any,
    ) -> FusedResult:
        """``(model, step, task)`` of each part, then each one's batch, then each one's plans: references are resolved
        in top-level arguments only."""
        from rl.training.fused import FusedPart, Fusion

        if self._fusion is None:
            self._fusion = Fusion(self.worker, timeout_s)
        batches, plans = parts_and_plans[: len(whats)], parts_and_plans[len(whats) :]
        parts = [
            FusedPart(model, batch, step, task, ahead)
            for (model, step, task), batch, ahead in zip(whats, batches, plans, strict=True)
        ]
        return self._fusion.train(schedule, parts)

    def accumulate(
        self, part: MiniBatch, step: int, objective: Objective, plans: StagePlans | None, first: bool, model: str
    ) -> AccumulateResult:
        return self.worker.accumulate(part, step, objective, plans=plans, first=first, model=model)

    def apply(self, scale: float, lr: float | None, model: str) -> TrainResult:
        return self.worker.apply(scale, lr=lr, model=model)

    def discard(self) -> None:
        self.worker.discard()

    def offload(self, what: Sequence[Part] | None) -> OffloadReport:
        return self.worker.offload(what)

    def onload(self, what: Sequence[Part] | None) -> OffloadReport:
        return self.worker.onload(what)

    def memory(self) -> MemoryReport:
        return self.worker.offloader.memory()

    def reorder(self, homes: Homes) -> MoveReport:
        return self.worker.reorder(homes)

    def end_warmup(self) -> None:
        self.worker.end_warmup()

    @ranged("export")
    def export(self, dtype: str, borrow: bool = False) -> list[tuple[Any, dict[str, tuple[int, ...]]]]:
        """This rank's weights in the object store: ``(reference to {name: tensor}, {name: shape})`` per bucket.

        Args:
            dtype: to cast to.
            borrow: if they are offloaded, bring them back for this; otherwise that is an error.
        """
        with self.worker.offloader.borrowed("weights") if borrow else nullcontext():
            buckets = self.worker.export(_BUCKET_BYTES, getattr(torch, dtype))
            return [(ray.put(b), {n: tuple(t.shape) for n, t in b.items()}) for b in buckets]

    def transfer_announce(self, dtype: str) -> list[Holding]:
        """What this rank could hand over to engines directly; see ``rl.transfer``."""
        from rl.transfer.trainer import ModelSender

        if self._sender is None:
            self._sender = ModelSender(self.worker.actor, self.rank, self._settle)
        return self._sender.announce(dtype)

    def transfer_join(self, membership: Membership) -> None:
        self._sender.join(membership)

    @ranged("transfer")
    def transfer_send(self, plan: TransferPlan, snapshot: Snapshot | None = None) -> SendReport | None:
        """Hand over this rank's share; with a snapshot, return once it is copied: ``transfer_finish`` waits."""
        return self._sender.send(plan) if snapshot is None else self._sender.start(plan, snapshot)

    def transfer_join_staged(self, membership: Membership, nbytes: int) -> StagingHandles:
        """Join with staging memory for the engine on the same GPU; see ``ModelSender.join_staged``."""
        return self._sender.join_staged(membership, nbytes)

    @ranged("transfer")
    def transfer_hand_over(self, plan: TransferPlan, turns: Sequence[Turn]) -> SendReport:
        """Hand everything to the engine on the same GPU; returns when it has it."""
        return self._sender.hand_over(plan, turns)

    def transfer_finish(self, timeout_s: float) -> SendReport | None:
        return self._sender.finish(timeout_s)

    def share(self, dtype: str) -> IpcHandles:
        """Handles of this rank's weights for engines on the same GPU; kept until :meth:`release_shared`."""
        from rl.models.weights import export_weights
        from rl.transfer.ipc import SharedWeights

        self._settle()
        self._shared = SharedWeights(export_weights(self.worker.actor), self.rank, getattr(torch, dtype))
        return self._shared.handles()

    def release_shared(self) -> None:
        """Every engine has what was shared."""
        if self._shared is not None:
            self._shared.release()
        self._shared = None

    def _settle(self) -> None:
        from megatron_ultraep.megatron import compat

        self.worker.offloader.require("a weight transfer", "weights")
        compat.synchronize_parameters(self.worker.actor.wrapped)

    def save(self, directory: str, optimizer: bool) -> None:
        from rl.training import checkpoint

        self.worker.offloader.require("saving a checkpoint", "weights", *(("optimizer",) if optimizer else ()))
        checkpoint.save(self.worker, directory, optimizer=optimizer)

    def load(self, directory: str, reference: str | None) -> None:
        from rl.training import checkpoint

        self.worker.offloader.require("loading a checkpoint", "weights", "gradients", "optimizer")
        checkpoint.load(self.worker, directory)
        if reference is not None and self.worker.reference is not None:
            checkpoint.load_model(self.worker.reference, reference)

    def save_reference(self, directory: str) -> None:
        from rl.training import checkpoint

        self.worker.offloader.require("saving the reference", "weights")
        if self.worker.reference is not None:
            checkpoint.save_model(self.worker.reference, directory)

    def save_hf(self, source: str, target: str) -> None:
        from rl.models.weights import save_hf

        self.worker.offloader.require("saving weights", "weights")
        save_hf(self.worker.actor, source, target)

    def profile(self, settings: ProfileSettings, path: str) -> None:
        from rl.training.profiling import WorkerWindow

        if self._window is not None:
            raise RuntimeError("a profiled window is open: end_profile() first")
        self._window = WorkerWindow(self.worker, settings, Path(path))

    def end_profile(self) -> str | None:
        window, self._window = self._window, None
        trace = window.end() if window is not None else None
        return None if trace is None else str(trace)

    def close(self) -> None:
        """Write what is left of the load records."""
        if self.worker is not None:
            self.worker.close()
