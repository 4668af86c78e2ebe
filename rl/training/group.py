"""The trainer as the loop sees it: Megatron ranks as Ray actors behind one object.

    with Trainer(spec, backend="gloo") as trainer:
        trainer.connect(pool.handles)
        old, _ = trainer.logprobs(batch, "actor", "old_logprob", routes="replay", settings=settings)
        outcome = trainer.train(batch, objective)
        pool.update_weights(version, *trainer.export())

Each data-parallel rank is sent its own samples, and fetches from the engines just the rows and layers of routes that
its routers see.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch

from megatron_ultraep.layout import Pass
from megatron_ultraep.megatron.migrate import MoveReport
from megatron_ultraep.telemetry.metrics import merge_groups
from rl.training.batch import MiniBatch
from rl.training.foresight import ExpertGroup, Homes, PassPlans, StagePlans, expert_groups
from rl.training.passes import PassSettings, RouteMode, RouteReport, RouteSlice
from rl.training.worker import Objective, TrainerSpec
from rl.types import RouteRef

_BUCKET_BYTES = 64 << 20
_PEERS_S = 5.0  # for the death of a rank to be known after its peers have failed
_CLOSE_S = 10.0  # to write what is left of the load records


class TrainerDied(RuntimeError):
    """The process of a trainer rank ended; the message names the rank and what it was doing."""


class TrainerTimeout(TimeoutError):
    """A trainer rank did not answer within its limit; the message names it and what was waited for."""


@dataclass(frozen=True)
class TrainerLimits:
    """Seconds to wait for each kind of work."""

    start_s: float = 300.0
    step_s: float = 900.0
    checkpoint_s: float = 600.0
    routes_s: float = 300.0


class RoutesOfEngines:
    """Fetches parts of routes from the engines that hold them, one call per engine."""

    def __init__(self, timeout_s: float) -> None:
        self.engines: list[Any] = []
        self.timeout_s = timeout_s

    def __call__(self, requests: Sequence[RouteSlice]) -> list[np.ndarray]:
        return self._ask("slice_routes", requests)

    def count(self, requests: Sequence[tuple[RouteRef, int, int]]) -> list[np.ndarray]:
        """Counts of experts in ``(reference, row start, row stop)`` each: int32 ``[MoE layers, experts]``."""
        return self._ask("count_routes", requests)

    def _ask(self, what: str, requests: Sequence[tuple[Any, ...]]) -> list[np.ndarray]:
        by_engine: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_engine.setdefault(request[0].engine, []).append(i)
        calls = {e: getattr(self.engines[e], what).remote([requests[i] for i in mine]) for e, mine in by_engine.items()}
        out: list[np.ndarray] = [np.zeros(0)] * len(requests)
        for engine, mine in by_engine.items():
            try:
                parts = ray.get(calls[engine], timeout=self.timeout_s)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                raise RuntimeError(f"engine {engine} did not hand over routes: {type(error).__name__}") from error
            for i, part in zip(mine, parts, strict=True):
                out[i] = part
        return out


class TrainerActor:
    """One rank's process. Heavy imports happen in its calls, so that all ranks import at the same time."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.worker: Any = None

    def listen_address(self) -> str:
        """``host:port`` for rank 0's store; the port was free a moment ago."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind((host, 0))
            return f"{host}:{s.getsockname()[1]}"

    def start(self, spec: TrainerSpec, world: int, address: str, backend: str, limits: TrainerLimits) -> dict[str, Any]:
        """Join the group and build everything; returns what was built."""
        import os

        from rl.training import worker

        started = time.perf_counter()
        worker.initialize(self.rank, world, address, backend, spec.collective_s)
        self.routes = RoutesOfEngines(limits.routes_s)
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
    ) -> tuple[dict[str, np.ndarray], RouteReport]:
        return self.worker.logprobs(part, model, pass_, step, routes, settings, plans)

    def train(
        self, part: MiniBatch, step: int, objective: Objective, lr: float | None, plans: StagePlans | None
    ) -> Any:
        return self.worker.train(part, step, objective, lr=lr, plans=plans)

    def reorder(self, homes: Homes) -> MoveReport:
        return self.worker.reorder(homes)

    def end_warmup(self) -> None:
        self.worker.end_warmup()

    def export(self, dtype: str) -> list[tuple[Any, dict[str, tuple[int, ...]]]]:
        """This rank's weights in the object store: ``(reference to {name: tensor}, {name: shape})`` per bucket."""
        buckets = self.worker.export(_BUCKET_BYTES, getattr(torch, dtype))
        return [(ray.put(b), {n: tuple(t.shape) for n, t in b.items()}) for b in buckets]

    def save(self, directory: str, optimizer: bool) -> None:
        from rl.training import checkpoint

        checkpoint.save(self.worker, directory, optimizer=optimizer)

    def load(self, directory: str, reference: str | None) -> None:
        from rl.training import checkpoint

        checkpoint.load(self.worker, directory)
        if reference is not None and self.worker.reference is not None:
            checkpoint.load_model(self.worker.reference, reference)

    def save_reference(self, directory: str) -> None:
        from rl.training import checkpoint

        if self.worker.reference is not None:
            checkpoint.save_model(self.worker.reference, directory)

    def save_hf(self, source: str, target: str) -> None:
        from rl.models.weights import save_hf

        save_hf(self.worker.actor, source, target)

    def close(self) -> None:
        """Write what is left of the load records."""
        if self.worker is not None:
            self.worker.close()


