"""Windows of a micro-batch, put together, are the micro-batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ultraep.layout import MicroBatch, Segment
from megatron_ultraep.replay import assemble, overlap, padding_routes, router_rows
from tests.megatron_ultraep.replay.routes import valid_routes

MODEL = {"experts": 9, "topk": 3}
LAYERS = 4


@st.composite
def micro_batches(draw):
    """A micro-batch, and the routes ``[rows of the sample, LAYERS, topk]`` of each segment's sample."""
    tp = draw(st.sampled_from([1, 2, 4]))
    segments, routes, at = [], [], 0
    for i, rows in enumerate(draw(st.lists(st.integers(1, 12), max_size=5))):
        start, rest = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        segments.append(Segment(i, start, rows, at))
        routes.append(valid_routes(start + rows + rest, LAYERS, MODEL["experts"], MODEL["topk"], seed=i))
        at += rows
    padding = draw(st.integers(0, 9))
    rows = max(1, -(-(at + padding) // tp)) * tp
    return MicroBatch(tuple(segments), rows), routes, tp


def cut(micro_batch, routes, window, first=0, last=LAYERS):
    """What a rank fetches and assembles for a window and some layers."""
    places = [overlap(segment, window) for segment in micro_batch.segments]
    parts = [None if p is None else r[p[0] : p[0] + p[1], first:last] for p, r in zip(places, routes, strict=True)]
    return assemble(micro_batch, window, parts, first_moe_layer=first, moe_layers=last - first, **MODEL)


@given(micro_batches())
def test_the_whole_is_samples_then_padding(case):
    micro_batch, routes, _ = case
    whole = cut(micro_batch, routes, range(micro_batch.rows))
    assert whole.shape == (LAYERS, micro_batch.rows, MODEL["topk"])
    assert whole.dtype == np.int16
    for segment, sample in zip(micro_batch.segments, routes, strict=True):
        got = whole[:, segment.offset : segment.offset + segment.rows]
        assert np.array_equal(got, sample[segment.start : segment.start + segment.rows].swapaxes(0, 1))
    positions = np.arange(micro_batch.used, micro_batch.rows)
    for layer in range(LAYERS):
        assert np.array_equal(whole[layer, micro_batch.used :], padding_routes(positions, layer, **MODEL))


@given(micro_batches(), st.integers(1, LAYERS - 1))
def test_windows_and_layer_ranges_concatenate_to_the_whole(case, split):
    micro_batch, routes, tp = case
    whole = cut(micro_batch, routes, range(micro_batch.rows))
    windows = [router_rows(micro_batch.rows, tp_rank=rank, tp_size=tp) for rank in range(tp)]
    pieces = [
        np.concatenate([cut(micro_batch, routes, window, *layers) for layers in ((0, split), (split, LAYERS))])
        for window in windows
    ]
    assert np.array_equal(np.concatenate(pieces, axis=1), whole)


@given(st.integers(1, 50), st.integers(1, 8))
def test_router_rows_cut_into_equal_consecutive_parts(part, tp):
    windows = [router_rows(part * tp, tp_rank=rank, tp_size=tp) for rank in range(tp)]
    assert [row for window in windows for row in window] == list(range(part * tp))
    assert {len(window) for window in windows} == {part}


def test_overlap_by_hand():
    segment = Segment(sample=0, start=10, rows=5, offset=20)  # rows 20..24 hold the sample's 10..14
    assert overlap(segment, range(0, 20)) is None
    assert overlap(segment, range(25, 30)) is None
    assert overlap(segment, range(0, 50)) == (10, 5, 20)
    assert overlap(segment, range(22, 30)) == (12, 3, 0)
    assert overlap(segment, range(18, 22)) == (10, 2, 2)


def test_many_experts_take_the_wider_type():
    micro_batch = MicroBatch((), rows=2)
    shape = {"first_moe_layer": 0, "moe_layers": 1, "topk": 1}
    assert assemble(micro_batch, range(2), [], experts=1 << 15, **shape).dtype == np.int16
    assert assemble(micro_batch, range(2), [], experts=(1 << 15) + 1, **shape).dtype == np.int32


@pytest.mark.parametrize("part", [None, np.zeros((3, LAYERS, 3), int), np.zeros((4, LAYERS - 1, 3), int)])
def test_routes_of_another_shape_are_refused(part):
    micro_batch = MicroBatch((Segment(7, 0, 4, 0),), rows=4)
    with pytest.raises(ValueError, match=r"expected routes of shape \(4, 4, 3\) for sample 7, got"):
        assemble(micro_batch, range(4), [part], first_moe_layer=0, moe_layers=LAYERS, **MODEL)


def test_refusals_of_router_rows():
    with pytest.raises(ValueError, match="the 4 tensor-parallel ranks divide, got 6: pad"):
        router_rows(6, tp_size=4)
    with pytest.raises(ValueError, match="context parallelism is not supported, got cp_size=2"):
        router_rows(8, cp_size=2)
