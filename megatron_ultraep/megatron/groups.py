"""Process groups of one model, explicit: two models of different layouts can live in one process.

Megatron-core's global ``parallel_state`` is never initialised; whatever would ask it fails loudly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

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

    def coordinates(self, rank: int) -> dict[str, int]:
        """``{"tp", "dp", "pp", "etp", "ep", "expert_dp"}`` of a rank."""
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


def _peers(layout: ParallelLayout, rank: int, *same: str) -> list[int]:
    """Ranks that agree with ``rank`` in every coordinate named."""
    mine = layout.coordinates(rank)
    return [r for r in range(layout.world) if all(layout.coordinates(r)[c] == mine[c] for c in same)]


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
    def is_first_stage(self) -> bool:
        return self.coordinates["pp"] == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates["pp"] == self.layout.pp - 1


def create_groups(
    layout: ParallelLayout, *, ranks: Sequence[int] | None = None, timeout_s: float = 600.0, backend: str | None = None
) -> ModelGroups:
    """Create the groups of one model; called by every one of its ranks, for all models in the same order.

    Groups with the same members are created once (gloo starts threads for each). Only members take part.

    Args:
        layout: parallel sizes.
        ranks: global ranks of the model in order; all of the world by default.
        timeout_s: limit of every wait on these groups, in seconds.
        backend: ``"gloo"`` or ``"nccl"``; the default group's by default.

    Raises:
        ValueError: when the number of ranks is not the layout's, or this process is none of them.
    """
    members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    if len(members) != layout.world:
        raise ValueError(f"expected {layout.world} ranks for {layout}, got {len(members)}")
    if dist.get_rank() not in members:
        raise ValueError(f"rank {dist.get_rank()} is not one of the model's ranks {members}")
    rank = members.index(dist.get_rank())
    made: dict[tuple[int, ...], Any] = {}

    def group(local_ranks: list[int]) -> Any:
        key = tuple(local_ranks)
        if key not in made:
            made[key] = dist.new_group(
                [members[r] for r in key],
                timeout=timedelta(seconds=timeout_s),
                backend=backend,
                use_local_synchronization=True,
            )
        return made[key]

    def peers(*same: str) -> Any:
        return group(_peers(layout, rank, *same))

    first, last = 0, layout.pp - 1
    pipeline = _peers(layout, rank, "tp", "dp")
    ends = [pipeline[first]] if first == last else [pipeline[first], pipeline[last]]
    dp = peers("tp", "pp")
    expert_dp = peers("etp", "ep", "pp")
    # cp is 1: every group "with context parallelism" equals the one without.
    collection = compat.process_group_collection(
        tp=peers("dp", "pp"),
        cp=group([rank]),
        pp=peers("tp", "dp"),
        mp=peers("dp"),
        embd=group(ends) if rank in ends else None,
        pos_embd=group([pipeline[first]]) if rank == pipeline[first] else None,
        tp_cp=peers("dp", "pp"),
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
        intra_dist_opt=group(list(range(layout.world))),
        # 0.19 splits data parallelism once more, for rematerialised weights; unused here, so it is the same group.
        dp_cp_gtp_remat=dp,
        expt_dp_gtp_remat=expert_dp,
    )
    return ModelGroups(layout, rank, collection)
