"""Moving experts between ranks: weights, main parameters and optimizer states together.

    group = make_move_group(chunks, optimizer, groups)                      # once
    report = move_experts(chunks, optimizer, {layer_number: home_slot, ...}, group)    # between steps

1. All ranks that hold the same layers (expert parallel x expert data parallel) tell each other whether they can, where
   to, and what states exist. Anything that speaks against it is an error on all of them, before anything has moved.
2. Every rank computes the same waves (:mod:`megatron_ultraep.megatron.waves`) from what all hold of every parameter,
   which was gathered once: under the distributed optimizer the parts of main parameters and moments are cut over
   expert-data-parallel ranks, at other elements for every home slot.
3. Wave by wave: read, exchange point to point, write in place. A rank gives one message to each other rank and gets one
   from each; all are posted before any is waited for, so no order of ranks can deadlock.

Invariants (asserted by the tests): by logical expert, every tensor has the same bits before and after; buffers stay
where they are; no more than ``limit_bytes`` are staged; afterwards the layer's checkpoints are still in logical order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.attach import moe_layers
from megatron_ultraep.megatron.checkpoint import home_slot_of, local_expert_of, set_home_slot
from megatron_ultraep.megatron.optimizer import Held, held_by, refusals_of
from megatron_ultraep.megatron.support import Unsupported
from megatron_ultraep.megatron.waves import Extent, Round, Tensor, Transfer, copies, cycles, rounds, waves

Homes = Mapping[int, Sequence[int]]
_Where = tuple[int, int, str]  # layer number, local expert, name of the parameter inside its expert


class TornStateError(RuntimeError):
    """Experts moved in part: weights and optimizer states are of no more use."""


@dataclass(frozen=True)
class MoveReport:
    """What a move did, over all ranks that hold the same layers.

    Attributes:
        bytes: that travelled between ranks.
        experts: that changed their home slot, over the layers; one that stays on its rank counts too.
        waves: exchanges that it took.
        seconds: on this rank.
    """

    bytes: int
    experts: int
    waves: int
    seconds: float


@dataclass(frozen=True)
class MoveGroup:
    """The ranks that hold the same MoE layers, and what each holds of every expert; from :func:`make_move_group`.

    Attributes:
        group: process group of these ranks alone; None on a rank without MoE layers.
        ranks: global ranks, increasing; other fields count in this order.
        rank: this rank.
        grid: ``[expert-parallel rank][expert-data-parallel rank]`` -> rank.
        layers: numbers of the layers that these ranks hold.
        every_layer: of all ranks.
        numel: elements of a parameter, by layer and name inside an expert.
        extents: per rank, by place of a parameter, the elements whose main parameter it holds; none of one that it
            holds nothing of.
    """

    group: Any = None
    ranks: tuple[int, ...] = ()
    rank: int = 0
    grid: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] = ()
    every_layer: frozenset[int] = frozenset()
    numel: Mapping[tuple[int, str], int] = field(default_factory=dict)
    extents: tuple[Mapping[_Where, tuple[int, int]], ...] = ()


@dataclass(frozen=True)
class _Told:
    """What each rank tells all others when the group is made."""

    problem: str
    layers: tuple[int, ...]
    expert_parallel: tuple[int, ...]
    expert_data_parallel: tuple[int, ...]
    numel: dict[tuple[int, str], int]
    extents: dict[_Where, tuple[int, int]]


def make_move_group(
    chunks: torch.nn.Module | Sequence[torch.nn.Module], optimizer: Any, groups: Any, *, timeout_s: float = 600.0
) -> MoveGroup:
    """Learn which ranks hold what. Collective over all ranks of the world, also those without MoE layers.

    Args:
        chunks: the model's chunks, in DistributedDataParallel.
        optimizer: Megatron's, made for them.
        groups: Megatron's ``ProcessGroupCollection`` of the model (``ep`` and ``expt_dp`` are read).
        timeout_s: limit of every wait of a move (s).

    Raises:
        Unsupported: on all ranks alike, when any rank's experts or optimizer cannot be moved.
    """
    mine = _tell(chunks, optimizer, groups)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    _raise_first([(rank, each.problem) for rank, each in enumerate(told)])
    made, rank = MoveGroup(), dist.get_rank()
    every = frozenset(number for each in told for number in each.layers)
    for ranks in _connected([(*each.expert_parallel, *each.expert_data_parallel) for each in told]):
        # Every rank makes every group, in one order: torch numbers groups by the calls made so far.
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s))
        if rank not in ranks:
            continue
        _raise_first([(r, _unlike(told[r], told[ranks[0]])) for r in ranks])
        index = {r: i for i, r in enumerate(ranks)}
        made = MoveGroup(
            group=group,
            ranks=ranks,
            rank=index[rank],
            # A rank's expert-parallel group holds, in its order, one rank of each column.
            grid=tuple(tuple(index[r] for r in told[first].expert_data_parallel) for first in mine.expert_parallel),
            layers=mine.layers,
            numel=mine.numel,
            extents=tuple(told[r].extents for r in ranks),
        )
    made = replace(made, every_layer=every)
    _check_extents(made)
    return made


def _check_extents(group: MoveGroup) -> None:
    """Every home slot's main parameters are whole, so that nothing can go wrong half-way."""
    places = sorted({where for extents in group.extents for where in extents})
    for number, place, name in places:
        tensor = Tensor(number, name, "main", group.numel[number, name], 1)
        found = {len(copies(_extents_of(tensor, ranks, place, group), tensor.numel)) for ranks in group.grid}
        if len(found) > 1:
            raise Unsupported(
                f"layer {number}, {name}: expected all ranks to train it alike, got {sorted(found)} copies"
            )


