"""The three values everything else is keyed by: a micro-batch, where experts live, where samples lie.

All of them are immutable, hashable or comparable, cheap to pickle, and computed from shared inputs, so that every
rank that builds one builds the same one.

Vocabulary: a *row* is one token position that enters the model. Training inputs are ``tokens[:-1]``, so a sample of
T tokens has T-1 rows, exactly the rows for which rollout captured routes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

Pass = Literal["old_logprob", "train", "eval"]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class MicroBatchKey:
    """Names one micro-batch of one pass of one model; the same in forward, recomputation and backward.

    Attributes:
        model: which model of the process, e.g. ``"actor"`` or ``"reference"``.
        pass_: why it runs: ``"old_logprob"`` (forward only), ``"train"`` or ``"eval"``.
        step: optimizer step (mini-batch) counted from the start of the run.
        microbatch: index in the step on this data-parallel rank, from 0.
    """

    model: str
    pass_: Pass
    step: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.model}/{self.pass_}/step {self.step}/micro-batch {self.microbatch}"


@dataclass(frozen=True)
class ExpertLayout:
    """Which rank is home to which logical expert.

    Attributes:
        experts: number of logical experts E.
        ranks: number of expert-parallel ranks; divides E.
        home_slot: permutation of ``0..E-1``: expert ``e`` lives in home slot ``home_slot[e]``; slots are numbered over
            ranks, so rank r owns slots ``r*E/ranks .. (r+1)*E/ranks - 1``. Identity at first.
        node_size: ranks that share the fast fabric; replicas never leave a node.
        slots: replica slots reserved on each rank.

    Raises:
        ValueError: when the fields do not describe a layout.
    """

    experts: int
    ranks: int
    home_slot: tuple[int, ...] = ()
    node_size: int = 0
    slots: int = 0

    def __post_init__(self) -> None:
        if self.experts < 1 or self.ranks < 1 or self.experts % self.ranks:
            raise ValueError(
                f"expected a number of experts that the expert-parallel ranks divide, got {self.experts} experts on "
                f"{self.ranks} ranks; choose an expert-parallel size that divides {self.experts}"
            )
        if not self.home_slot:
            object.__setattr__(self, "home_slot", tuple(range(self.experts)))
        if sorted(self.home_slot) != list(range(self.experts)):
            raise ValueError(f"home_slot must be a permutation of 0..{self.experts - 1}, got {self.home_slot}")
        if not self.node_size:
            object.__setattr__(self, "node_size", self.ranks)
        if self.ranks % self.node_size:
            raise ValueError(f"node_size {self.node_size} must divide the {self.ranks} expert-parallel ranks")
        if self.slots < 0:
            raise ValueError(f"slots must be >= 0, got {self.slots}")

    @property
    def experts_per_rank(self) -> int:
        return self.experts // self.ranks

    @cached_property
    def expert_at(self) -> tuple[int, ...]:
        """The inverse of ``home_slot``: the logical expert in each home slot."""
        inverse = [0] * self.experts
        for expert, slot in enumerate(self.home_slot):
            inverse[slot] = expert
        return tuple(inverse)

    def home_rank(self, expert: int) -> int:
        """Rank that owns the parameters of a logical expert."""
        return self.home_slot[expert] // self.experts_per_rank

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Logical experts at home on a rank, in the order of its local expert modules."""
        first = rank * self.experts_per_rank
        return self.expert_at[first : first + self.experts_per_rank]


@dataclass(frozen=True)
class Segment:
    """A run of rows of one sample inside a micro-batch.

    Attributes:
        sample: index into ``BatchLayout.sample_ids``.
        start: first row of the sample in this segment (0 while samples are never split).
        rows: number of rows.
        offset: where the first of them lies in the micro-batch.
    """

    sample: int
    start: int
    rows: int
    offset: int


