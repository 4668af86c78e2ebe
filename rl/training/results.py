"""What steps and chunks of steps did: on one rank, and over all ranks as the loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ultraep.telemetry.metrics import merge_groups
from rl.training.batch import Counts
from rl.training.passes import RouteReport

# ------------------------------------------------------------------ of one rank


@dataclass
class AccumulateResult:
    """What forward and backward of one chunk did, on this rank.

    Attributes:
        loss: this rank's share of the loss; 0 but on the last stage's first tensor-parallel ranks. Of several chunks,
            in the denominators that they were given.
        sums: metric sums over this rank's learnt tokens, empty elsewhere; the driver adds them over ranks.
        routes: what routers did.
        seconds: by part.
        balance: metrics of balancing, from one rank of each expert-parallel group; empty on the others. Of several
            chunks ``.../max`` is the largest, the others are means over chunks.
    """

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    routes: RouteReport = field(default_factory=RouteReport)
    seconds: dict[str, float] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainResult(AccumulateResult):
    """What one optimizer step did, on this rank.

    Attributes:
        grad_norm: global norm before clipping, the same on all ranks.
        lr: of the step.
        updated: False when Megatron skipped the step.
    """

    grad_norm: float = float("nan")
    lr: float = 0.0
    updated: bool = True


def add_chunks(chunks: Sequence[AccumulateResult], scale: float) -> AccumulateResult:
    """The chunks of one set on one rank as one result.

    Args:
        chunks: in the order they came.
        scale: from the denominators of the chunks to those of the set; sums of metrics have none.
    """
    total = AccumulateResult(loss=scale * sum(chunk.loss for chunk in chunks))
    for chunk in chunks:
        _add(total.sums, chunk.sums)
        _add(total.seconds, chunk.seconds)
        add_digests(total.routes.digests, chunk.routes.digests)
        total.routes.rows += chunk.routes.rows
        total.routes.differing += chunk.routes.differing
    total.balance = merge_groups([chunk.balance for chunk in chunks if chunk.balance])
    return total


# ------------------------------------------------------------------ over all ranks


@dataclass
class ChunkOutcome:
    """Forward and backward of one chunk over all ranks.

    Attributes:
        loss: the chunk's share of the set's loss, in the denominators it was given.
        sums: metric sums over the learnt tokens.
        tokens: how many those are.
        sequences: samples with at least one.
        digests: per sample, uint64 ``[MoE layers]`` of the routes that routers consumed; empty unless replayed.
        route_rows, differing: router rows (samples x layers), and how many had another own top-k.
        seconds: slowest rank, by part.
        balance: metrics of balancing, see ``megatron_ultraep.telemetry.metrics``; empty without it.
    """

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    digests: dict[str, np.ndarray] = field(default_factory=dict)
    route_rows: int = 0
    differing: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)

    def add_ranks(self, results: Sequence[AccumulateResult]) -> None:
        """Take over what every rank tells."""
        for result in results:
            self.loss += result.loss
            _add(self.sums, result.sums)
            add_digests(self.digests, result.routes.digests)
            self.route_rows += result.routes.rows
            self.differing += result.routes.differing
            for name, value in result.seconds.items():
                self.seconds[name] = max(self.seconds.get(name, 0.0), value)
        self.balance = merge_groups([result.balance for result in results if result.balance])


@dataclass
class StepOutcome(ChunkOutcome):
    """One optimizer step over all ranks; its loss, sums and counts are those of the whole mini-batch or set.

    Attributes:
        grad_norm: before clipping.
        lr: learning rate.
        updated: False when Megatron skipped the step.
    """

    grad_norm: float = float("nan")
    lr: float = 0.0
    updated: bool = True


def chunk_outcome(results: Sequence[AccumulateResult], learnt: Counts) -> ChunkOutcome:
    """One chunk, from what every rank tells and what it learns from."""
    outcome = ChunkOutcome(tokens=learnt.tokens, sequences=learnt.sequences)
    outcome.add_ranks(results)
    return outcome


def step_outcome(results: Sequence[TrainResult], learnt: Counts) -> StepOutcome:
    """One optimizer step, from what every rank tells and what it learnt from."""
    first = results[0]
    outcome = StepOutcome(
        tokens=learnt.tokens,
        sequences=learnt.sequences,
        grad_norm=first.grad_norm,
        lr=first.lr,
        updated=first.updated,
    )
    outcome.add_ranks(results)
    return outcome


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def add_digests(total: dict[str, np.ndarray], more: Mapping[str, np.ndarray]) -> None:
    """Add up parts of digests, modulo 2^64."""
    for name, digest in more.items():
        with np.errstate(over="ignore"):
            total[name] = total.get(name, np.zeros_like(digest)) + digest
