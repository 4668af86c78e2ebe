"""One pass of one model over a mini-batch: pack, replay, run the schedule, account for what routers consumed.

    prepare: set routes of every micro-batch, keys, forward step, shapes
    run it: Megatron's stock schedule, or whatever schedules several models together
    finish: all consumed, digests, differences

A pass is prepared apart from being run, so that passes of two models can run interleaved:

    with actor.prepare(...) as first, critic.prepare(...) as second:
        kept = executor.run(...)                       # calls first.forward_step and second.forward_step
        reports = first.finish(), second.finish()

The micro-batch key is entered here, in the forward step, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import torch

from megatron_ultraep.layout import MicroBatch, MicroBatchKey, Pass
from megatron_ultraep.megatron import compat, microbatch
from megatron_ultraep.megatron.router_replay import RoutingReplay
from megatron_ultraep.replay import assemble, overlap, router_rows, row_hashes
from megatron_ultraep.runtime import ranges
from rl.algorithms.logprobs import is_most_likely, vocab_parallel_logprobs
from rl.models.builder import BuiltModel
from rl.training.batch import MiniBatch, PackedTensors, TrainSample, pack, unpack_rows
from rl.types import RouteRef

RouteSlice = tuple[RouteRef, int, int, int, int]
RouteMode = Literal["replay", "own"]


class RouteSource(Protocol):
    """Where routes are fetched from: ``(reference, row start, row stop, MoE layer start, MoE layer stop)`` each."""

    def __call__(self, requests: Sequence[RouteSlice]) -> list[np.ndarray]: ...


def local_routes(requests: Sequence[RouteSlice]) -> list[np.ndarray]:
    """Routes whose references hold the array itself (no Ray)."""
    return [ref.of(ref.handle)[rows:stop, first:last] for ref, rows, stop, first, last in requests]


@dataclass
class RouteReport:
    """What routers did in a pass, on this rank.

    Attributes:
        digests: per sample, uint64 ``[all MoE layers of the model]``: the part of the digest that this rank's routers
            consumed (0 for layers elsewhere); parts of all ranks add up, see ``megatron_ultraep.replay.digest``.
        rows: rows of samples that this rank's routers saw, times its MoE layers.
        differing: how many of those had an own top-k of another set of experts.
    """

    digests: dict[str, np.ndarray] = field(default_factory=dict)
    rows: int = 0
    differing: int = 0


@dataclass(frozen=True)
class PassSettings:
    """How log-probs are taken: what the sampling policy did.

    Attributes:
        temperature: logits are divided by it.
        chunk_tokens: rows whose logits are turned into log-probs at once.
        with_entropy: compute entropies too.
    """

    temperature: float = 1.0
    chunk_tokens: int = 1024
    with_entropy: bool = False


ForwardStep = Callable[[Iterator[Any], Any], tuple[Any, Any]]


@dataclass(frozen=True)
class PreparedPass:
    """A pass that is ready to run, by any schedule that runs every micro-batch of every chunk once.

    A context: when it ends, however, routes that were set are forgotten.

    Attributes:
        model: what runs.
        forward_step: Megatron's ``forward_step_func(data_iterator, chunk)``; enters the micro-batch key. Backward runs
            outside it: what recomputes carries its key along.
        iterators: one per chunk of the model, each yields every micro-batch once in order; what ``forward_step`` takes.
        rows: of each micro-batch of this rank, padding included: all its stages see as many.
        keys: of the micro-batches.
        forward_only: no backward.
        finish: call it when all micro-batches have run; what routers did, empty unless routes were replayed.
        release: forgets routes.
    """

    model: BuiltModel
    forward_step: ForwardStep
    iterators: tuple[Iterator[Any], ...]
    rows: tuple[int, ...]
    keys: tuple[MicroBatchKey, ...]
    forward_only: bool
    finish: Callable[[], RouteReport]
    release: Callable[[], None]

    @property
    def microbatches(self) -> int:
        return len(self.rows)

    def __enter__(self) -> PreparedPass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class PassRunner:
    """Runs passes of one model on this rank.

    Args:
        model: what runs.
        replay: its routers' handles, None for dense models.
        routes: where captured routes come from.
    """

    def __init__(self, model: BuiltModel, replay: RoutingReplay | None, routes: RouteSource = local_routes) -> None:
        self.model = model
        self.replay = replay
        self.routes = routes
        layout = model.groups.layout
        self._schedule = compat.forward_backward_function(layout.pp, layout.vpp, model.config, model.groups.collection)

    def prepare(
        self,
        batch: MiniBatch,
        *,
        pass_: Pass,
        step: int,
        routes: RouteMode,
        per_micro_batch: Callable[[torch.Tensor, PackedTensors, MicroBatch], Any],
        forward_only: bool,
        first_micro_batch: int = 0,
    ) -> PreparedPass:
        """Make every micro-batch of this rank ready; see :meth:`run` for the arguments.

        One pass of a model at a time: the next may be prepared when this one was released.
        """
        mine = batch.layout.micro_batches[self.model.groups.coordinates["dp"]]
        keys = [MicroBatchKey(self.model.name, pass_, step, first_micro_batch + i) for i in range(len(mine))]
        replaying = self.replay is not None and routes == "replay"

        def forward_step(iterator: Iterator[tuple[MicroBatchKey, MicroBatch]], chunk: Any) -> tuple[Any, Any]:
            key, micro_batch = next(iterator)
            packed = pack(micro_batch, batch.samples, self.model.device)
            with microbatch.micro_batch(key), ranges.span("forward", key):
                output = chunk(packed.inputs, packed.positions, None, packed_seq_params=packed.packed)

            def on_last_stage(logits: torch.Tensor, non_loss_data: bool = False) -> Any:
                result = per_micro_batch(logits[0], packed, micro_batch)
                if forward_only:
                    return result
                loss, kept = result
                # Losses carry their global denominator; the token count is Megatron's business only.
                return loss, torch.ones((), dtype=torch.int32, device=loss.device), kept

            return output, on_last_stage

        def release() -> None:
            if self.replay is not None:
                self.replay.clear()

        try:
            if replaying:
                self._set_routes(keys, mine, batch)
            elif self.replay is not None:
                self.replay.let_routers_choose(self.model.name, pass_)
        except BaseException:
            release()
            raise
        return PreparedPass(
            model=self.model,
            forward_step=forward_step,
            iterators=tuple(iter(list(zip(keys, mine, strict=True))) for _ in self.model.run_chunks()),
            rows=tuple(micro_batch.rows for micro_batch in mine),
            keys=tuple(keys),
            forward_only=forward_only,
            finish=lambda: self._report(keys, mine, batch) if replaying else RouteReport(),
            release=release,
        )

    def run(
        self,
        batch: MiniBatch,
        *,
        pass_: Pass,
        step: int,
        routes: RouteMode,
        per_micro_batch: Callable[[torch.Tensor, PackedTensors, MicroBatch], Any],
        forward_only: bool,
        first_micro_batch: int = 0,
    ) -> tuple[list[Any], RouteReport]:
        """Run every micro-batch of this rank, in Megatron's stock schedule.

        Args:
            batch: this data-parallel rank's part.
            pass_, step: of the micro-batch keys.
            routes: ``"replay"`` the captured ones, or let each router choose its ``"own"``.
            per_micro_batch: on the last stage, from logits ``[rows, vocab/tp]`` to what the schedule keeps: anything
                when ``forward_only``, else ``(loss, anything)``.
            forward_only: no backward.
            first_micro_batch: what the keys count from: micro-batches of earlier chunks of the same step.

        Returns:
            what ``per_micro_batch`` gave, per micro-batch in order (empty but on the last stage), and what routers did.
        """
        with self.prepare(
            batch,
            pass_=pass_,
            step=step,
            routes=routes,
            per_micro_batch=per_micro_batch,
            forward_only=forward_only,
            first_micro_batch=first_micro_batch,
        ) as prepared:
            return self.run_prepared(prepared), prepared.finish()

    def run_prepared(self, prepared: PreparedPass) -> list[Any]:
        """Run a prepared pass of this model alone; what the last stage kept, see :meth:`run`."""
        chunks, interleaved = self.model.run_chunks(), self.model.groups.layout.vpp
        with ranges.span("pass", self._pass_of(prepared)), torch.set_grad_enabled(not prepared.forward_only):
            kept = self._schedule(
                forward_step_func=prepared.forward_step,
                data_iterator=list(prepared.iterators) if interleaved else prepared.iterators[0],
                model=list(chunks) if interleaved else chunks[0],
                num_microbatches=prepared.microbatches,
                seq_length=max(prepared.rows),
                micro_batch_size=1,
                forward_only=prepared.forward_only,
                collect_non_loss_data=prepared.forward_only,
            )
        return list(kept)

    @staticmethod
    def _pass_of(prepared: PreparedPass) -> str | None:
        if not ranges.on() or not prepared.keys:
            return None
        key = prepared.keys[0]
        return f"{key.model}/{key.pass_}/step {key.step}"

    def logprobs(
        self,
        batch: MiniBatch,
        settings: PassSettings,
        *,
        pass_: Pass,
        step: int,
        routes: RouteMode,
        first_micro_batch: int = 0,
    ) -> tuple[dict[str, np.ndarray], RouteReport]:
        """Log-probs of every learnt token, without gradients; arguments as for :meth:`run`.

        Returns:
            per sample float32 (float64 for a float64 model) ``[T]`` aligned with tokens; empty but on the last stage's
            first tensor-parallel rank, so that every sample comes from one rank.
        """

        with self.prepare_logprobs(
            batch, settings, pass_=pass_, step=step, routes=routes, first_micro_batch=first_micro_batch
        ) as prepared:
            kept, report = self.run_prepared(prepared), prepared.finish()
        return self.by_sample(batch, kept), report

    def prepare_logprobs(
        self,
        batch: MiniBatch,
        settings: PassSettings,
        *,
        pass_: Pass,
        step: int,
        routes: RouteMode,
        first_micro_batch: int = 0,
    ) -> PreparedPass:
        """:meth:`logprobs`, ready to run by any schedule; what the last stage keeps is for :meth:`by_sample`."""

        def collect(logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch) -> torch.Tensor:
            return self.token_logprobs(logits, packed, settings)[0]

        return self.prepare(
            batch,
            pass_=pass_,
            step=step,
            routes=routes,
            per_micro_batch=collect,
            forward_only=True,
            first_micro_batch=first_micro_batch,
        )

    def values(self, batch: MiniBatch, *, pass_: Pass, step: int, first_micro_batch: int = 0) -> dict[str, np.ndarray]:
        """What a scalar head says before every learnt token, without gradients; arguments as for :meth:`run`.

        The value of token t is the output of row t-1: of the state that it is predicted from, as with log-probs.
        Routers choose by themselves.

        Returns:
            as :meth:`logprobs`.
        """

        def collect(output: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch) -> torch.Tensor:
            return row_values(output)

        kept, _ = self.run(
            batch,
            pass_=pass_,
            step=step,
            routes="own",
            per_micro_batch=collect,
            forward_only=True,
            first_micro_batch=first_micro_batch,
        )
        return self.by_sample(batch, kept)

    def by_sample(self, batch: MiniBatch, kept: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
        """From ``[rows]`` of micro-batches to ``[T]`` of samples; empty but on the first tensor-parallel rank."""
        out: dict[str, np.ndarray] = {}
        mine = batch.layout.micro_batches[self.model.groups.coordinates["dp"]]
        if self.model.groups.coordinates["tp"] == 0:
            for micro_batch, rows in zip(mine, kept, strict=False):
                out |= unpack_rows(micro_batch, batch.samples, rows.cpu().numpy())
        return out

    def token_logprobs(
        self, logits: torch.Tensor, packed: PackedTensors, settings: PassSettings
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-prob of each row's target and, if asked for, each row's entropy: ``[rows]`` each."""
        tp = self.model.groups.layout.tp
        return vocab_parallel_logprobs(
            logits,
            packed.targets,
            self.model.groups.collection.tp if tp > 1 else None,
            vocab_start=self.model.groups.coordinates["tp"] * logits.shape[-1],
            temperature=settings.temperature,
            chunk_tokens=settings.chunk_tokens,
            vocab_size=self.model.arch.vocab,
            with_entropy=settings.with_entropy,
        )

    def most_likely(self, logits: torch.Tensor, packed: PackedTensors) -> torch.Tensor:
        """Whether each row's target is what greedy decoding would choose: bool ``[rows]``."""
        return is_most_likely(
            logits,
            packed.targets,
            self.model.groups.collection.tp if self.model.groups.layout.tp > 1 else None,
            vocab_start=self.model.groups.coordinates["tp"] * logits.shape[-1],
            vocab_size=self.model.arch.vocab,
        )

    # ---------------------------------------------------------------- routes

    def _window(self, micro_batch: MicroBatch) -> range:
        layout, where = self.model.groups.layout, self.model.groups.coordinates
        return router_rows(micro_batch.rows, tp_rank=where["tp"], tp_size=layout.tp, cp_size=layout.cp)

    def _set_routes(self, keys: list[MicroBatchKey], mine: Sequence[MicroBatch], batch: MiniBatch) -> None:
        assert self.replay is not None
        layers = self.replay.moe_layers
        if not layers:
            return
        runs = _consecutive(layers)
        requests, places = [], []
        for i, micro_batch in enumerate(mine):
            for j, segment in enumerate(micro_batch.segments):
                place = overlap(segment, self._window(micro_batch))
                if place is None:
                    continue
                ref = _routes_of(batch.samples[segment.sample], self.model)
                for first, last in runs:
                    requests.append((ref, place[0], place[0] + place[1], first, last))
                places.append((i, j))
        arrays = iter(self.routes(requests))
        parts: dict[tuple[int, int], np.ndarray] = {
            place: np.concatenate([next(arrays) for _ in runs], axis=1) for place in places
        }
        arch = self.model.arch
        for i, (key, micro_batch) in enumerate(zip(keys, mine, strict=True)):
            window = self._window(micro_batch)
            own = [parts.get((i, j)) for j in range(len(micro_batch.segments))]
            blocks = []
            at = 0
            for first, last in runs:
                cut = [None if p is None else p[:, at : at + last - first] for p in own]
                blocks.append(
                    assemble(
                        micro_batch,
                        window,
                        cut,
                        first_moe_layer=first,
                        moe_layers=last - first,
                        experts=arch.experts,
                        topk=arch.topk,
                    )
                )
                at += last - first
            used = max(0, min(micro_batch.used, window.stop) - window.start)
            self.replay.set(key, np.concatenate(blocks), used=used)

    def _report(self, keys: list[MicroBatchKey], mine: Sequence[MicroBatch], batch: MiniBatch) -> RouteReport:
        assert self.replay is not None
        report = RouteReport()
        total_layers = len(self.model.arch.moe_layers)
        for key, micro_batch in zip(keys, mine, strict=True):
            window = self._window(micro_batch)
            places = [(s, overlap(s, window)) for s in micro_batch.segments]
            rows = np.concatenate([np.arange(p[0], p[0] + p[1]) for _, p in places if p] or [np.zeros(0, np.int64)])
            layers = list(self.replay.moe_layers)
            report.rows += len(layers) * len(rows)
            if len(rows) and layers:
                consumed = np.stack([self.replay.consumed(key, layer)[: len(rows)] for layer in layers], axis=1)
                mine_here = [(segment, place[1]) for segment, place in places if place]
                starts = np.cumsum([0, *(length for _, length in mine_here[:-1])])
                sums = np.add.reduceat(row_hashes(consumed, rows), starts, axis=0)
                for (segment, _), of_segment in zip(mine_here, sums, strict=True):
                    digest = report.digests.setdefault(
                        batch.samples[segment.sample].sample_id, np.zeros(total_layers, np.uint64)
                    )
                    with np.errstate(over="ignore"):
                        digest[layers] += of_segment
            report.differing += sum(self.replay.finish(key).values())
        return report


def row_values(output: torch.Tensor) -> torch.Tensor:
    """From a scalar head's output ``[rows, 1]`` to ``[rows]``, at least float32."""
    return output[:, 0].to(torch.float64 if output.dtype == torch.float64 else torch.float32)


def _routes_of(sample: TrainSample, model: BuiltModel) -> RouteRef:
    expected = (sample.rows, len(model.arch.moe_layers), model.arch.topk)
    if sample.routes is None or sample.routes.shape != expected:
        raise ValueError(
            f"sample {sample.sample_id}: expected captured routes of shape {expected} to replay, got "
            f"{None if sample.routes is None else sample.routes.shape}; capture routes in rollout, or set 'own'"
        )
    return sample.routes


def _consecutive(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs ``[first, last)`` of consecutive layers; interleaved pipelines have several."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
