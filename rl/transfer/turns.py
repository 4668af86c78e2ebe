"""In which order buckets pass through staging memory, and where in it each one lies: pure functions.

Trainer ranks hand buckets of all sources round on one communicator, so all of them must take part in the same order;
and while a rank exports a tensor, its tensor-parallel peers gather it with it. Both happen in *one* order, that of
layers: before a bucket goes round, every rank has exported what comes no later than the bucket's last tensor.

Invariants, which tests assert:

1. Each bucket of the plan has one turn; buckets of one source keep their order.
2. A rank that follows the turns never holds more of its own tensors than one unfinished bucket: a source whose bucket
   has a later turn has begun that bucket at most. So nobody waits for room that only a later turn frees.
3. Places of buckets that are not taken yet never overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rl.transfer.plan import ALIGNMENT, TransferPlan

Key = tuple[int, int, int]
GPU_BUCKET_BYTES = 256 * 2**20
"""Between GPUs; 64 MiB leave a third of the link unused."""
DEPTH = 3  # buckets in staging memory


@dataclass(frozen=True)
class Turn:
    """A bucket's turn.

    Attributes:
        source: index of its source in the plan.
        index: among the source's buckets.
        after: key of its last tensor's parameter, ``Holding.key``: what each rank exports before.
    """

    source: int
    index: int
    after: Key


@dataclass(frozen=True)
class Place:
    """Where in staging memory a bucket lies.

    Attributes:
        offset: bytes from the beginning, a multiple of ``ALIGNMENT``.
        taken_before: how many of the transfer's first buckets the engine must have taken before it may be written.
    """

    offset: int
    taken_before: int


def turns_of(plan: TransferPlan, keys: Mapping[str, Key]) -> tuple[Turn, ...]:
    """The order of a plan's buckets.

    Args:
        plan: with each source's tensors in ascending order of their keys.
        keys: by tensor name, the key of the parameter that it is made of.

    Raises:
        ValueError: a tensor without a key, or a source whose tensors are in another order.
    """
    turns = []
    for source, buckets in enumerate(plan.buckets):
        before: Key | None = None
        for bucket in buckets:
            for piece in bucket.pieces:
                key = keys.get(piece.tensor.name)
                if key is None or (before is not None and key < before):
                    raise ValueError(
                        f"expected the tensors of source {source} with keys in layer order, got {key} for "
                        f"{piece.tensor.name} after {before}"
                    )
                before = key
            assert before is not None
            turns.append(Turn(source, bucket.index, before))
    return tuple(sorted(turns, key=lambda turn: (turn.after, turn.source, turn.index)))


def staging_bytes(plan: TransferPlan, depth: int = DEPTH) -> int:
    """Room for ``depth`` full buckets, and for the largest one: of a tensor that is larger than a bucket."""
    largest = max(bucket.nbytes for buckets in plan.buckets for bucket in buckets)
    return _aligned(max(largest, depth * _aligned(min(largest, plan.bucket_bytes))))


def places(sizes: Sequence[int], capacity: int, most: int) -> list[Place]:
    """Lay buckets into a ring, in the order of their turns.

    Args:
        sizes: bytes of each.
        capacity: of the ring; at least the largest size.
        most: buckets that may lie there at the same time.

    Raises:
        ValueError: a bucket that is larger than the ring.
    """
    found: list[Place] = []
    lying: deque[tuple[int, int, int]] = deque()  # number, begin, end of those that may not be taken yet
    offset = freed = 0
    for number, size in enumerate(sizes):
        if size > capacity:
            raise ValueError(f"bucket {number} has {size} bytes, staging memory {capacity}: join with more")
        if offset + size > capacity:
            offset = 0
        begin, end = offset, offset + size
        freed = max(freed, number + 1 - most)
        for other, other_begin, other_end in lying:
            if other_begin < end and begin < other_end:
                freed = max(freed, other + 1)
        while lying and lying[0][0] < freed:
            lying.popleft()
        lying.append((number, begin, end))
        found.append(Place(begin, freed))
        offset = _aligned(end)
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
