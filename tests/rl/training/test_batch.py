"""What a micro-batch's tensors say of its samples, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.layout import BatchLayout, MicroBatch
from rl.training.batch import Counts, MiniBatch, TrainSample, pack, pack_field, unpack_rows
from rl.types import Prompt, RouteRef, Sample

CPU = torch.device("cpu")


def train_sample(name, length, seed=0, **fields):
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < 0.6
    mask[0] = False
    mask[-1] = True
    return TrainSample(name, rng.integers(3, 99, length).astype(np.int32), mask, **fields)


@st.composite
def packed(draw):
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=6))
    samples = [train_sample(f"s{i}", n, seed=i, advantages=np.arange(n) + 100.0 * i) for i, n in enumerate(lengths)]
    layout = BatchLayout.pack(
        [s.sample_id for s in samples],
        [s.rows for s in samples],
        data_parallel=draw(st.integers(1, 3)),
        tokens_per_micro_batch=24,
        row_multiple=draw(st.sampled_from([1, 4])),
    )
    return samples, layout


def test_each_row_is_a_token_and_the_next_one(ranks):
    ranks(1).run(check_all_rows)  # where Megatron is imported already


def check_all_rows():
    check_rows()


@settings(deadline=None)
@given(packed())
def check_rows(case):
    samples, layout = case
    by_index = dict(enumerate(samples))
    for micro_batch in (m for rank in layout.micro_batches for m in rank):
        tensors = pack(micro_batch, by_index, CPU)
        n = micro_batch.rows
        assert tensors.inputs.shape == tensors.positions.shape == (1, n)
        assert [len(x) for x in (tensors.targets, tensors.mask, tensors.sample_index)] == [n] * 3
        for i, segment in enumerate(micro_batch.segments):
            sample = samples[segment.sample]
            for row in range(segment.rows):
                at = segment.offset + row
                assert tensors.inputs[0, at] == sample.tokens[row]
                assert tensors.targets[at] == sample.tokens[row + 1]
                assert tensors.mask[at] == sample.loss_mask[row + 1]
                assert (tensors.positions[0, at], tensors.sample_index[at]) == (row, i)
            assert tensors.segment_tokens[i] == sample.loss_mask.sum()
        padding = slice(micro_batch.used, None)
        assert not tensors.mask[padding].any()
        assert not tensors.inputs[0, padding].any()
        assert not tensors.targets[padding].any()
        bounds = micro_batch.cu_seqlens()
        assert tensors.packed.cu_seqlens_q.tolist() == bounds.tolist()
        assert tensors.packed.cu_seqlens_q.dtype == torch.int32
        assert tensors.packed.max_seqlen_q == np.diff(bounds).max()


@given(packed())
def test_fields_align_with_targets_and_results_come_back(case):
    samples, layout = case
    by_index = dict(enumerate(samples))
    back = {}
    for micro_batch in (m for rank in layout.micro_batches for m in rank):
        values = pack_field(micro_batch, by_index, "advantages", CPU, torch.float64)
        for segment in micro_batch.segments:
            rows = values[segment.offset : segment.offset + segment.rows]
            assert rows.tolist() == samples[segment.sample].advantages[1:].tolist()
        assert not values[micro_batch.used :].any()
        back |= unpack_rows(micro_batch, by_index, values.numpy())
    assert set(back) == {s.sample_id for s in samples}
    for s in samples:
        assert np.array_equal(back[s.sample_id], np.where(s.loss_mask, s.advantages, 0))


@given(packed())
def test_parts_hold_what_their_rank_needs_and_the_totals_of_all(case):
    samples, layout = case
    whole = MiniBatch.make(samples, layout)
    assert whole.total_tokens == sum(s.loss_mask.sum() for s in samples)
    assert whole.total_sequences == len(samples)
    parts = [whole.part(rank) for rank in range(layout.data_parallel)]
    assert sorted(i for part in parts for i in part.samples) == list(range(len(samples)))
    for rank, part in enumerate(parts):
        assert {segment.sample for _, segment in layout.segments(rank)} == set(part.samples)
        assert (part.total_tokens, part.total_sequences) == (whole.total_tokens, whole.total_sequences)


def test_a_sample_without_learnt_tokens_is_no_sequence():
    samples = [train_sample("a", 5), TrainSample("b", np.arange(4, dtype=np.int32), np.zeros(4, bool))]
    layout = BatchLayout.pack(["a", "b"], [4, 3], data_parallel=1, tokens_per_micro_batch=8)
    assert MiniBatch.make(samples, layout).total_sequences == 1


def test_a_field_of_some_samples_only_is_refused():
    samples = {0: train_sample("a", 4, ref_logprobs=np.zeros(4)), 1: train_sample("b", 4)}
    (micro_batch,) = BatchLayout.pack(["a", "b"], [3, 3], data_parallel=1, tokens_per_micro_batch=8).micro_batches[0]
    with pytest.raises(ValueError, match="expected ref_logprobs of all samples of a micro-batch or of none"):
        pack_field(micro_batch, samples, "ref_logprobs", CPU, torch.float32)
    assert pack_field(micro_batch, samples, "old_logprobs", CPU, torch.float32) is None


def test_a_micro_batch_of_padding(ranks):
    ranks(1).run(check_padding)


def check_padding():
    tensors = pack(MicroBatch((), 4), {}, CPU)
    assert not tensors.mask.any()
    assert tensors.positions.tolist() == [[0, 1, 2, 3]]
    assert tensors.segment_tokens.tolist() == [0]
    assert tensors.sample_index.tolist() == [0] * 4
    assert pack_field(MicroBatch((), 4), {}, "advantages", CPU, torch.float32).tolist() == [0.0] * 4


def test_from_a_generated_sample():
    prompt = Prompt("u", 0, 0, "1+1", np.array([5, 6, 7], dtype=np.int32))
    routes = RouteRef(None, 0, (4, 2, 2), "uint8")
    logprobs = np.array([-0.5, -0.25], dtype=np.float32)
    sample = Sample("u/0", prompt, np.array([8, 2], np.int32), logprobs, ((0, 0),), "stop", routes, None)
    made = TrainSample.from_sample(sample, advantages=np.array([1.0, -1.0]))
    assert (made.sample_id, made.rows, made.routes) == ("u/0", 4, routes)
    assert made.tokens.tolist() == [5, 6, 7, 8, 2]
    assert made.loss_mask.tolist() == [False, False, False, True, True]
    assert made.advantages.tolist() == [0, 0, 0, 1, -1]
    assert made.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25]
    assert made.rollout_logprobs.dtype == np.float32
    assert TrainSample.from_sample(sample).advantages is None


@given(packed())
@settings(max_examples=20, deadline=None)
def test_denominators_are_counts_unless_they_are_given(batch):
    samples, layout = batch
    whole = MiniBatch.make(samples, layout)
    true = Counts(sum(int(s.loss_mask.sum()) for s in samples), len(samples))
    assert whole.learnt == true == Counts(whole.total_tokens, whole.total_sequences)
    parts = [whole.part(rank) for rank in range(len(layout.micro_batches))]
    assert sum((part.learnt for part in parts), Counts()) == true
    estimated = MiniBatch.make(samples, layout, total_tokens=1000, total_sequences=50)
    for part in [estimated, *(estimated.part(rank) for rank in range(len(layout.micro_batches)))]:
        assert (part.total_tokens, part.total_sequences) == (1000, 50)
    assert estimated.learnt == true