@dataclass(frozen=True)
class MicroBatch:
    """Segments packed back to back, then padding up to ``rows``."""

    segments: tuple[Segment, ...]
    rows: int

    @property
    def used(self) -> int:
        """Rows that belong to samples; rows ``used..rows-1`` are padding."""
        return sum(s.rows for s in self.segments)

    def cu_seqlens(self) -> IntArray:
        """int64 ``[segments (+1 when padded) + 1]``: where each packed sequence starts; padding is one of its own."""
        ends = [s.offset + s.rows for s in self.segments]
        if self.rows > self.used:
            ends.append(self.rows)
        return np.array([0, *ends], dtype=np.int64)

    def positions(self) -> IntArray:
        """int64 ``[rows]``: position of each row in its sequence; padding counts from 0."""
        bounds = self.cu_seqlens()
        starts = np.repeat(bounds[:-1], np.diff(bounds))
        return np.arange(self.rows, dtype=np.int64) - starts


@dataclass(frozen=True)
class BatchLayout:
    """Which sample, which of its rows, in which micro-batch, on which data-parallel rank, and the padding.

    The trainer makes it; replay, planning, composition and ledger read it.

    Attributes:
        sample_ids: the samples of the mini-batch, in loss order.
        sample_rows: rows of each sample (tokens - 1).
        micro_batches: ``[data-parallel rank][micro-batch]``; every rank has the same number of micro-batches, and
            micro-batch i has the same number of rows on every rank (experts exchange tokens across ranks, and a
            pipeline wants to know its shapes).
    """

    sample_ids: tuple[str, ...]
    sample_rows: tuple[int, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]

    @property
    def data_parallel(self) -> int:
        return len(self.micro_batches)

    @property
    def num_microbatches(self) -> int:
        return len(self.micro_batches[0])

    def segments(self, rank: int) -> Iterator[tuple[int, Segment]]:
        """All ``(micro-batch, segment)`` of a data-parallel rank, in execution order."""
        for i, micro_batch in enumerate(self.micro_batches[rank]):
            for segment in micro_batch.segments:
                yield i, segment

    def padding_fraction(self) -> float:
        """Share of the rows computed that belong to no sample, in [0, 1)."""
        total = sum(m.rows for rank in self.micro_batches for m in rank)
        return 1.0 - sum(self.sample_rows) / total

    @staticmethod
    def pack(
        sample_ids: Sequence[str],
        sample_rows: Sequence[int],
        *,
        data_parallel: int,
        tokens_per_micro_batch: int,
        row_multiple: int = 1,
        micro_batch_multiple: int = 1,
    ) -> BatchLayout:
        """Pack samples into micro-batches under a token budget, evenly over data-parallel ranks.

        The number of micro-batches is the least that first-fit decreasing finds under the budget, rounded up to a
        multiple of ``data_parallel * micro_batch_multiple``; the samples are then spread over that many bins longest
        first, each to the emptiest bin (Graham's LPT rule), ties to the lower index. Deterministic.

        Args:
            sample_ids: one id per sample.
            sample_rows: rows (tokens - 1) of each sample, >= 1.
            data_parallel: number of data-parallel ranks.
            tokens_per_micro_batch: most rows a micro-batch may hold, padding included.
            row_multiple: micro-batches are padded to a multiple of this (tensor-parallel size, kernels).
            micro_batch_multiple: micro-batches per rank are a multiple of this (interleaved pipelines).

        Raises:
            ValueError: a sample that fits into no micro-batch, an empty batch, ids that are not distinct, or sizes < 1.
        """
        for name, size in (
            ("data_parallel", data_parallel),
            ("row_multiple", row_multiple),
            ("micro_batch_multiple", micro_batch_multiple),
        ):
            if size < 1:
                raise ValueError(f"expected {name} >= 1, got {size}")
        if not sample_ids or len(sample_ids) != len(sample_rows):
            raise ValueError(f"expected one row count per sample, got {len(sample_ids)} ids, {len(sample_rows)} counts")
        if len(set(sample_ids)) != len(sample_ids):
            twice = next(name for i, name in enumerate(sample_ids) if name in sample_ids[:i])
            raise ValueError(f"expected distinct sample ids, got {twice!r} more than once")
        budget = tokens_per_micro_batch // row_multiple * row_multiple
        for name, rows in zip(sample_ids, sample_rows, strict=True):
            if not 1 <= rows <= budget:
                raise ValueError(
                    f"sample {name} has {rows} rows (tokens - 1), expected 1..{budget}: raise tokens_per_micro_batch "
                    f"({tokens_per_micro_batch}) or limit the length of samples"
                )
        order = sorted(range(len(sample_rows)), key=lambda i: (-sample_rows[i], i))
        unit = data_parallel * micro_batch_multiple
        bins = -(-_first_fit_decreasing(order, sample_rows, budget) // unit) * unit
        while True:
            assigned = _longest_first(order, sample_rows, bins)
            if all(sum(sample_rows[i] for i in content) <= budget for content in assigned):
                break
            bins += unit  # LPT balances but can overflow where first-fit found room: one more round of bins
        # Micro-batch j of every rank is a neighbour in length, so padding them to one length costs little.
        assigned.sort(key=lambda content: (-sum(sample_rows[i] for i in content), content))
        return BatchLayout.of_contents(
            sample_ids,
            sample_rows,
            [assigned[rank::data_parallel] for rank in range(data_parallel)],
            row_multiple=row_multiple,
        )

    @staticmethod
    def of_contents(
        sample_ids: Sequence[str],
        sample_rows: Sequence[int],
        contents: Sequence[Sequence[Sequence[int]]],
        *,
        row_multiple: int = 1,
    ) -> BatchLayout:
        """The layout whose micro-batches hold the given samples, each whole, in the order given.

        Args:
            sample_ids, sample_rows: as for :meth:`pack`.
            contents: ``[data-parallel rank][micro-batch]``: indices of samples; every sample in exactly one.
            row_multiple: micro-batches are padded to a multiple of this.

        Raises:
            ValueError: ranks of different numbers of micro-batches, or samples that are not there exactly once.
        """
        if len({len(of_rank) for of_rank in contents}) != 1:
            raise ValueError(
                f"expected the same number of micro-batches on every rank, got {[len(of_rank) for of_rank in contents]}"
            )
        placed = sorted(i for of_rank in contents for content in of_rank for i in content)
        if placed != list(range(len(sample_rows))):
            raise ValueError(
                f"expected each of {len(sample_rows)} samples in one micro-batch, got {len(placed)} places of "
                f"{len(set(placed))} samples"
            )
        per_rank: list[list[MicroBatch]] = [[] for _ in contents]
        for group in zip(*contents, strict=True):
            longest = max(sum(sample_rows[i] for i in content) for content in group)
            rows = max(1, -(-longest // row_multiple)) * row_multiple
            for rank, content in enumerate(group):
                per_rank[rank].append(_micro_batch(content, sample_rows, rows))
        return BatchLayout(tuple(sample_ids), tuple(sample_rows), tuple(tuple(r) for r in per_rank))


def _first_fit_decreasing(order: Sequence[int], rows: Sequence[int], budget: int) -> int:
    free: list[int] = []
    for i in order:
        for j, room in enumerate(free):
            if rows[i] <= room:
                free[j] -= rows[i]
                break
        else:
            free.append(budget - rows[i])
    return len(free)


def _longest_first(order: Sequence[int], rows: Sequence[int], bins: int) -> list[list[int]]:
    heap = [(0, j) for j in range(bins)]
    content: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        load, j = heapq.heappop(heap)
        content[j].append(i)
        heapq.heappush(heap, (load + rows[i], j))
    return [sorted(c) for c in content]


def _micro_batch(content: Sequence[int], sample_rows: Sequence[int], rows: int) -> MicroBatch:
    segments = []
    offset = 0
    for i in content:
        segments.append(Segment(sample=i, start=0, rows=sample_rows[i], offset=offset))
        offset += sample_rows[i]
    return MicroBatch(tuple(segments), rows)