@dataclass
class StepOutcome:
    """One optimizer step over all ranks.

    Attributes:
        loss: mini-batch loss.
        sums: metric sums over the mini-batch's learnt tokens.
        tokens: how many those are.
        grad_norm: before clipping.
        lr: learning rate.
        updated: False when Megatron skipped the step.
        digests: per sample, uint64 ``[MoE layers]`` of the routes that routers consumed; empty unless replayed.
        route_rows, differing: router rows (samples x layers), and how many had another own top-k.
        seconds: slowest rank, by part.
        balance: metrics of balancing, see ``megatron_ultraep.telemetry.metrics``; empty without it.
    """

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    grad_norm: float = float("nan")
    lr: float = 0.0
    updated: bool = True
    digests: dict[str, np.ndarray] = field(default_factory=dict)
    route_rows: int = 0
    differing: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Start and drive the ranks.

    Args:
        spec: what each rank builds.
        backend: ``"gloo"`` or ``"nccl"``.
        limits: of every wait.
        environment: additional environment variables of the ranks.

    Raises:
        TrainerDied, TrainerTimeout: a rank did not come up; those that did are ended.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        *,
        backend: str = "gloo",
        limits: TrainerLimits | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.spec = spec
        self.limits = limits or TrainerLimits()
        self.steps = 0  # optimizer steps so far, what micro-batch keys count
        world = spec.layout.world
        actor = ray.remote(TrainerActor).options(
            num_cpus=1,
            num_gpus=1 if backend == "nccl" else 0,
            max_restarts=0,
            runtime_env={"env_vars": trainer_environment(backend) | (environment or {})},
        )
        self.handles = [actor.remote(rank) for rank in range(world)]
        try:
            address = self._all([self.handles[0].listen_address.remote()], self.limits.start_s, "its address")[0]
            self.ranks: list[dict[str, Any]] = self._call(
                "start", spec, world, address, backend, self.limits, limit=self.limits.start_s
            )
        except BaseException:
            self.stop()
            raise

    def connect(self, engines: Sequence[Any]) -> None:
        """Where routes are: handles of the rollout engines, in the order of their index."""
        self._call("connect", list(engines), limit=self.limits.start_s)

    # ---------------------------------------------------------------- passes

    def logprobs(
        self,
        batch: MiniBatch,
        model: str,
        pass_: Pass,
        *,
        routes: RouteMode,
        settings: PassSettings,
        plans: PassPlans | None = None,
    ) -> tuple[dict[str, np.ndarray], RouteReport]:
        """Log-probs of the learnt tokens of all samples, ``[T]`` each aligned with tokens, and what routers did.

        Plans were made ahead, of the actor's pass; None plans on exact loads.
        """
        parts, ahead = self._parts(batch), self._plans(plans)
        calls = [
            handle.logprobs.remote(parts[self._dp(rank)], model, pass_, self.steps, routes, settings, ahead[rank])
            for rank, handle in enumerate(self.handles)
        ]
        merged: dict[str, np.ndarray] = {}
        total = RouteReport()
        for values, report in self._all(calls, self.limits.step_s, f"log-probs of the {model}"):
            merged |= values
            total.rows += report.rows
            total.differing += report.differing
        return merged, total

    def train(
        self, batch: MiniBatch, objective: Objective, *, lr: float | None = None, plans: PassPlans | None = None
    ) -> StepOutcome:
        """One optimizer step; plans as for :meth:`logprobs`."""
        parts, ahead = self._parts(batch), self._plans(plans)
        calls = [
            handle.train.remote(parts[self._dp(rank)], self.steps, objective, lr, ahead[rank])
            for rank, handle in enumerate(self.handles)
        ]
        results = self._all(calls, self.limits.step_s, f"optimizer step {self.steps}")
        self.steps += 1
        outcome = StepOutcome(
            grad_norm=results[0].grad_norm, lr=results[0].lr, updated=results[0].updated, tokens=batch.total_tokens
        )
        for result in results:
            outcome.loss += result.loss
            for name, value in result.sums.items():
                outcome.sums[name] = outcome.sums.get(name, 0.0) + value
            for name, digest in result.routes.digests.items():
                with np.errstate(over="ignore"):
                    outcome.digests[name] = outcome.digests.get(name, np.zeros_like(digest)) + digest
            outcome.route_rows += result.routes.rows
            outcome.differing += result.routes.differing
            for name, value in result.seconds.items():
                outcome.seconds[name] = max(outcome.seconds.get(name, 0.0), value)
        outcome.balance = merge_groups([result.balance for result in results if result.balance])
        return outcome

    def reorder(self, homes: Homes) -> MoveReport:
        """Move experts to new homes between steps; see ``TrainWorker.reorder``.

        Returns:
            bytes and experts over all pipeline stages, the most waves, and the slowest rank's seconds.
        """
        reports = self._call("reorder", homes, limit=self.limits.step_s)
        # Every rank of a stage reports what the whole stage did.
        stages = {self.spec.layout.coordinates(rank)["pp"]: report for rank, report in enumerate(reports)}
        return MoveReport(
            bytes=sum(report.bytes for report in stages.values()),
            experts=sum(report.experts for report in stages.values()),
            waves=max(report.waves for report in reports),
            seconds=max(report.seconds for report in reports),
        )

    def expert_groups(self) -> tuple[ExpertGroup, ...]:
        """The expert-parallel groups that balance, as plans made ahead have to know them; none without balancing."""
        told = [rank["balance"] for rank in self.ranks]
        return expert_groups(self.spec.layout, told) if all(each is not None for each in told) else ()

    def end_warmup(self) -> None:
        """Fresh optimizer state; the reference takes today's weights."""
        self._call("end_warmup", limit=self.limits.step_s)

    # ---------------------------------------------------------------- weights

    def export(self, dtype: str) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
        """All weights in Hugging Face names, as references into the object store, and their shapes."""
        chunks: list[Any] = []
        manifest: dict[str, tuple[int, ...]] = {}
        for buckets in self._call("export", dtype, limit=self.limits.step_s):
            for reference, shapes in buckets:
                chunks.append(reference)
                manifest |= shapes
        return chunks, manifest

    def save(self, directory: Path, *, optimizer: bool = True) -> None:
        self._call("save", str(directory), optimizer, limit=self.limits.checkpoint_s)

    def load(self, directory: Path, reference: Path | None = None) -> None:
        self._call("load", str(directory), str(reference) if reference else None, limit=self.limits.checkpoint_s)

    def save_reference(self, directory: Path) -> None:
        self._call("save_reference", str(directory), limit=self.limits.checkpoint_s)

    def save_hf(self, source: Path, target: Path) -> None:
        """Write a Hugging Face directory; see ``rl.models.weights.save_hf``."""
        self._call("save_hf", str(source), str(target), limit=self.limits.checkpoint_s)

    # ---------------------------------------------------------------- life

    def stop(self) -> None:
        """End all ranks; calling it again does nothing. A rank that does not answer loses its last load records."""
        handles, self.handles = self.handles, []
        if self.spec.balance is not None and self.spec.balance.record:
            # Killed actors run no exit handlers.
            ray.wait([handle.close.remote() for handle in handles], num_returns=len(handles), timeout=_CLOSE_S)
        for handle in handles:
            ray.kill(handle, no_restart=True)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _dp(self, rank: int) -> int:
        return self.spec.layout.coordinates(rank)["dp"]

    def _parts(self, batch: MiniBatch) -> list[Any]:
        """One reference per data-parallel rank: put once for all its tensor and pipeline ranks."""
        return [ray.put(batch.part(dp)) for dp in range(self.spec.layout.dp)]

    def _plans(self, plans: PassPlans | None) -> list[Any]:
        """By rank a reference to its group's plans, each put once."""
        if plans is None:
            return [None] * self.spec.layout.world
        parts, of_rank = plans.parts(self.spec.layout.world)
        references = [ray.put(part) for part in parts]
        return [references[part] for part in of_rank]

    def _call(self, name: str, *args: Any, limit: float) -> list[Any]:
        return self._all([getattr(handle, name).remote(*args) for handle in self.handles], limit, name)

    def _all(self, calls: Sequence[Any], limit_s: float, what: str) -> list[Any]:
        """Results by rank, within one limit; the first failure of any rank ends the wait."""
        deadline = time.monotonic() + limit_s
        rank_of = {call: rank for rank, call in enumerate(calls)}
        results: dict[int, Any] = {}
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = [rank_of[c] for c in waiting]
                raise TrainerTimeout(
                    f"trainer rank {', '.join(map(str, late))} did not finish {what} within {limit_s:g} s; raise "
                    "run.limits or look for a rank that hangs"
                )
            rank = rank_of[done[0]]
            try:
                results[rank] = ray.get(done[0])
            except ray.exceptions.RayActorError as error:
                raise TrainerDied(f"trainer rank {rank} died while it was at {what}: {error}") from error
            except ray.exceptions.RayTaskError as error:
                self._name_the_dead(waiting, rank_of, what)
                raise TrainerDied(f"trainer rank {rank} failed at {what}: {error}") from error
        return [results[rank] for rank in range(len(calls))]

    @staticmethod
    def _name_the_dead(waiting: Sequence[Any], rank_of: Mapping[Any, int], what: str) -> None:
        """A rank that failed may only have lost its peer: a peer that died is the cause to name."""
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_PEERS_S) if waiting else ([], [])
        for call in done:
            try:
                ray.get(call)
            except ray.exceptions.RayActorError as error:
                raise TrainerDied(f"trainer rank {rank_of[call]} died while it was at {what}: {error}") from error
            except ray.exceptions.RayTaskError:
                continue


def trainer_environment(backend: str) -> dict[str, str]:
    """Environment of a trainer rank's process."""
    environment = {
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Megatron's tensor parallelism overlaps communication by issue order.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    if backend == "gloo":
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return environment
