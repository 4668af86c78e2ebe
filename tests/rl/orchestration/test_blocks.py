"""Which trainer ranks can run forward passes while others are away."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.orchestration.blocks import blocks_of, free_ranks, mini_batch_on
from rl.orchestration.experience import Packing
from rl.training.batch import TrainSample


@pytest.mark.parametrize(
    ("layout", "blocks"),
    [
        (ParallelLayout(4), ((0,), (1,), (2,), (3,))),
        (ParallelLayout(4, ep=4), ((0, 1, 2, 3),)),
        (ParallelLayout(4, ep=2), ((0, 1), (2, 3))),
        (ParallelLayout(8, pp=2, ep=2), ((0, 1, 4, 5), (2, 3, 6, 7))),
        (ParallelLayout(8, tp=2, pp=2), ((0, 1, 4, 5), (2, 3, 6, 7))),
        (ParallelLayout(8, tp=4, ep=2), ((0, 1, 2, 3), (4, 5, 6, 7))),
        (ParallelLayout(8, tp=2, ep=8), (tuple(range(8)),)),
        (ParallelLayout(6, tp=2, ep=3), (tuple(range(6)),)),
    ],
)
def test_blocks(layout: ParallelLayout, blocks: tuple[tuple[int, ...], ...]) -> None:
    assert blocks_of(layout) == blocks


def test_only_whole_blocks_are_free() -> None:
    layout = ParallelLayout(8, pp=2, ep=2)
    assert free_ranks(layout, {0, 1, 2, 4, 5}) == (0, 1, 4, 5)
    assert free_ranks(layout, {0, 1, 2, 3}) == ()
    assert free_ranks(layout, range(8)) == tuple(range(8))


def test_a_mini_batch_for_some_ranks() -> None:
    rng = np.random.default_rng(0)
    samples = [
        TrainSample(f"s{i}", np.zeros(n, np.int32), np.ones(n, bool))
        for i, n in enumerate(rng.integers(5, 60, 20).tolist())
    ]
    packing = Packing(ParallelLayout(8, pp=2, ep=2), 128)
    batch = mini_batch_on(packing, samples, (2, 3, 6, 7))
    held = [[s.sample for _, s in batch.layout.segments(dp)] for dp in range(4)]
    assert held[0] == held[1] == []
    assert sorted(held[2] + held[3]) == list(range(20))
    assert len(batch.layout.micro_batches[2]) == len(batch.layout.micro_batches[3]) > 0
    assert set(batch.part(2).samples) == set(held[2])
    assert batch.part(0).samples == {}
    whole = mini_batch_on(packing, samples, range(8))
    assert whole.layout == packing.layout_of(samples)
    with pytest.raises(ValueError, match="whole blocks"):
        mini_batch_on(packing, samples, (0, 1))
