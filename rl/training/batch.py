"""What trainer ranks are given: samples, their layout, and the tensors of one packed micro-batch.

A mini-batch is what one optimizer step sees. Each data-parallel rank gets the layout of all and the samples of its own.

Alignment: row i of a sample feeds token i and predicts token i+1, so of a sample with P prompt and R response tokens
rows ``P-1 .. P+R-2`` carry the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from megatron_ultraep.layout import BatchLayout, MicroBatch
from megatron_ultraep.megatron import compat
from rl.types import RouteRef, Sample


@dataclass(frozen=True)
class TrainSample:
    """One sample as training needs it. T = P + R tokens.

    Attributes:
        sample_id: of the sample.
        tokens: int32 ``[T]``.
        loss_mask: bool ``[T]``, True for tokens to learn to predict (never the first).
        routes: reference to the captured routes, None to let routers choose.
        histogram: int32 ``[MoE layers, experts]``, their counts; the driver's, ranks are not sent it.
        advantages, rollout_logprobs, old_logprobs, ref_logprobs: float ``[T]``, aligned with ``tokens``, zero where
            ``loss_mask`` is False; None where the pass does not need them.
        values, returns: likewise, of a critic: values before this iteration's updates, and what they should be.
    """

    sample_id: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    routes: RouteRef | None = None
    histogram: np.ndarray | None = None
    advantages: np.ndarray | None = None
    rollout_logprobs: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    values: np.ndarray | None = None
    returns: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return len(self.tokens) - 1

    @staticmethod
    def from_sample(sample: Sample, advantages: np.ndarray | None = None) -> TrainSample:
        """A generated sample; learns from its response tokens.

        Args:
            sample: from rollout.
            advantages: float ``[R]``.
        """
        prompt = sample.prompt_length

        def aligned(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else np.concatenate([np.zeros(prompt, values.dtype), values])

        learnt = len(sample.response_tokens) if sample.learnt_tokens is None else sample.learnt_tokens
        positions = np.arange(sample.length)
        mask = (positions >= prompt) & (positions < prompt + learnt)
        return TrainSample(
            sample_id=sample.sample_id,
            tokens=sample.tokens,
            loss_mask=mask,
            routes=sample.routes,
            histogram=sample.histogram,
            advantages=aligned(advantages),
            rollout_logprobs=aligned(sample.rollout_logprobs),
        )


@dataclass(frozen=True)
class Counts:
    """What losses are normalised by.

    Attributes:
        tokens: to learn from.
        sequences: samples with at least one such token.
    """

    tokens: int = 0
    sequences: int = 0

    @staticmethod
    def of(samples: Iterable[TrainSample]) -> Counts:
        """Of these samples."""
        learnt = [int(sample.loss_mask.sum()) for sample in samples]
        return Counts(sum(learnt), sum(tokens > 0 for tokens in learnt))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences)

    def scale(self, aggregation: Literal["token_mean", "sequence_mean"], true: Counts) -> float:
        """What gradients and losses normalised by these counts are multiplied by, to be normalised by the true ones.

        Args:
            aggregation: of the loss.
            true: counts of the whole set.

        Raises:
            ValueError: an unknown aggregation.
        """
        if aggregation == "token_mean":
            return max(1, self.tokens) / max(1, true.tokens)
        if aggregation == "sequence_mean":
            return max(1, self.sequences) / max(1, true.sequences)
        raise ValueError(f"expected the aggregation token_mean or sequence_mean, got {aggregation!r}")


@dataclass(frozen=True)
class MiniBatch:
    """The part of a mini-batch, or of a chunk of one, that one data-parallel rank is given.

    Attributes:
        layout: of the whole mini-batch, all ranks.
        samples: by index into ``layout.sample_ids``; at least those of this rank.
        total_tokens: what losses per token are divided by: tokens to learn from, of the whole mini-batch. Of a chunk of
            a set that is still arriving, an estimate of the set's.
        total_sequences: what losses per sequence are divided by: samples with at least one such token; likewise.
    """

    layout: BatchLayout
    samples: Mapping[int, TrainSample]
    total_tokens: int
    total_sequences: int

    @staticmethod
    def make(
        samples: Sequence[TrainSample],
        layout: BatchLayout,
        total_tokens: int | None = None,
        total_sequences: int | None = None,
    ) -> MiniBatch:
        """The whole mini-batch, or a whole chunk; :meth:`part` cuts it.

        Args:
            samples: all of them.
            layout: of these samples.
            total_tokens, total_sequences: denominators; by default the counts of these samples.
        """
        learnt = Counts.of(samples)
        return MiniBatch(
            layout=layout,
            samples=dict(enumerate(samples)),
            total_tokens=learnt.tokens if total_tokens is None else total_tokens,
            total_sequences=learnt.sequences if total_sequences is None else total_sequences,
        )

    @property
    def learnt(self) -> Counts:
        """What the samples that are here have to learn from: of a part, that part's."""
        return Counts.of(self.samples.values())

    def part(self, rank: int) -> MiniBatch:
        """What data-parallel rank ``rank`` needs."""
        mine = {segment.sample for _, segment in self.layout.segments(rank)}
        samples = {i: replace(self.samples[i], histogram=None) for i in sorted(mine)}
        return MiniBatch(self.layout, samples, self.total_tokens, self.total_sequences)


