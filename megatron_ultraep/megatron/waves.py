"""Which elements travel between which ranks when experts change their homes, cut into waves of bounded memory; pure.

A change of homes is a permutation of home slots, so it falls into cycles: what lies in slot ``a`` goes to ``b``, what
lies in ``b`` goes to ``c``, ... and the last one goes to ``a``. Nothing of a cycle can be written before all of it has
been read; so memory is bounded by cutting tensors, not cycles: the elements ``start..stop-1`` of one tensor go around
their cycle together, and whatever goes around together is a *round*. A *wave* is as many rounds as fit into memory.

Optimizer states may be cut over the expert-data-parallel ranks, at other elements for every slot, since each rank's
buffers are cut without regard to parameters. A round then never crosses a cut of any slot of its cycle, so that every
slot of it has one owner.

Every rank computes the same rounds in the same order from what all have told each other; nothing is negotiated later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

# (rank, first element, one past the last element): a rank holds these elements of a flattened tensor.
Extent = tuple[int, int, int]


@dataclass(frozen=True)
class Tensor:
    """One tensor that every expert of a layer has: a weight, a main parameter or a moment.

    Attributes:
        layer: layer number.
        name: of the parameter inside its expert, e.g. ``"linear_fc1.weight"``.
        kind: ``"weight"``, ``"main"`` or the optimizer's name of a state, e.g. ``"exp_avg"``.
        numel: elements of the whole tensor.
        itemsize: bytes of an element.
    """

    layer: int
    name: str
    kind: str
    numel: int
    itemsize: int


@dataclass(frozen=True)
class Transfer:
    """Elements of one tensor from one home slot to another.

    Attributes:
        tensor: which.
        source, target: ranks, counted in the group that moves together.
        source_slot, target_slot: home slots, counted over all ranks.
        start, stop: elements of the flattened tensor.
    """

    tensor: Tensor
    source: int
    target: int
    source_slot: int
    target_slot: int
    start: int
    stop: int

    @cached_property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.tensor.itemsize


Round = tuple[Transfer, ...]


def cycles(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, ...]]:
    """The cycles of home slots that a change of homes consists of, by first slot; slots that keep theirs are left out.

    Args:
        before, after: ``[experts]`` the home slot of every expert; permutations.

    Returns:
        for each cycle its slots: what lies in one goes to the next, and from the last to the first.
    """
    goes_to = dict(zip(before, after, strict=True))
    found, seen = [], set[int]()
    for first in sorted(goes_to):
        if first in seen or goes_to[first] == first:
            continue
        cycle = [first]
        while (following := goes_to[cycle[-1]]) != first:
            cycle.append(following)
        seen.update(cycle)
        found.append(tuple(cycle))
    return found


def copies(extents: Sequence[Extent], numel: int) -> list[tuple[Extent, ...]]:
    """Sort what the ranks of one slot hold into whole copies of the tensor.

    Args:
        extents: what each expert-data-parallel rank holds, in the order of those ranks; empty ones allowed.
        numel: elements of the tensor.

    Returns:
        one copy a rank where every rank holds everything; one copy in parts where they hold parts of it, by first
        element; none where nobody holds anything (a parameter that is not trained).

    Raises:
        ValueError: parts that overlap or leave gaps.
    """
    held = [extent for extent in extents if extent[2] > extent[1]]
    if not held:
        return []
    if len(held) == len(extents) and all(extent[1:] == (0, numel) for extent in held):
        return [(extent,) for extent in held]
    held.sort(key=lambda extent: extent[1:])
    ends = [0, *(stop for _, _, stop in held)]
    if [start for _, start, _ in held] != ends[:-1] or ends[-1] != numel:
        raise ValueError(
            f"expected parts that make up {numel} elements without gap or overlap, got (rank, start, stop) {held}"
        )
    return [tuple(held)]


def rounds(
    tensor: Tensor, cycle: Sequence[int], holders: Mapping[int, Sequence[Extent]], limit_bytes: int
) -> Iterator[Round]:
    """All rounds of one tensor around one cycle.

    Args:
        tensor: which.
        cycle: of home slots, from :func:`cycles`.
        holders: by slot, what each expert-data-parallel rank holds of it; see :func:`copies`.
        limit_bytes: most bytes that a round may stage on a rank: what it sends and what it receives.

    Raises:
        ValueError: slots that are held in different ways, or a limit below a single element.
    """
    held = {slot: copies(holders[slot], tensor.numel) for slot in cycle}
    kinds = {len(found) for found in held.values()}
    if kinds == {0}:
        return
    if len(kinds) > 1:
        raise ValueError(
            f"layer {tensor.layer}, {tensor.name}, {tensor.kind}: expected home slots {tuple(cycle)} to be held alike, "
            f"got {sorted(kinds)} copies"
        )
    for copy in range(kinds.pop()):
        owners = {slot: held[slot][copy] for slot in cycle}
        cuts = sorted({edge for extents in owners.values() for _, start, stop in extents for edge in (start, stop)})
        place = dict.fromkeys(cycle, 0)
        for start, stop in pairwise(cuts):
            for slot in cycle:
                while owners[slot][place[slot]][2] <= start:
                    place[slot] += 1
            ranks = [owners[slot][place[slot]][0] for slot in cycle]
            # A rank stages all it sends and all it receives: twice its slots in the cycle.
            most = 2 * max(ranks.count(rank) for rank in set(ranks)) * tensor.itemsize
            step = limit_bytes // most
            if step < 1:
                raise ValueError(
                    f"expected limit_bytes >= {most}, one element of every slot of a cycle, got {limit_bytes}"
                )
            for first in range(start, stop, step):
                last = min(stop, first + step)
                yield tuple(
                    Transfer(tensor, ranks[i], ranks[j], cycle[i], cycle[j], first, last)
                    for i, j in zip(range(len(cycle)), [*range(1, len(cycle)), 0], strict=True)
                )


def waves(all_rounds: Iterable[Round], limit_bytes: int) -> Iterator[list[Transfer]]:
    """Rounds in their order, as many together as stay below the limit on every rank.

    Args:
        all_rounds: each of which stays below it alone.
        limit_bytes: most bytes staged on a rank at once, sent and received together.
    """
    wave: list[Transfer] = []
    staged: dict[int, int] = {}
    for each in all_rounds:
        more: dict[int, int] = {}
        for transfer in each:
            more[transfer.source] = more.get(transfer.source, 0) + transfer.bytes
            more[transfer.target] = more.get(transfer.target, 0) + transfer.bytes
        if wave and any(staged.get(rank, 0) + size > limit_bytes for rank, size in more.items()):
            yield wave
            wave, staged = [], {}
        wave.extend(each)
        for rank, size in more.items():
            staged[rank] = staged.get(rank, 0) + size
    if wave:
        yield wave
