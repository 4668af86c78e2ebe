"""Blocks of trainer ranks: the smallest sets that can run a forward pass by themselves, while other ranks are away.

A forward pass communicates along tensor, pipeline and expert parallelism, and not between data-parallel copies. So the
ranks fall into blocks: those that are connected by such groups. A colocated rank is free when the engine on its device
is; a block runs passes when all its ranks are free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.orchestration.experience import Packing
from rl.training.batch import MiniBatch, TrainSample

# Ranks that agree in these coordinates communicate in a forward pass: tensor, pipeline and expert-parallel groups.
_GROUPS = (("pp", "dp"), ("tp", "dp"), ("pp", "expert_dp"))


def blocks_of(layout: ParallelLayout) -> tuple[tuple[int, ...], ...]:
    """Blocks of ranks, each ascending, by their first rank."""
    block = list(range(layout.world))  # by rank, the lowest rank that it is known to be connected with
    where = [layout.coordinates(rank) for rank in range(layout.world)]
    changed = True
    while changed:
        changed = False
        for names in _GROUPS:
            lowest: dict[tuple[int, ...], int] = {}
            for rank, coordinates in enumerate(where):
                key = tuple(coordinates[name] for name in names)
                lowest[key] = min(lowest.get(key, block[rank]), block[rank])
            for rank, coordinates in enumerate(where):
                found = lowest[tuple(coordinates[name] for name in names)]
                changed |= found < block[rank]
                block[rank] = found
    return tuple(tuple(r for r in range(layout.world) if block[r] == first) for first in sorted(set(block)))


def free_ranks(layout: ParallelLayout, free: Collection[int]) -> tuple[int, ...]:
    """Of the free ranks, those in blocks that are free altogether; ascending."""
    return tuple(sorted(rank for block in blocks_of(layout) if set(block) <= set(free) for rank in block))


def mini_batch_on(packing: Packing, samples: Sequence[TrainSample], ranks: Iterable[int]) -> MiniBatch:
    """A mini-batch of these samples with micro-batches for some ranks only, whole blocks.

    Raises:
        ValueError: ranks that are no whole blocks.
    """
    layout, chosen = packing.layout, sorted(set(ranks))
    if tuple(chosen) != free_ranks(layout, chosen) or not chosen:
        raise ValueError(f"expected ranks that make whole blocks of {blocks_of(layout)}, got {chosen}")
    copies = sorted({layout.coordinates(rank)["dp"] for rank in chosen})
    if len(copies) == layout.dp:
        return packing.mini_batch(samples)
    ids, rows = [s.sample_id for s in samples], [s.rows for s in samples]
    packed = BatchLayout.pack(ids, rows, **(packing.arguments | {"data_parallel": len(copies)}))
    mine = dict(zip(copies, packed.micro_batches, strict=True))
    return MiniBatch.make(samples, replace(packed, micro_batches=tuple(mine.get(dp, ()) for dp in range(layout.dp))))
