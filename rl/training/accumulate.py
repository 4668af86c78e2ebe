"""Gradients of a step whose samples arrive in chunks: the rank's side.

    accumulator.accumulate(chunk, step, objective, first=True)     # as soon as enough groups have come
    accumulator.accumulate(chunk, step, objective, first=False)    # at arrival pace
    accumulator.apply(scale)                                       # the set is complete: one optimizer step

A loss is a sum over samples divided by counts of the whole set, which nobody knows before the last sample is there.
Chunks are given an estimate N' of the count N, and ``scale = N' / N`` (``Counts.scale``) makes the gradient exact:

    g = 1/N sum_i g_i = (N' / N) sum_chunks (1/N' sum_{i in chunk} g_i)

The sum does not depend on the order of arrival or on where chunks are cut, up to rounding. Any N' will do; one near N
keeps gradients in their usual range.

Invariants (asserted by the tests of this file):

1. Nothing is reduced over ranks before :meth:`Accumulator.apply`: Megatron's finalize runs once per set. (Gradients of
   replicas of experts go home inside each backward, as always.)
2. Keys of micro-batches are unique in a set: numbers go on from chunk to chunk.
3. After ``apply``, ``discard`` or a chunk that failed no set is open, and gradients of the next begin empty.

Source:
    Dynamic-batch pipelining, StreamRL (arXiv:2504.15930), section 4.1.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from megatron_ultraep.megatron import compat
from rl.training.batch import MiniBatch
from rl.training.foresight import StagePlans
from rl.training.objectives import Objective
from rl.training.results import AccumulateResult, TrainResult, add_chunks

if TYPE_CHECKING:
    from rl.training.trained import TrainedModel


class AccumulationError(RuntimeError):
    """A set was begun twice, or there is none; says which call is due."""


class Accumulator:
    """The open set of one model on one rank.

    Args:
        trained: whose gradients they are.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self._trained = trained
        self._chunks: list[AccumulateResult] = []
        self._micro_batches = 0  # of all chunks so far
        self._step = 0

    @property
    def is_open(self) -> bool:
        """Whether gradients of a set are in ``main_grad``."""
        return bool(self._chunks)

    def accumulate(
        self, batch: MiniBatch, step: int, objective: Objective, *, plans: StagePlans | None, first: bool
    ) -> AccumulateResult:
        """See ``TrainWorker.accumulate``."""
        check_first(self.is_open, first)
        if self.is_open and step != self._step:
            raise AccumulationError(f"expected a chunk of step {self._step}, whose set is open, got one of step {step}")
        trained = self._trained
        if trained.overlap:
            raise AccumulationError(
                "gradients of a set are reduced once, when all its chunks are in, but this trainer reduces them during "
                "backward: set overlap of its TrainerSpec to false"
            )
        started = time.perf_counter()
        trained.balance_metrics()  # of passes before this one
        if first:
            trained.empty_gradients()
            self._step = step
        try:
            with compat.gradients_not_finalized(trained.model.config):
                loss, sums, routes = trained.forward_backward(
                    batch, step, objective, plans, first_micro_batch=self._micro_batches
                )
        except BaseException:
            self.discard()  # part of the chunk may be in main_grad
            raise
        result = AccumulateResult(
            loss=loss,
            sums=sums,
            routes=routes,
            seconds={"forward_backward": time.perf_counter() - started},
            balance=trained.balance_metrics(),
        )
        self._chunks.append(result)
        self._micro_batches += len(batch.layout.micro_batches[trained.model.groups.coordinates["dp"]])
        return result

    def apply(self, scale: float, lr: float | None) -> TrainResult:
        """See ``TrainWorker.apply``."""
        check_apply(self.is_open, scale)
        trained = self._trained
        started = time.perf_counter()
        if scale != 1.0:
            for gradients in compat.gradient_buffers(trained.model.wrapped):
                gradients.mul_(scale)
        trained.finalize_gradients()
        reduced = time.perf_counter()
        chunks = add_chunks(self._chunks, scale)
        self._close()
        grad_norm, used, updated = trained.optimizer_step(lr)
        seconds = {"reduce": reduced - started, "optimizer": time.perf_counter() - reduced}
        return TrainResult(
            loss=chunks.loss,
            sums=chunks.sums,
            routes=chunks.routes,
            seconds=chunks.seconds | seconds,
            balance=chunks.balance,
            grad_norm=grad_norm,
            lr=used,
            updated=updated,
        )

    def discard(self) -> None:
        """Forget the open set, if there is one, and its gradients."""
        self._close()
        self._trained.empty_gradients()

    def _close(self) -> None:
        self._chunks, self._micro_batches = [], 0


def check_first(is_open: bool, first: bool) -> None:
    """Whether a chunk may come now.

    Raises:
        AccumulationError: the first of a set while another is open, or a later one of none.
    """
    if first and is_open:
        raise AccumulationError(
            "expected a further chunk of the set that is open, got the first one of another: apply() the open set, or "
            "discard() it"
        )
    if not first and not is_open:
        raise AccumulationError("expected the first chunk of a set, got a further one: begin with first=True")


def check_apply(is_open: bool, scale: float) -> None:
    """Whether a set may be applied now.

    Raises:
        AccumulationError: no set is open.
        ValueError: a scale that is no positive number.
    """
    if not is_open:
        raise AccumulationError("no gradients to apply: accumulate() the chunks of a set first")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"expected a scale that is a positive number, got {scale}: estimated count / true count")
