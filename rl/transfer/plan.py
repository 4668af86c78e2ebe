"""What travels in which bucket: pure functions from what trainer ranks announce to the plan that all sides share.

1. Every trainer rank announces its *holdings*: the parameters that it could hand over, in layer order, expert by
   expert, each with its *leader*, the rank that holds (or gathers) the whole Hugging Face tensors.
2. :func:`choose_leaders` decides which of a parameter's replicas hands it over.
3. :func:`make_plan` packs each source's tensors, in that order, into buckets.

Invariants: every tensor is in exactly one bucket of one source; a bucket exceeds ``bucket_bytes`` only where one
tensor does; offsets are multiples of :data:`ALIGNMENT`; equal announcements give equal plans on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

ALIGNMENT = 256  # bytes; what CUDA's allocator gives, so that copies are vectorised
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """A whole Hugging Face tensor: ``dtype`` is a torch name without ``torch.``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name}: expected a dtype of {', '.join(ITEM_BYTES)}, got {self.dtype!r}")
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Holding:
    """A parameter that a rank takes part in handing over.

    Attributes:
        key: its place in layer order, ``rl.models.names.Logical.key``; the same on all ranks.
        tensors: the whole Hugging Face tensors it is made of.
        leader: trainer rank that sends them if this replica is chosen; its tensor-parallel peers only gather.
    """

    key: tuple[int, int, int]
    tensors: tuple[TensorSpec, ...]
    leader: int


@dataclass(frozen=True)
class Piece:
    """A tensor in a bucket, ``offset`` bytes from its start."""

    tensor: TensorSpec
    offset: int


@dataclass(frozen=True)
class Bucket:
    """What one broadcast carries.

    Attributes:
        source: index among the sources; each has a communicator of its own.
        index: position among the source's buckets.
        pieces: in the order of their offsets.
        nbytes: length, the last piece included.
    """

    source: int
    index: int
    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True)
class TransferPlan:
    """A whole transfer.

    Attributes:
        ranks: trainer rank of each source.
        buckets: by source, in sending order.
        bucket_bytes: what buckets were filled to.
    """

    ranks: tuple[int, ...]
    buckets: tuple[tuple[Bucket, ...], ...]
    bucket_bytes: int

    @property
    def manifest(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, as engines check it."""
        return {p.tensor.name: p.tensor.shape for s in self.buckets for b in s for p in b.pieces}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(p.tensor.nbytes for s in self.buckets for b in s for p in b.pieces)

    def names(self, source: int) -> tuple[str, ...]:
        """Tensors that a source sends, in order."""
        return tuple(p.tensor.name for b in self.buckets[source] for p in b.pieces)

    @cached_property
    def digest(self) -> str:
        """Equal for equal plans; both sides compare it before the first byte."""
        told = [[[[p.tensor.name, p.tensor.shape, p.tensor.dtype, p.offset] for p in b.pieces] for b in s]
                for s in self.buckets]  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def choose_leaders(announced: Sequence[Sequence[Holding]], *, spread: bool = True) -> dict[tuple[int, int, int], int]:
    """The rank that hands over each parameter: ``{key: leader}``.

    Args:
        announced: by trainer rank, its holdings.
        spread: give each parameter, largest first, to the candidate with the fewest bytes so far (ties: lower rank);
            False: to the lowest candidate, which is the first replica. Spreading uses the links of all replicas.

    Raises:
        ValueError: replicas that disagree about a parameter's tensors.
    """
    tensors: dict[tuple[int, int, int], tuple[TensorSpec, ...]] = {}
    candidates: dict[tuple[int, int, int], set[int]] = {}
    for rank, holdings in enumerate(announced):
        for holding in holdings:
            known = tensors.setdefault(holding.key, holding.tensors)
            if known != holding.tensors:
                raise ValueError(
                    f"trainer rank {rank} announces {holding.tensors} where another announced {known}: ranks must "
                    "export the same model with the same dtype"
                )
            candidates.setdefault(holding.key, set()).add(holding.leader)
    if not spread:
        return {key: min(leaders) for key, leaders in candidates.items()}
    load = [0] * len(announced)
    chosen = {}
    size = {key: sum(t.nbytes for t in specs) for key, specs in tensors.items()}
    for key in sorted(size, key=lambda k: (-size[k], k)):
        leader = min(candidates[key], key=lambda rank: (load[rank], rank))
        load[leader] += size[key]
        chosen[key] = leader
    return chosen


def plan_transfer(announced: Sequence[Sequence[Holding]], bucket_bytes: int, *, spread: bool = True) -> TransferPlan:
    """The plan from all ranks' holdings; ranks that hand over nothing are no sources."""
    chosen = choose_leaders(announced, spread=spread)
    # Peers of a leader announce the same parameter with the same leader: one entry each.
    entries = {h.key: h.tensors for holdings in announced for h in holdings}
    shares: dict[int, list[TensorSpec]] = {}
    for key in sorted(entries):
        shares.setdefault(chosen[key], []).extend(entries[key])
    return make_plan(shares, bucket_bytes)


def make_plan(shares: Mapping[int, Sequence[TensorSpec]], bucket_bytes: int) -> TransferPlan:
    """Pack each rank's tensors, in their order, into buckets.

    Args:
        shares: ``{trainer rank: its tensors in sending order}``.
        bucket_bytes: most bytes of a bucket, but for a tensor that is larger: it gets a bucket of its own.

    Raises:
        ValueError: a tensor in two shares, no tensor at all, or buckets of no size.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}")
    names = [spec.name for specs in shares.values() for spec in specs]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"each tensor must have one source, these have several: {', '.join(twice[:5])}")
    if not names:
        raise ValueError("expected tensors to transfer, got none: no rank announced any")
    ranks = tuple(sorted(rank for rank, specs in shares.items() if specs))
    return TransferPlan(ranks, tuple(_pack(i, shares[r], bucket_bytes) for i, r in enumerate(ranks)), bucket_bytes)


def _pack(source: int, specs: Sequence[TensorSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    used = 0
    for spec in specs:
        offset = -(-used // ALIGNMENT) * ALIGNMENT
        if pieces and offset + spec.nbytes > bucket_bytes:
            buckets.append(Bucket(source, len(buckets), tuple(pieces), used))
            pieces, offset = [], 0
        pieces.append(Piece(spec, offset))
        used = offset + spec.nbytes
    if pieces:
        buckets.append(Bucket(source, len(buckets), tuple(pieces), used))
    return tuple(buckets)
