"""A stage of a Megatron model as the executor runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron import schedules
from megatron_ultraep.megatron.groups import ModelGroups
from megatron_ultraep.pipeline.problem import Schedule


@dataclass(frozen=True)
class StageWork:
    """What one model does on this rank in one run.

    Attributes:
        chunk: this rank's model chunk, wrapped in DistributedDataParallel when it is trained.
        config: its ``TransformerConfig``.
        groups: its process groups; their layout's placement is the model's in the problem.
        forward_step: Megatron's ``forward_step_func(data, chunk)``. It must enter the micro-batch key when experts are
            balanced or routes replayed: operations of several models and micro-batches take turns.
        data: yields every micro-batch once, in order.
        rows: of each micro-batch of this rank (sequence length, or packed rows with padding), before sequence
            parallelism divides them.
        micro_batch_size: sequences side by side; 1 when packed.
        forward_only: no backward; ``forward_step``'s loss function is called with ``non_loss_data=True``.
    """

    chunk: torch.nn.Module
    config: Any
    groups: ModelGroups
    forward_step: Callable[[Any, Any], tuple[Any, Any]]
    data: Iterator[Any]
    rows: tuple[int, ...]
    micro_batch_size: int = 1
    forward_only: bool = False

    @property
    def microbatches(self) -> int:
        return len(self.rows)

    def complaints(self, schedule: Schedule, model: int, node: int) -> list[str]:
        """Why this rank cannot run its part of the schedule; empty if it can."""
        expected = schedule.problem.models[model]
        wrong = schedules.reasons_against_fusion(self.config)
        if self.microbatches != expected.microbatches:
            wrong.append(f"expected {expected.microbatches} micro-batches on every rank, got {self.microbatches}")
        if self.forward_only != expected.forward_only:
            wrong.append(f"expected forward_only={expected.forward_only} as in the problem, got {self.forward_only}")
        where = (self.groups.replica, self.groups.coordinates["pp"])
        if expected.place(node) != where:
            wrong.append(
                f"node {node} holds (replica, stage) {expected.place(node)} in the problem, but {where} in the model's "
                f"groups: create them with ParallelLayout(placement={expected.nodes})"
            )
        division = self.groups.layout.tp if self.config.sequence_parallel else 1
        if any(rows % division for rows in self.rows):
            wrong.append(f"sequence parallelism divides rows by {division}, got {self.rows}: pad micro-batches to it")
        if len(dist.get_process_group_ranks(self.groups.collection.pp)) != expected.stages:
            wrong.append(f"expected a pipeline of {expected.stages} stages, got pp={self.groups.layout.pp}")
        return wrong

    def begin(self) -> MegatronStage:
        return MegatronStage(self)


class MegatronStage:
    """Operations of one model's stage through Megatron's own forward and backward steps.

    Gradients accumulate in ``main_grad``; reduction that overlaps backward is held back until the last micro-batch.
    """

    def __init__(self, work: StageWork) -> None:
        self._work = work
        self._config = work.config
        self._kept: list[Any] = []
        self._open: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._tokens: torch.Tensor | None = None
        self._scales: list[torch.Tensor | None] = []
        self._held: contextlib.ExitStack | None = contextlib.ExitStack()
        if self._config.no_sync_func is not None and not work.forward_only:
            self._held.enter_context(self._config.no_sync_func())

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._config.pipeline_dtype
        return found

    def shape(self, microbatch: int) -> tuple[int, ...]:
        work = self._work
        division = work.groups.layout.tp if self._config.sequence_parallel else 1
        return work.rows[microbatch] // division, work.micro_batch_size, self._config.hidden_size

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        work = self._work
        if received is not None and not work.forward_only:
            received.requires_grad_()
        with torch.set_grad_enabled(not work.forward_only):
            output, tokens = schedules.forward_step(
                work.forward_step,
                work.data,
                work.chunk,
                received,
                self._kept,
                self._config,
                microbatch=microbatch,
                microbatches=work.microbatches,
                is_last_stage=work.groups.is_last_stage,
                forward_only=work.forward_only,
            )
        self._tokens = tokens.detach() if self._tokens is None else self._tokens + tokens.detach()
        if not work.forward_only:
            self._open[microbatch] = received, output
            if not self._scales:  # the same in every forward
                self._scales = schedules.auxiliary_loss_scales()
        handed_on = None if work.groups.is_last_stage else output.detach()
        if not work.forward_only:
            schedules.free_output(output, self._config)
        return handed_on

    def backward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        if microbatch == self._work.microbatches - 1 and (
            self._config.grad_sync_func is None or self._work.groups.is_first_stage
        ):
            self._release()
        schedules.set_auxiliary_loss_scales(self._scales)
        return schedules.backward_step(*self._open.pop(microbatch), received, self._config)

    def finish(self) -> list[Any]:
        work = self._work
        if work.forward_only:
            return self._kept
        if self._held is not None:
            self._release()
            if self._config.grad_sync_func is not None:
                self._config.grad_sync_func(work.chunk.parameters())
        assert self._tokens is not None
        tokens = self._tokens.to(next(work.chunk.parameters()).device)
        schedules.finalize_gradients(work.chunk, tokens, work.groups.collection, self._config)
        return self._kept

    def _release(self) -> None:
        """From now on gradients are reduced as they are made."""
        if self._held is not None:
            self._held.close()
            self._held = None
