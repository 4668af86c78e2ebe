"""Load records in columns: what a chunk file holds, and how it is packed, joined, thinned, written and read.

Legend: ``n`` records, ``G`` expert-parallel ranks, ``E`` logical experts, ``L = E / G``, ``R`` slots on a rank,
``N`` nodes.

A record keeps what rebuilds the loads of a micro-batch of a layer before and after balancing, for every (rank, expert):
tokens of each logical expert, where its replicas were and what they took, and where every expert is at home. It does
not keep who sent which token (``[G, P]`` quotas, 100 times the size), only the totals of the source ranks.

Chunk file, version 1: a compressed ``.npz`` (a zip whose members carry checksums; nothing pickled) of the arrays of
:class:`Block` and ``header``, JSON in UTF-8: format, version, group, shape, models, passes, outcomes, counts, meta.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan.types import NodeDecision, Outcome, Plan

Array = npt.NDArray[Any]
FORMAT = "megatron-ultraep-loads"
VERSION = 1
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FIGURES = ("before", "after", "bound", "saved_ps", "cost_ps")


class Shape(NamedTuple):
    """What is the same for all records of a block."""

    experts: int
    ranks: int
    node_size: int
    slots: int

    @property
    def nodes(self) -> int:
        return self.ranks // self.node_size

    @staticmethod
    def of(layout: ExpertLayout) -> Shape:
        return Shape(layout.experts, layout.ranks, layout.node_size, layout.slots)


class Row(NamedTuple):
    """One record before it is packed; arrays as in :class:`Block` without their first axis."""

    key: MicroBatchKey
    layer: int
    home_slot: tuple[int, ...]
    tokens: Array
    replica_expert: Array
    replica_tokens: Array
    source_tokens: Array
    outcome: tuple[int, ...]
    figures: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Records whose layouts have one shape, in columns.

    Attributes:
        group: the recording process, e.g. ``"ep0-pp0"``.
        shape: experts, ranks, node size and slots.
        models, passes: names that ``model`` and ``pass_`` index.
        model, pass_: int ``[n]``.
        step: int64 ``[n]``. microbatch, layer: int32 ``[n]``.
        layout: int32 ``[n]``: row of ``home_slot``.
        home_slot: int32 ``[layouts, E]``, each row an ``ExpertLayout.home_slot``.
        tokens: uint32 ``[n, E]``: tokens of each logical expert.
        replica_expert: int32 ``[n, G, R]``: the expert in each slot, -1 for an empty one.
        replica_tokens: uint32 ``[n, G, R]``: tokens that each slot computes.
        source_tokens: uint32 ``[n, G]``: tokens that each source rank sends, all experts together.
        outcome: uint8 ``[n, N]``: index into ``OUTCOMES``.
        figures: int64 ``[n, N, 5]``: ``FIGURES`` of each node's decision (tokens, tokens, tokens, ps, ps).
        counts: what was not stored, cumulative, by recording session: ``{session: {"dropped": 3, ...}}``.
        meta: what the recording process wants remembered; JSON values.
    """

    group: str
    shape: Shape
    models: tuple[str, ...]
    passes: tuple[str, ...]
    model: Array
    pass_: Array
    step: Array
    microbatch: Array
    layer: Array
    layout: Array
    home_slot: Array
    tokens: Array
    replica_expert: Array
    replica_tokens: Array
    source_tokens: Array
    outcome: Array
    figures: Array
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns, uncompressed."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def key(self, index: int) -> MicroBatchKey:
        return MicroBatchKey(
            self.models[self.model[index]],
            self.passes[self.pass_[index]],
            int(self.step[index]),
            int(self.microbatch[index]),
        )

    def expert_layout(self, index: int) -> ExpertLayout:
        shape = self.shape
        home_slot = tuple(self.home_slot[self.layout[index]].tolist())
        return ExpertLayout(shape.experts, shape.ranks, home_slot, shape.node_size, shape.slots)

    def decisions(self, index: int) -> tuple[NodeDecision, ...]:
        return tuple(
            NodeDecision(OUTCOMES[outcome], *figures)
            for outcome, figures in zip(self.outcome[index].tolist(), self.figures[index].tolist(), strict=True)
        )

    def rank_before(self) -> npt.NDArray[np.int64]:
        """int64 ``[n, G]``: tokens that each rank would compute without replicas."""
        expert_at = np.argsort(self.home_slot, axis=1)[self.layout]
        at_home = np.take_along_axis(self.tokens, expert_at, axis=1).astype(np.int64)
        before: npt.NDArray[np.int64] = at_home.reshape(len(self), self.shape.ranks, -1).sum(axis=2)
        return before

    def rank_after(self) -> npt.NDArray[np.int64]:
        """int64 ``[n, G]``: tokens that each rank computes."""
        shape = self.shape
        after: npt.NDArray[np.int64] = self.rank_before() + self.replica_tokens.sum(axis=2, dtype=np.int64)
        record, rank, slot = np.nonzero(self.replica_expert >= 0)
        expert = self.replica_expert[record, rank, slot]
        home = self.home_slot[self.layout[record], expert] // (shape.experts // shape.ranks)
        np.subtract.at(after, (record, home), self.replica_tokens[record, rank, slot].astype(np.int64))
        return after

    def select(self, mask: Array) -> Block:
        """The records where ``mask`` (bool ``[n]``) is true, with only the home permutations that they need."""
        columns = {name: getattr(self, name)[mask] for name in _COLUMNS}
        used, columns["layout"] = np.unique(columns["layout"], return_inverse=True)
        return replace(self, home_slot=self.home_slot[used], **columns)

    def to_bytes(self) -> bytes:
        """The chunk file."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "group": self.group,
            "shape": self.shape._asdict(),
            "models": self.models,
            "passes": self.passes,
            "outcomes": OUTCOMES,
            "counts": self.counts,
            "meta": self.meta,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
        return buffer.getvalue()

    @staticmethod
    def read(path: Path, *, only_keys: bool = False) -> Block:
        """Read a chunk file.

        Args:
            path: the file.
            only_keys: read only what names the records; the loads are left empty (``[n, 0]``).

        Raises:
            ValueError: torn, not a chunk, of another version, or its parts do not fit together.
            OSError: the file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("header", *(_KEYS if only_keys else _ARRAYS))}
            header = json.loads(bytes(arrays.pop("header")))
        except OSError:
            raise
        except Exception as error:  # zip, zlib, JSON and numpy each have their own way to say it
            raise ValueError(f"{path}: expected a chunk of load records, could not read it: {error!r}") from error
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"{path}: expected {FORMAT!r} version {VERSION}, got a header that says {str(header)[:80]}: open it "
                "with the release that wrote it"
            )
        try:
            if header["outcomes"] != list(OUTCOMES[: len(header["outcomes"])]):
                raise ValueError(f"expected outcomes {OUTCOMES}, got {header['outcomes']}")
            empty = {name: np.zeros((len(arrays["step"]), 0), np.int64) for name in _ARRAYS if name not in arrays}
            block = Block(
                group=header["group"],
                shape=Shape(**header["shape"]),
                models=tuple(header["models"]),
                passes=tuple(header["passes"]),
                counts=header["counts"],
                meta=header["meta"],
                **arrays,
                **empty,
            )
            block._check(only_keys)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the parts of the chunk do not fit together: {error}") from error
        return block

    def _check(self, only_keys: bool) -> None:
        n, shape = len(self.step), self.shape
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(_KEYS, (n,))
        if not only_keys:
            expected |= {
                "layout": (n,),
                "home_slot": (len(self.home_slot), shape.experts),
                "tokens": (n, shape.experts),
                "replica_expert": (n, shape.ranks, shape.slots),
                "replica_tokens": (n, shape.ranks, shape.slots),
                "source_tokens": (n, shape.ranks),
                "outcome": (n, shape.nodes),
                "figures": (n, shape.nodes, len(FIGURES)),
            }
        for name, dimensions in expected.items():
            if getattr(self, name).shape != dimensions:
                raise ValueError(f"expected {name} of shape {dimensions}, got {getattr(self, name).shape}")


