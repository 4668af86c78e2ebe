"""Reads load records back: the tokens of every (rank, expert) before and after balancing, and why.

Of a key that was stored more than once (a resumed run repeats the steps after its checkpoint), the last counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan.types import NodeDecision
from megatron_ultraep.telemetry.blocks import Block
from megatron_ultraep.telemetry.store import SUFFIX, chunk_files

logger = logging.getLogger(__name__)
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replica:
    """A copy of an expert: ``tokens`` of it were computed in ``slot`` of ``rank`` rather than on ``home``."""

    expert: int
    home: int
    rank: int
    slot: int
    tokens: int


@dataclass(frozen=True, eq=False)
class LoadRecord:
    """One micro-batch of one layer of one expert-parallel group.

    Attributes:
        group: who recorded it, e.g. ``"ep0-pp0"``.
        key: the micro-batch.
        layer: number of the layer in the model.
        layout: homes, nodes and slots.
        tokens: int64 ``[E]``: tokens of each logical expert.
        source_tokens: int64 ``[G]``: tokens that each source rank sends, all experts together.
        replicas: ordered by expert, then rank.
        decisions: one per node.
    """

    group: str
    key: MicroBatchKey
    layer: int
    layout: ExpertLayout
    tokens: IntArray
    source_tokens: IntArray
    replicas: tuple[Replica, ...]
    decisions: tuple[NodeDecision, ...]

    @cached_property
    def before(self) -> IntArray:
        """int64 ``[G, E]``: tokens of each expert that each rank would compute without replicas."""
        loads = np.zeros((self.layout.ranks, self.layout.experts), dtype=np.int64)
        homes = np.asarray(self.layout.home_slot) // self.layout.experts_per_rank
        loads[homes, np.arange(self.layout.experts)] = self.tokens
        return loads

    @cached_property
    def after(self) -> IntArray:
        """int64 ``[G, E]``: tokens of each expert that each rank computes."""
        loads = self.before.copy()
        for replica in self.replicas:
            loads[replica.home, replica.expert] -= replica.tokens
            loads[replica.rank, replica.expert] += replica.tokens
        return loads


class Records:
    """Load records of a run: iterate for one at a time, or over :meth:`blocks` for columns.

    Chunks are read when they are come to, so a run of any size fits in memory.

    Attributes:
        warnings: what could not be read, with file names; grows while chunks are read.
        meta: by group, what its recorder was given.
        counts: by group, what its recorders did not store, summed over sessions: ``dropped``, ``thinned``, ``failed``.
    """

    def __init__(
        self,
        sources: Iterable[Path],
        masks: Iterable[npt.NDArray[np.bool_]],
        warnings: Iterable[str] = (),
    ):
        self._sources, self._masks = tuple(sources), tuple(masks)
        self._warnings = dict.fromkeys(warnings)
        self.meta: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, dict[str, dict[str, int]]] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return {group: _sum(sessions.values()) for group, sessions in self._counts.items()}

    def blocks(self) -> Iterator[Block]:
        """Columns, chunk by chunk in the order of recording; of records stored more than once, only the last."""
        for source, mask in zip(self._sources, self._masks, strict=True):
            try:
                block = Block.read(source)
            except (ValueError, OSError) as error:
                self._warn(error)
                continue
            self.meta[block.group] = dict(block.meta)
            for session, values in block.counts.items():
                # Cumulative: a later chunk of a session counts all that earlier ones did.
                self._counts.setdefault(block.group, {})[session] = dict(values)
            if not mask.all():
                block = block.select(mask)
            if len(block):
                yield block

    def __iter__(self) -> Iterator[LoadRecord]:
        for block in self.blocks():
            for index in range(len(block)):
                yield record(block, index)

    def __len__(self) -> int:
        """Records, as far as known: of a chunk that was not read yet, damage inside it is not."""
        return sum(int(mask.sum()) for mask in self._masks)

    def evenly(self, most: int) -> Iterator[LoadRecord]:
        """At most ``most`` records, evenly spaced in the order of recording, the first and the last among them."""
        total = len(self)
        wanted = set(np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist())
        first = 0
        for block in self.blocks():
            for index in range(len(block)):
                if first + index in wanted:
                    yield record(block, index)
            first += len(block)

    def _warn(self, error: Exception) -> None:
        text = f"left out load records that cannot be read: {error}"
        if text not in self._warnings:
            self._warnings[text] = None
            logger.warning(text)


def record(block: Block, index: int) -> LoadRecord:
    """One record of a block."""
    layout = block.expert_layout(index)
    replicas = [
        Replica(
            expert=int(block.replica_expert[index, rank, slot]),
            home=layout.home_rank(int(block.replica_expert[index, rank, slot])),
            rank=int(rank),
            slot=int(slot),
            tokens=int(block.replica_tokens[index, rank, slot]),
        )
        for rank, slot in zip(*np.nonzero(block.replica_expert[index] >= 0), strict=True)
    ]
    return LoadRecord(
        group=block.group,
        key=block.key(index),
        layer=int(block.layer[index]),
        layout=layout,
        tokens=block.tokens[index].astype(np.int64),
        source_tokens=block.source_tokens[index].astype(np.int64),
        replicas=tuple(sorted(replicas, key=lambda r: (r.expert, r.rank))),
        decisions=block.decisions(index),
    )


def has_records(directory: str | Path) -> bool:
    """Whether load records lie in a directory or below it."""
    return any(Path(directory).rglob(f"*{SUFFIX}"))


def read(directory: str | Path) -> Records:
    """Read all load records in a directory and below it, of all recording processes.

    A chunk that cannot be read (torn by a crash, damaged) is left out with a warning that names it.

    Raises:
        FileNotFoundError: no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"expected a directory with load records at {directory}, found none")
    paths: list[Path] = []
    keys: list[tuple[str, Block]] = []
    warnings: list[str] = []
    for folder in sorted({path.parent for path in directory.rglob(f"*{SUFFIX}")}):
        for path in chunk_files(folder):
            try:
                keys.append((str(path.parent), Block.read(path, only_keys=True)))
                paths.append(path)
            except (ValueError, OSError) as error:
                warnings.append(f"left out load records that cannot be read: {error}")
                logger.warning(warnings[-1])
    return Records(paths, _last_of_each(keys), warnings)


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for values in counts:
        for name, value in values.items():
            total[name] = total.get(name, 0) + value
    return total


def _last_of_each(chunks: Sequence[tuple[str, Block]]) -> list[npt.NDArray[np.bool_]]:
    """Masks without records whose (folder, group, model, pass, step, micro-batch, layer) comes again later."""
    if not chunks:
        return []
    names: dict[tuple[str, ...], int] = {}
    columns = []
    for folder, block in chunks:
        series = np.array(
            [
                [names.setdefault((folder, block.group, model, pass_), len(names)) for pass_ in block.passes]
                for model in block.models
            ]
        )[block.model, block.pass_]
        columns.append(np.stack([series, block.step, block.microbatch, block.layer]))
    # Reversed, so that the first occurrence that `unique` finds is the last one stored.
    joined = np.concatenate(columns, axis=1)[:, ::-1]
    _, last = np.unique(joined, axis=1, return_index=True)
    kept = np.zeros(joined.shape[1], dtype=bool)
    kept[last] = True
    return np.split(kept[::-1], np.cumsum([len(block) for _, block in chunks])[:-1])