@dataclass(frozen=True)
class PackedTensors:
    """One micro-batch on the device. ``n`` rows, padding included.

    Attributes:
        inputs, positions: int64 ``[1, n]``.
        targets: int64 ``[n]``, the token each row predicts; 0 in padding.
        mask: bool ``[n]``, rows whose target is learnt.
        sample_index: int64 ``[n]``, index of the row's segment in the micro-batch; padding has the last one's, masked.
        packed: Megatron's ``PackedSeqParams``.
        segment_tokens: int64 ``[segments]``, learnt tokens of each sample.
    """

    inputs: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    sample_index: torch.Tensor
    packed: object
    segment_tokens: torch.Tensor


def pack(micro_batch: MicroBatch, samples: Mapping[int, TrainSample], device: torch.device) -> PackedTensors:
    """The tensors that a model needs of one micro-batch."""
    n = micro_batch.rows
    inputs = np.zeros(n, dtype=np.int64)
    targets = np.zeros(n, dtype=np.int64)
    mask = np.zeros(n, dtype=bool)
    index = np.full(n, max(0, len(micro_batch.segments) - 1), dtype=np.int64)
    counts = np.zeros(max(1, len(micro_batch.segments)), dtype=np.int64)
    for i, segment in enumerate(micro_batch.segments):
        sample = samples[segment.sample]
        rows = slice(segment.offset, segment.offset + segment.rows)
        source = slice(segment.start, segment.start + segment.rows)
        inputs[rows] = sample.tokens[:-1][source]
        targets[rows] = sample.tokens[1:][source]
        mask[rows] = sample.loss_mask[1:][source]
        index[rows] = i
        counts[i] = sample.loss_mask.sum()
    bounds = micro_batch.cu_seqlens()

    def on_device(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(device, non_blocking=True)

    return PackedTensors(
        inputs=on_device(inputs)[None],
        positions=on_device(micro_batch.positions())[None],
        targets=on_device(targets),
        mask=on_device(mask),
        sample_index=on_device(index),
        packed=compat.packed_seq_params(on_device(bounds.astype(np.int32)), int(np.diff(bounds).max())),
        segment_tokens=on_device(counts),
    )


def pack_field(
    micro_batch: MicroBatch, samples: Mapping[int, TrainSample], name: str, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """A per-token field of the samples as ``[n]``, aligned with targets; None when the samples have none."""
    values = {i: getattr(samples[s.sample], name) for i, s in enumerate(micro_batch.segments)}
    if not values or any(v is None for v in values.values()):
        if any(v is not None for v in values.values()):
            raise ValueError(f"expected {name} of all samples of a micro-batch or of none")
        # A micro-batch of padding only cannot know; its tokens are masked, so zeros are as good as anything.
        return None if values else torch.zeros(micro_batch.rows, dtype=dtype, device=device)
    out = np.zeros(micro_batch.rows, dtype=np.float64)
    for i, segment in enumerate(micro_batch.segments):
        source = slice(segment.start, segment.start + segment.rows)
        out[segment.offset : segment.offset + segment.rows] = values[i][1:][source]
    return torch.from_numpy(out).to(device, dtype)


def unpack_rows(micro_batch: MicroBatch, samples: Mapping[int, TrainSample], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Per sample, a per-row result of a micro-batch as ``[T]`` aligned with tokens (the first is 0)."""
    out = {}
    for segment in micro_batch.segments:
        sample = samples[segment.sample]
        values = np.zeros(len(sample.tokens), dtype=rows.dtype)
        values[1 + segment.start : 1 + segment.start + segment.rows] = rows[
            segment.offset : segment.offset + segment.rows
        ]
        out[sample.sample_id] = np.where(sample.loss_mask, values, 0)
    return out