_KEYS = ("model", "pass_", "step", "microbatch", "layer")
# What has one entry per record.
_COLUMNS = (*_KEYS, "layout", "tokens", "replica_expert", "replica_tokens", "source_tokens", "outcome", "figures")
_ARRAYS = (*_COLUMNS, "home_slot")


def row(key: MicroBatchKey, layer: int, plan: Plan) -> Row:
    """Take from a plan what a record keeps.

    Touches none of the plan's cached properties: before Python 3.12 they share one lock over all plans, and the thread
    that records must not hold what the training thread waits for.

    Raises:
        ValueError: a plan whose parts do not fit its layout.
    """
    layout = plan.layout
    shape, per_rank = Shape.of(layout), layout.experts_per_rank
    physical = plan.quota.sum(axis=0).reshape(shape.ranks, per_rank + shape.slots)
    if plan.replica_expert.shape != (shape.ranks, shape.slots) or len(plan.decisions) != shape.nodes:
        raise ValueError(
            f"{key}, layer {layer}: expected replica_expert of shape {(shape.ranks, shape.slots)} and "
            f"{shape.nodes} decisions, got {plan.replica_expert.shape} and {len(plan.decisions)}"
        )
    tokens = physical[:, :per_rank].reshape(-1)[np.asarray(layout.home_slot)]
    replica_tokens = physical[:, per_rank:]
    filled = plan.replica_expert >= 0
    np.add.at(tokens, plan.replica_expert[filled], replica_tokens[filled])
    return Row(
        key,
        layer,
        layout.home_slot,
        tokens.astype(np.uint32),
        plan.replica_expert.astype(np.int32),
        replica_tokens.astype(np.uint32),
        plan.quota.sum(axis=1).astype(np.uint32),
        tuple(OUTCOMES.index(d.outcome) for d in plan.decisions),
        tuple((d.before, d.after, d.bound, d.saved_ps, d.cost_ps) for d in plan.decisions),
    )