def _tell(chunks: torch.nn.Module | Sequence[torch.nn.Module], optimizer: Any, groups: Any) -> _Told:
    layers = moe_layers(chunks)
    numbers = tuple(int(layer.layer_number or 0) for layer in layers)
    problems = refusals_of(optimizer)
    if len(set(numbers)) != len(numbers):
        problems.append(f"expected MoE layers of different numbers, got {numbers}")
    parameters = {
        (number, *where): parameter
        for number, layer in zip(numbers, layers, strict=True)
        for where, parameter in expert_parameters(layer).items()
    }
    if any(type(parameter.data) is not torch.Tensor for parameter in parameters.values()):
        problems.append("experts have fp8 parameters: keep parameters in 16 or 32 bits (unset fp8_param_gather)")
    held = {} if problems else held_by(optimizer)
    return _Told(
        problem="; ".join(problems),
        layers=numbers,
        expert_parallel=tuple(dist.get_process_group_ranks(groups.ep)) if layers else (),
        expert_data_parallel=tuple(dist.get_process_group_ranks(groups.expt_dp)) if layers else (),
        numel={(number, name): p.numel() for (number, _, name), p in parameters.items()},
        extents={where: (held[p].start, held[p].stop) for where, p in parameters.items() if p in held},
    )


def _unlike(told: _Told, first: _Told) -> str:
    if (told.layers, told.numel) != (first.layers, first.numel):
        return f"expected ranks that share experts to hold the same layers, got {told.layers} and {first.layers}"
    return ""


