"""Process groups of one model, explicit: two models of different layouts can live in one process.

Megatron-core's global ``parallel_state`` is never initialised; whatever would ask it fails loudly.

A model's stages may lie on the ranks in another order than that of ranks (``ParallelLayout.placement``). That is a
renumbering of ranks and nothing else: groups list their members in the order of stages and data-parallel ranks, so
whatever asks a group for its rank, as Megatron does everywhere, is told the stage.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, overload

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_ultraep.megatron import compat


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel sizes of one model. Data parallelism is what remains of the ranks.

    Ranks are numbered as Megatron numbers them (order ``tp-cp-ep-dp-pp``): tensor parallel fastest, then data
    parallel, then pipeline. Expert parallelism cuts the same ranks of a pipeline stage differently: expert tensor
    parallel fastest, then expert parallel, then expert data parallel.

    Attributes:
        world: ranks of the model.
        tp, pp, ep, etp: tensor, pipeline, expert and expert-tensor parallel sizes.
        vpp: model chunks per pipeline stage (interleaved schedule), or None.
        cp: context parallel size; only 1 is supported.
        placement: ``[replica][stage]``, node; a node is ``world / (replicas*pp)`` consecutive ranks, which hold one
            stage of one replica. Replicas are data-parallel copies, so ``dp`` counts them all. Nodes are all of the
            model's, each once. None: stage s on the s-th part of the ranks.

    Raises:
        ValueError: sizes that do not fit, with what to change.
    """

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1
    placement: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("world", "tp", "pp", "ep", "etp", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.cp != 1:
            raise ValueError(f"context parallelism is not supported, got cp={self.cp}: set it to 1")
        if self.world % (self.tp * self.pp):
            raise ValueError(f"tp*pp = {self.tp}*{self.pp} must divide the {self.world} ranks")
        if (self.world // self.pp) % (self.etp * self.ep):
            raise ValueError(
                f"etp*ep = {self.etp}*{self.ep} must divide the {self.world // self.pp} ranks of a pipeline stage"
            )
        if self.vpp is not None and (self.vpp < 2 or self.pp == 1):
            raise ValueError(
                f"vpp={self.vpp} needs pp > 1 and at least 2 chunks per stage, got pp={self.pp}: unset vpp"
            )
        if self.placement is not None:
            self._check_placement(self.placement)

    def _check_placement(self, placement: tuple[tuple[int, ...], ...]) -> None:
        nodes = [node for replica in placement for node in replica]
        if not placement or any(len(replica) != self.pp for replica in placement):
            raise ValueError(f"expected a placement of pp={self.pp} nodes for every replica, got {placement}")
        if sorted(nodes) != list(range(len(nodes))):
            raise ValueError(f"expected each of the nodes 0 to {len(nodes) - 1} once in the placement, got {placement}")
        if self.world % len(nodes) or self.world // len(nodes) % self.tp or self.node_size % (self.etp * self.ep):
            raise ValueError(
                f"tp={self.tp} and etp*ep={self.etp}*{self.ep} must divide the ranks of a node, "
                f"{self.world} ranks / {len(nodes)} nodes: use fewer replicas or smaller sizes"
            )

    @property
    def replicas(self) -> int:
        """Copies of the pipeline that lie on nodes of their own; copies inside nodes are not counted."""
        return len(self.placement) if self.placement else 1

    @property
    def node_size(self) -> int:
        """Ranks that hold one stage of one replica."""
        return self.world // (self.replicas * self.pp)

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def sequence_parallel(self) -> bool:
        """Megatron's MoE demands sequence parallelism with tensor parallelism; it is always on with it."""
        return self.tp > 1

    def opposed(self, nodes: int) -> ParallelLayout:
        """The same sizes on the nodes of a pipeline of ``nodes`` stages, whose direction these stages run against.

        Fewer stages are there several times, as replicas on consecutive segments of nodes.

        Raises:
            ValueError: a number of stages that does not divide ``nodes``, or sizes that do not fit a node.
        """
        if nodes % self.pp:
            raise ValueError(f"expected a number of stages that divides the {nodes} nodes, got pp={self.pp}")
        firsts = range(0, nodes, self.pp)
        return replace(self, placement=tuple(tuple(range(first, first + self.pp))[::-1] for first in firsts))

    def coordinates(self, rank: int) -> dict[str, int]:
        """``{"tp", "dp", "pp", "etp", "ep", "expert_dp"}`` of a rank."""
        rank = _numbers(self)[rank]
        stage = self.world // self.pp
        inside = rank % stage
        return {
            "pp": rank // stage,
            "tp": inside % self.tp,
            "dp": inside // self.tp,
            "etp": inside % self.etp,
            "ep": inside // self.etp % self.ep,
            "expert_dp": inside // (self.etp * self.ep),
        }


@functools.cache
def _numbers(layout: ParallelLayout) -> tuple[int, ...]:
    """Megatron's number of each rank of the model: by stage, then by replica, then by place in the node."""
    if layout.placement is None:
        return tuple(range(layout.world))
    numbers = [0] * layout.world
    size = layout.node_size
    for r, replica in enumerate(layout.placement):
        for stage, node in enumerate(replica):
            for inside in range(size):
                numbers[node * size + inside] = (stage * layout.replicas + r) * size + inside
    return tuple(numbers)


def _partition(layout: ParallelLayout, *same: str) -> list[tuple[int, ...]]:
    """The model's ranks in sets that agree in every coordinate named; members and sets in Megatron's order."""
    sets: dict[tuple[int, ...], list[int]] = {}
    numbers = _numbers(layout)
    for rank in sorted(range(layout.world), key=numbers.__getitem__):
        where = layout.coordinates(rank)
        sets.setdefault(tuple(where[c] for c in same), []).append(rank)
    return [tuple(ranks) for ranks in sets.values()]


@dataclass(frozen=True)
class ModelGroups:
    """The groups of one model on this rank.

    Attributes:
        layout: sizes.
        rank: this process' rank within the model, ``0..layout.world-1``.
        collection: Megatron's ``ProcessGroupCollection``.
    """

    layout: ParallelLayout
    rank: int
    collection: Any

    @property
    def coordinates(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    @property
    def replica(self) -> int:
        """Which copy of the pipeline this rank belongs to, see ``ParallelLayout.placement``."""
        return self.coordinates["dp"] // (self.layout.dp // self.layout.replicas)

    @property
    def is_first_stage(self) -> bool:
        return self.coordinates["pp"] == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates["pp"] == self.layout.pp - 1


def new_group(ranks: Sequence[int], *, timeout_s: float, backend: str | None = None) -> Any:
    """A process group whose members have the ranks ``0, 1, ...`` in the order given. Collective over the world.

    Args:
        ranks: global ranks, the same list on every rank.
        timeout_s: limit of every wait on the group, in seconds.
        backend: the default group's by default.
    """
    timeout = timedelta(seconds=timeout_s)
    members = list(ranks)
    if members == sorted(members):
        return dist.new_group(members, timeout=timeout, backend=backend)
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        return dist.new_group(members, timeout=timeout, backend=backend, sort_ranks=False)

    # Older torch (2.11 and before) sorts by a name that it looks up in its module.
    def in_order(values: Any, **kwargs: Any) -> list[Any]:
        values = list(values)
        return values if values == members else builtins.sorted(values, **kwargs)

    distributed_c10d.sorted = in_order  # type: ignore[attr-defined]
    try:
        group = dist.new_group(members, timeout=timeout, backend=backend)
    finally:
        del distributed_c10d.sorted  # type: ignore[attr-defined]
    if dist.get_rank() in members and dist.get_process_group_ranks(group) != members:
        raise RuntimeError(f"torch made a group of {dist.get_process_group_ranks(group)} for the order {members}")
    return group


@overload
def create_groups(
    layout: ParallelLayout, *, ranks: None = None, timeout_s: float = 600.0, backend: str | None = None
) -> ModelGroups: ...


@overload
def create_groups(
    layout: ParallelLayout, *, ranks: Sequence[int], timeout_s: float = 600.0, backend: str | None = None
) -> ModelGroups | None: ...


def create_groups(
    layout: ParallelLayout, *, ranks: Sequence[int] | None = None, timeout_s: float = 600.0, backend: str | None = None
) -> ModelGroups | None:
    """Create the groups of one model; called by every rank of the world, for all models in the same order.

    Groups with the same members are created once (gloo starts threads for each). Only members of a group connect, but
    every rank must call, member of the model or not: torch numbers groups by the calls made so far. (Letting members
    alone create a group looks cheaper, but torch then names it after the number of groups its rank has, which differs
    between the first, the middle and the last stages of a pipeline: they wait for each other until the time-out.)

    Args:
        layout: parallel sizes.
        ranks: global ranks of the model, increasing; all of the world by default.
        timeout_s: limit of every wait on these groups, in seconds.
        backend: ``"gloo"`` or ``"nccl"``; the default group's by default.

    Returns:
        the groups; None on a rank that is none of the model's.

    Raises:
        ValueError: when the ranks are not as many as the layout's, or not increasing.
    """
    members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    if len(members) != layout.world:
        raise ValueError(f"expected {layout.world} ranks for {layout}, got {len(members)}")
    if members != sorted(set(members)):
        raise ValueError(f"expected increasing ranks (torch orders groups by global rank), got {members}")
    rank = members.index(dist.get_rank()) if dist.get_rank() in members else None
    made: dict[tuple[int, ...], Any] = {}

    def mine(sets: Sequence[tuple[int, ...]]) -> Any:
        """Create what is not there yet; the group of this rank, None if it is in none of the sets."""
        for key in sets:
            if key not in made:
                made[key] = new_group([members[r] for r in key], timeout_s=timeout_s, backend=backend)
        return next((made[key] for key in sets if rank in key), None)

    def peers(*same: str) -> Any:
        return mine(_partition(layout, *same))

    pipelines = _partition(layout, "tp", "dp")
    dp = peers("tp", "pp")
    expert_dp = peers("etp", "ep", "pp")
    tp = peers("dp", "pp")
    # cp is 1: every group "with context parallelism" equals the one without.
    collection = compat.process_group_collection(
        tp=tp,
        cp=mine([(r,) for r in range(layout.world)]),
        pp=mine(pipelines),
        mp=peers("dp"),
        embd=mine([p[:1] if len(p) == 1 else (p[0], p[-1]) for p in pipelines]),
        pos_embd=mine([p[:1] for p in pipelines]),
        tp_cp=tp,
        ep=peers("etp", "expert_dp", "pp"),
        expt_tp=peers("ep", "expert_dp", "pp"),
        tp_ep=peers("expert_dp", "pp"),
        tp_ep_pp=peers("expert_dp"),
        tp_dp_cp=peers("pp"),
        dp=dp,
        dp_cp=dp,
        expt_dp=expert_dp,
        intra_dp_cp=dp,
        intra_expt_dp=expert_dp,
        inter_dist_opt=None,
        intra_dist_opt=mine([tuple(range(layout.world))]),
        # 0.19 splits data parallelism once more, for rematerialised weights; unused here, so it is the same group.
        dp_cp_gtp_remat=dp,
        expt_dp_gtp_remat=expert_dp,
    )
    return None if rank is None else ModelGroups(layout, rank, collection)