def row_nbytes(shape: Shape) -> int:
    """Bytes that a record of this shape takes in a block, uncompressed."""
    return 4 * shape.experts + 8 * shape.ranks * shape.slots + 4 * shape.ranks + 41 * shape.nodes + 28


def pack(
    rows: Sequence[Row],
    shape: Shape,
    *,
    group: str = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Block:
    """Put rows of one shape into columns."""
    models = tuple(dict.fromkeys(r.key.model for r in rows))
    passes = tuple(dict.fromkeys(r.key.pass_ for r in rows))
    layouts = {home_slot: i for i, home_slot in enumerate(dict.fromkeys(r.home_slot for r in rows))}
    n = len(rows)

    def column(values: Sequence[Any], dtype: type[np.generic], *dimensions: int) -> Array:
        return np.array(values, dtype=dtype).reshape(n, *dimensions)

    return Block(
        group=group,
        shape=shape,
        models=models,
        passes=passes,
        model=column([models.index(r.key.model) for r in rows], np.uint16),
        pass_=column([passes.index(r.key.pass_) for r in rows], np.uint8),
        step=column([r.key.step for r in rows], np.int64),
        microbatch=column([r.key.microbatch for r in rows], np.int32),
        layer=column([r.layer for r in rows], np.int32),
        layout=column([layouts[r.home_slot] for r in rows], np.int32),
        home_slot=np.array(list(layouts), dtype=np.int32).reshape(len(layouts), shape.experts),
        tokens=column([r.tokens for r in rows], np.uint32, shape.experts),
        replica_expert=column([r.replica_expert for r in rows], np.int32, shape.ranks, shape.slots),
        replica_tokens=column([r.replica_tokens for r in rows], np.uint32, shape.ranks, shape.slots),
        source_tokens=column([r.source_tokens for r in rows], np.uint32, shape.ranks),
        outcome=column([r.outcome for r in rows], np.uint8, shape.nodes),
        figures=column([r.figures for r in rows], np.int64, shape.nodes, len(FIGURES)),
        counts=counts or {},
        meta=meta or {},
    )


def join(blocks: Sequence[Block]) -> Block:
    """One block of the records of several of one group and shape, in order; of counts and meta the latest."""
    if len(blocks) == 1:
        return blocks[0]
    models = tuple(dict.fromkeys(name for b in blocks for name in b.models))
    passes = tuple(dict.fromkeys(name for b in blocks for name in b.passes))
    home_slot, inverse = np.unique(np.concatenate([b.home_slot for b in blocks]), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    first = np.cumsum([0, *(len(b.home_slot) for b in blocks)])
    columns = {name: np.concatenate([getattr(b, name) for b in blocks]) for name in _COLUMNS}
    columns["model"] = np.concatenate([_renamed(b.models, models)[b.model] for b in blocks])
    columns["pass_"] = np.concatenate([_renamed(b.passes, passes)[b.pass_] for b in blocks])
    columns["layout"] = np.concatenate([inverse[first[i] + b.layout] for i, b in enumerate(blocks)]).astype(np.int32)
    counts = {session: values for b in blocks for session, values in b.counts.items()}
    last = blocks[-1]
    return replace(last, models=models, passes=passes, home_slot=home_slot, counts=counts, **cast(Any, columns))


def _renamed(old: Sequence[str], new: Sequence[str]) -> Array:
    return np.array([new.index(name) for name in old], dtype=np.uint16)