def _connected(sets: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Ranks in groups: those that appear together, directly or through others; in the order of their first rank."""
    found: list[set[int]] = []
    for each in sets:
        together = set(each).union(*(group for group in found if group & set(each)))
        found = [group for group in found if not group & together] + ([together] if together else [])
    return sorted(tuple(sorted(group)) for group in found)


def _raise_first(problems: Iterable[tuple[int, str]]) -> None:
    for rank, problem in problems:
        if problem:
            raise Unsupported(f"experts cannot change their homes: {problem} (rank {rank})")


def expert_parameters(layer: Any) -> dict[tuple[int, str], torch.nn.Parameter]:
    """The parameters of a layer's local experts, by index of the expert and name inside it."""
    found = {}
    for name, parameter in layer.experts.named_parameters():
        where = local_expert_of(name)
        if where is None:
            raise Unsupported(f"{type(layer.experts).__name__} has the parameter {name}, which belongs to no expert")
        found[where] = parameter
    return found


def expert_bytes(chunks: torch.nn.Module | Sequence[torch.nn.Module], group: MoveGroup) -> int:
    """What leaves a rank with one expert: weights, main parameters, Adam's moments (bytes), as from the second step on.

    A mean over expert-data-parallel ranks, which under the distributed optimizer hold parts; of the layer where it is
    most; 0 without MoE layers.
    """
    most = 0
    for layer in moe_layers(chunks):
        places: dict[int, int] = {}
        for (place, name), parameter in expert_parameters(layer).items():
            where, size = (int(layer.layer_number or 0), place, name), parameter.element_size()
            extents = (group.extents[rank].get(where, (0, 0)) for rank in group.grid[layer.ep_group.rank()])
            held = -(-sum(stop - start for start, stop in extents) // len(group.grid[0]))
            # Adam works in float32 at least; where parameters are no less, they are main parameters themselves.
            states = 3 * 4 if size < 4 else 2 * size
            places[place] = places.get(place, 0) + parameter.numel() * size + held * states
        most = max(most, *places.values())
    return most


# ------------------------------------------------------------------ the move


def move_experts(
    chunks: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: Any,
    homes: Homes,
    group: MoveGroup,
    *,
    limit_bytes: int = 256 * 2**20,
) -> MoveReport:
    """Move experts to new homes, with all that the optimizer knows of them; between steps.

    Collective over all ranks of the group. Afterwards local expert ``i`` of a rank is the expert whose home slot is
    ``rank * L + i``, and checkpoints are in logical order still; whoever plans or routes must be told
    (``Balancer.rehome``).

    Args:
        chunks: as given to :func:`make_move_group`.
        optimizer: as given there.
        homes: ``{layer number: [experts] home slots}``, the same on every rank; layers left out stay as they are, and
            layers of other ranks may be among them.
        group: of this rank.
        limit_bytes: most bytes staged on a rank at once, sent and received together.

    Raises:
        Unsupported: on all ranks alike, before anything has moved: an optimizer that is not understood, gradients that
            are not empty, homes that are no permutation or of a layer that no rank has, ranks that were told different
            things.
        TornStateError: when it failed half-way.
    """
    started = time.perf_counter()
    if group.group is None:
        return MoveReport(0, 0, 0, time.perf_counter() - started)
    wanted = {int(number): tuple(map(int, home_slot)) for number, home_slot in homes.items()}
    layers = {int(layer.layer_number or 0): layer for layer in moe_layers(chunks)}
    # With overlapped gathering, parameters that another rank has stepped are not here yet.
    compat.synchronize_parameters([chunks] if isinstance(chunks, torch.nn.Module) else chunks)
    local = _local_tensors(layers, optimizer)
    problems = _problems(local, layers, optimizer, wanted, group, limit_bytes)
    before = {number: home_slot_of(layer) for number, layer in layers.items()}
    ask = repr((sorted(wanted.items()), sorted(before.items()), limit_bytes))
    tensors = _agree(local, problems, ask, group)
    changes = {
        number: (before[number], wanted[number])
        for number in layers
        if number in wanted and wanted[number] != before[number]
    }
    exchange = _Exchange(local, group, {number: _width(layer) for number, layer in layers.items()})
    moved, count = 0, 0
    try:
        for wave in waves(_all_rounds(changes, tensors, group, layers, limit_bytes), limit_bytes):
            exchange.run(wave)
            moved += sum(transfer.bytes for transfer in wave if transfer.source != transfer.target)
            count += 1
        exchange.finish()
    except Exception as error:
        raise TornStateError(
            f"moving experts failed in wave {count + 1} ({error}): weights and optimizer states are torn between the "
            "old homes and the new ones. Do not go on with them: resume from the last checkpoint"
        ) from error
    for number, (_, after) in changes.items():
        set_home_slot(layers[number], after)
    experts = sum(a != b for before, after in changes.values() for a, b in zip(before, after, strict=True))
    return MoveReport(moved, experts, count, time.perf_counter() - started)


def _width(layer: Any) -> int:
    return int(layer.config.num_moe_experts // layer.ep_group.size())


@dataclass(frozen=True)
class _Local:
    """One parameter of this rank: by kind, its flat tensors and the element that each begins with."""

    parameter: torch.nn.Parameter
    held: Held | None

    def flat(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        yield "weight", self.parameter.data.view(-1), 0
        if self.held is not None:
            for kind, tensor in self.held.tensors().items():
                yield kind, tensor.data.view(-1), self.held.start


def _local_tensors(layers: Mapping[int, Any], optimizer: Any) -> dict[_Where, _Local]:
    held = {} if refusals_of(optimizer) else held_by(optimizer)
    return {
        (number, *where): _Local(parameter, held.get(parameter))
        for number, layer in layers.items()
        for where, parameter in expert_parameters(layer).items()
    }


def _problems(
    local: Mapping[_Where, _Local],
    layers: Mapping[int, Any],
    optimizer: Any,
    homes: Homes,
    group: MoveGroup,
    limit_bytes: int,
) -> list[str]:
    """What speaks against a move on this rank."""
    problems = refusals_of(optimizer)
    unknown = sorted(set(homes) - group.every_layer)
    if unknown:
        problems.append(f"expected homes of the MoE layers {sorted(group.every_layer)}, got some of {unknown}")
    for number, layer in layers.items():
        if number in homes:
            try:
                ExpertLayout(layer.config.num_moe_experts, layer.ep_group.size(), tuple(homes[number]))
            except ValueError as error:
                problems.append(f"layer {number}: {error}")
    least = 2 * 8 * max(map(_width, layers.values()))
    if limit_bytes < least:
        problems.append(f"expected limit_bytes >= {least}, an element of every expert of a rank, got {limit_bytes}")
    if not refusals_of(optimizer) and any(
        group.extents[group.rank].get(where) != (None if one.held is None else (one.held.start, one.held.stop))
        for where, one in local.items()
    ):
        problems.append("the optimizer is not the one that the move group was made for: make the group again")
    if any(flat.device != one.parameter.device for one in local.values() for _, flat, _ in one.flat()):
        problems.append("optimizer states are not on the device of the parameters: bring them back before moving")
    if _any_gradient([one.parameter for one in local.values()]):
        problems.append(
            "gradients are not empty: move experts between steps, after zero_grad() of the optimizer and "
            "zero_grad_buffer() of every chunk"
        )
    return problems


def _agree(
    local: Mapping[_Where, _Local], problems: Sequence[str], ask: str, group: MoveGroup
) -> dict[int, list[Tensor]]:
    """The tensors that move, by layer, as all ranks hold them; an error on all ranks where they cannot."""
    sizes = {
        (number, name, kind): flat.element_size()
        for (number, _, name), one in local.items()
        for kind, flat, _ in one.flat()
    }
    steps = {one.held.steps for one in local.values() if one.held is not None}
    digest = hashlib.sha256(ask.encode())
    told: list[Any] = [None] * len(group.ranks)
    dist.all_gather_object(told, ("; ".join(problems), digest.hexdigest(), sizes, steps), group=group.group)
    _raise_first([(group.ranks[i], problem) for i, (problem, _, _, _) in enumerate(told)])
    if len({homes_told for _, homes_told, _, _ in told}) > 1:
        raise Unsupported(
            "experts cannot change their homes: ranks were told different homes or limits; give all of them the same"
        )
    counts = set().union(*(some for _, _, _, some in told))
    if len(counts) > 1:
        raise Unsupported(
            f"experts cannot change their homes: their parameters have made different numbers of optimizer steps "
            f"({sorted(map(str, counts))}): train all experts of a layer in every step, or none"
        )
    known: dict[tuple[int, str, str], int] = {}
    for _, _, some, _ in told:
        for key, size in some.items():
            if known.setdefault(key, size) != size:
                raise Unsupported(f"experts cannot change their homes: {key} has another dtype on another rank")
    found: dict[int, list[Tensor]] = {}
    for (number, name, kind), size in sorted(known.items()):
        found.setdefault(number, []).append(Tensor(number, name, kind, group.numel[number, name], size))
    return found


def _any_gradient(parameters: Sequence[torch.nn.Parameter]) -> bool:
    gradients = [g for p in parameters for g in (p.grad, getattr(p, "main_grad", None)) if g is not None]
    return bool(gradients) and bool(torch.stack([g.any() for g in gradients]).any())


def _all_rounds(
    changes: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]],
    tensors: Mapping[int, Sequence[Tensor]],
    group: MoveGroup,
    layers: Mapping[int, Any],
    limit_bytes: int,
) -> Iterator[Round]:
    for number in sorted(changes):
        width = _width(layers[number])
        found = cycles(*changes[number])
        for tensor in tensors[number]:
            for cycle in found:
                holders = {slot: _holders(tensor, slot, width, group) for slot in cycle}
                yield from rounds(tensor, cycle, holders, limit_bytes)


def _holders(tensor: Tensor, slot: int, width: int, group: MoveGroup) -> list[Extent]:
    ranks = group.grid[slot // width]
    if tensor.kind == "weight":  # every replica has all of it
        return [(rank, 0, tensor.numel) for rank in ranks]
    return _extents_of(tensor, ranks, slot % width, group)


def _extents_of(tensor: Tensor, ranks: Sequence[int], place: int, group: MoveGroup) -> list[Extent]:
    where = (tensor.layer, place, tensor.name)
    return [(rank, *group.extents[rank].get(where, (0, 0))) for rank in ranks]


class _Exchange:
    """Runs waves on this rank."""

    def __init__(self, local: Mapping[_Where, _Local], group: MoveGroup, width: Mapping[int, int]) -> None:
        self._group, self._width = group, width
        self._flat = {(where, kind): (flat, first) for where, one in local.items() for kind, flat, first in one.flat()}
        self._device = next((one.parameter.device for one in local.values()), torch.device("cpu"))

    def _bytes_of(self, transfer: Transfer, slot: int) -> torch.Tensor:
        """uint8: this rank's part of a transfer, a view."""
        tensor = transfer.tensor
        where = (tensor.layer, slot % self._width[tensor.layer], tensor.name)
        flat, first = self._flat[where, tensor.kind]
        return flat[transfer.start - first : transfer.stop - first].view(torch.uint8)

    def run(self, wave: Sequence[Transfer]) -> None:
        """Read, exchange, write."""
        me = self._group.rank
        outgoing: dict[int, list[Transfer]] = {}
        incoming: dict[int, list[Transfer]] = {}
        for transfer in wave:
            if transfer.source == me:
                outgoing.setdefault(transfer.target, []).append(transfer)
            if transfer.target == me:
                incoming.setdefault(transfer.source, []).append(transfer)
        staged = {rank: torch.cat([self._bytes_of(t, t.source_slot) for t in some]) for rank, some in outgoing.items()}
        landed = {
            rank: torch.empty(sum(t.bytes for t in some), dtype=torch.uint8, device=self._device)
            for rank, some in incoming.items()
            if rank != me
        }
        posted = [self._operation(dist.irecv, landed[rank], rank) for rank in sorted(landed)]
        posted += [self._operation(dist.isend, staged[rank], rank) for rank in sorted(staged) if rank != me]
        if posted:
            for work in dist.batch_isend_irecv(posted):
                work.wait()
        if me in staged:
            landed[me] = staged[me]
        for rank, some in incoming.items():
            for transfer, part in zip(some, torch.split(landed[rank], [t.bytes for t in some]), strict=True):
                self._bytes_of(transfer, transfer.target_slot).copy_(part)

    def _operation(self, what: Any, data: torch.Tensor, rank: int) -> Any:
        return dist.P2POp(what, data, self._group.ranks[rank], group=self._group.group)

    def finish(self) -> None:
        """Wait until all ranks have written everything."""
        written = torch.ones(1, device=self._device)
        dist.all_reduce(written, group=self._group.group)
        if written.item() != len(self._group.ranks):
            raise RuntimeError(f"expected {len(self._group.ranks)} ranks to have written, got {written.item():g}")
