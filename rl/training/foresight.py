"""Plans of the trainer's steps, made before they start: what the driver computes, and what a rank does with it.

Driver, from the histograms that samples carry and the layout of their batch:

    groups = expert_groups(layout, told)                    # what ranks told when they started
    loads = group_loads(groups, batch_layout, histograms, counted, topk=..., tp_size=...)
    pending = submit(foreseer, groups, homes, loads)        # solved in a process of its own
    plans = pending.result(timeout_s)                       # one StepPlan per expert-parallel group

Rank:

    with foreseen(balancer, plans, keys, samples, device):  # taken by key; checked at the end, before the optimizer
        ...

Free of Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.layout import BatchLayout, ExpertLayout, MicroBatchKey
from megatron_ultraep.megatron.attach import Balancer, moe_layers
from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.megatron.migrate import expert_parameters
from megatron_ultraep.plan.foresight import Foreseer, Histogram, PlanHandle, Rows, StepPlan, needed_counts, step_loads
from megatron_ultraep.plan.reorder import MovePlan, ReorderSettings, reorder
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.runtime.foresight import ForesightMismatch

Homes = Mapping[int, tuple[int, ...]]
"""``[experts]`` home slots by Megatron's layer number."""

_KIB_PER_MIB = 1024


@dataclass(frozen=True)
class RankBalance:
    """How one rank balances its experts, as the driver has to know it to plan with the same integers.

    Attributes:
        settings: what plans are made with, measured costs included.
        layouts: of each of the rank's MoE layers, by Megatron's layer number.
        moe_layer_of: index among all MoE layers of the model, by layer number; of all layers.
        expert_bytes: what one expert is: weights, main parameters and Adam's moments; 0 without MoE layers.
    """

    settings: PlanSettings
    layouts: Mapping[int, ExpertLayout]
    moe_layer_of: Mapping[int, int]
    expert_bytes: int


def rank_balance(balancer: Balancer, chunks: Sequence[torch.nn.Module], moe_layer_of: Mapping[int, int]) -> RankBalance:
    """What this rank tells its driver.

    Args:
        balancer: of the trained model.
        chunks: of that model.
        moe_layer_of: see :class:`RankBalance`.
    """
    layers = moe_layers(chunks)
    numbers = [int(layer.layer_number or 0) for layer in layers]
    return RankBalance(
        settings=balancer.settings,
        layouts={number: balancer.layout_of(number) for number in numbers},
        moe_layer_of=dict(moe_layer_of),
        expert_bytes=max((_expert_bytes(layer) for layer in layers), default=0),
    )


def _expert_bytes(layer: Any) -> int:
    parameters = expert_parameters(layer)
    experts = len({expert for expert, _ in parameters})
    return sum(p.numel() * _bytes_of_state(p.dtype) for p in parameters.values()) // max(1, experts)


def _bytes_of_state(dtype: torch.dtype) -> int:
    """Of one trained element: itself, its main parameter where that is a copy, and two moments."""
    if dtype == torch.float64:
        return 8 + 2 * 8
    return 4 + 2 * 4 if dtype == torch.float32 else 2 + 4 + 2 * 4


@dataclass(frozen=True)
class ExpertGroup:
    """One expert-parallel group of the trainer.

    Attributes:
        ranks: of the trainer, by expert-parallel rank.
        sources: ``(data-parallel rank, tensor-parallel rank)`` of each.
        numbers: Megatron's numbers of the MoE layers they hold, ascending.
        moe_layers: index of each among all MoE layers of the model.
        layout: of the layers as Megatron has them: their shape.
        settings: what the group plans with.
        expert_bytes: see :class:`RankBalance`.
    """

    ranks: tuple[int, ...]
    sources: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]
    moe_layers: tuple[int, ...]
    layout: ExpertLayout
    settings: PlanSettings
    expert_bytes: int

    def layouts(self, homes: Homes) -> list[ExpertLayout]:
        """Of each layer; those that ``homes`` does not name are as Megatron has them."""
        return [replace(self.layout, home_slot=homes[n]) if n in homes else self.layout for n in self.numbers]


def expert_groups(layout: ParallelLayout, told: Sequence[RankBalance]) -> tuple[ExpertGroup, ...]:
    """The expert-parallel groups that hold MoE layers, by their first rank.

    Args:
        layout: of the trainer; experts are not cut (``etp`` 1), as balancing demands.
        told: by every rank, in order.

    Raises:
        ValueError: ranks of a group that balance differently.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for rank in range(layout.world):
        where = layout.coordinates(rank)
        members.setdefault((where["pp"], where["expert_dp"]), []).append(rank)
    found = []
    for ranks in members.values():
        ranks.sort(key=lambda rank: layout.coordinates(rank)["ep"])
        first = told[ranks[0]]
        unlike = next(
            (r for r in ranks if (told[r].settings, told[r].layouts) != (first.settings, first.layouts)), None
        )
        if unlike is not None:
            raise ValueError(
                f"expected the ranks of an expert-parallel group to balance alike, got {first.settings} on rank "
                f"{ranks[0]} and {told[unlike].settings} on rank {unlike}"
            )
        if not first.layouts:
            continue
        numbers = tuple(sorted(first.layouts))
        places = [layout.coordinates(rank) for rank in ranks]
        found.append(
            ExpertGroup(
                ranks=tuple(ranks),
                sources=tuple((c["dp"], c["tp"]) for c in places),
                numbers=numbers,
                moe_layers=tuple(first.moe_layer_of[n] for n in numbers),
                layout=replace(first.layouts[numbers[0]], home_slot=()),
                settings=first.settings,
                expert_bytes=first.expert_bytes,
            )
        )
    return tuple(found)


# ------------------------------------------------------------------ loads and plans, on the driver


def counts_needed(groups: Sequence[ExpertGroup], batch: BatchLayout, tp_size: int) -> list[Rows]:
    """Runs of rows to be counted where they are held; none where sequence parallelism cuts no sample."""
    return sorted({rows for group in groups for rows in needed_counts(batch, group.sources, tp_size)})


def group_loads(
    groups: Sequence[ExpertGroup],
    batch: BatchLayout,
    histograms: Mapping[str, Histogram],
    counted: Mapping[Rows, Histogram],
    *,
    topk: int,
    tp_size: int,
) -> list[np.ndarray]:
    """Exact loads of each group in one pass over a batch: int64 ``[M, its MoE layers, G, E]`` each.

    Args:
        groups: of the trainer.
        batch: layout of the pass.
        histograms: int ``[MoE layers of the model, E]`` of every sample.
        counted: the same of the runs of rows that :func:`counts_needed` names.
        topk, tp_size: see ``plan.foresight.step_loads``, which says what is raised, too.
    """
    whole: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # pipeline stages see the same rows
    for group in groups:
        if group.sources not in whole:
            whole[group.sources] = step_loads(
                batch, histograms, group.sources, topk=topk, tp_size=tp_size, counted=counted
            )
    return [np.ascontiguousarray(whole[group.sources][:, list(group.moe_layers)]) for group in groups]


@dataclass(frozen=True, eq=False)
class StagePlans:
    """What a rank is given of a pass: its group's plans.

    Attributes:
        step: of the MoE layers of its pipeline stage; None on a stage without any.
        index: of each layer in it, by Megatron's layer number.
    """

    step: StepPlan | None = None
    index: Mapping[int, int] | None = None


@dataclass(frozen=True, eq=False)
class PassPlans:
    """The plans of one pass over a batch, of all expert-parallel groups."""

    groups: tuple[ExpertGroup, ...]
    steps: tuple[StepPlan, ...]

    def parts(self, world: int) -> tuple[list[StagePlans], list[int]]:
        """What to send: the distinct parts, and which of them each rank is given."""
        parts = [StagePlans()]
        of_rank = [0] * world
        for group, step in zip(self.groups, self.steps, strict=True):
            for rank in group.ranks:
                of_rank[rank] = len(parts)
            parts.append(StagePlans(step, {number: i for i, number in enumerate(group.numbers)}))
        return parts, of_rank

    @property
    def digest(self) -> str:
        """16 hex digits over homes, loads, replicas and quotas of all plans."""
        found = hashlib.blake2b(digest_size=8)
        for step in self.steps:
            found.update(np.array([layout.home_slot for layout in step.layouts], dtype="<i8").tobytes())
            for array in (step.loads, step.replica_expert, step.replica_quota):
                found.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        return found.hexdigest()


class PendingPlans:
    """Plans of a pass on their way from the planning processes."""

    def __init__(self, groups: tuple[ExpertGroup, ...], handles: Sequence[PlanHandle]) -> None:
        self._groups, self._handles = groups, handles

    def result(self, timeout_s: float) -> PassPlans:
        """The plans; waits at most so long for all of them. Raises what ``PlanHandle.result`` does."""
        deadline = time.monotonic() + timeout_s
        steps = [handle.result(max(0.0, deadline - time.monotonic())) for handle in self._handles]
        return PassPlans(self._groups, tuple(steps))


def submit(
    foreseer: Foreseer, groups: Sequence[ExpertGroup], homes: Homes, loads: Sequence[np.ndarray]
) -> PendingPlans:
    """Begin to plan a pass; does not wait.

    Args:
        foreseer: plans in processes of its own.
        groups: of the trainer.
        homes: where experts will be when the pass runs.
        loads: of each group, from :func:`group_loads`.
    """
    handles = [
        foreseer.submit(of_group, group.layouts(homes), group.settings)
        for group, of_group in zip(groups, loads, strict=True)
    ]
    return PendingPlans(tuple(groups), handles)


def choose_homes(
    groups: Sequence[ExpertGroup], homes: Homes, loads: Sequence[np.ndarray], *, move_ns_per_mib: int, horizon: int
) -> dict[int, MovePlan]:
    """Where experts should be for coming micro-batches, by Megatron's layer number; see ``plan.reorder``.

    Groups that hold the same layers (expert data parallelism) move alike, so their micro-batches count together.
    Without a gate, moves are taken to cost nothing.

    Args:
        groups, homes: as for :func:`submit`, homes as they are.
        loads: of each group, of all micro-batches that are to come.
        move_ns_per_mib: time that a link is held up by 1 MiB of an expert's state on its way to another node (ns);
            inside a node it is weighed like a copy.
        horizon: iterations for which such loads are expected.
    """
    together: dict[tuple[int, ...], list[int]] = {}
    for i, group in enumerate(groups):
        together.setdefault(group.numbers, []).append(i)
    found: dict[int, MovePlan] = {}
    for numbers, members in together.items():
        group = groups[members[0]]
        costs = [groups[i].settings.costs for i in members]
        gate = all(cost is not None for cost in costs)
        across = move_ns_per_mib * 1000 // _KIB_PER_MIB if gate else 0
        inside = min(across, max((cost.copy_ps_per_kib for cost in costs if cost is not None), default=0))
        settings = ReorderSettings(
            token_ps=max(cost.token_ps for cost in costs if cost is not None) if gate else 1,
            expert_bytes=group.expert_bytes,
            node_ps_per_kib=inside if gate else 0,
            cross_ps_per_kib=across,
            horizon=horizon,
        )
        of_members = np.concatenate([loads[i] for i in members])
        plans = reorder(of_members, group.layouts(homes), settings, plans=group.settings)
        found |= dict(zip(numbers, plans, strict=True))
    return found


# ------------------------------------------------------------------ on the ranks


@contextlib.contextmanager
def foreseen(
    balancer: Balancer | None,
    plans: StagePlans | None,
    keys: Sequence[MicroBatchKey],
    samples: Mapping[MicroBatchKey, Sequence[str]],
    device: torch.device,
) -> Iterator[None]:
    """Run a pass with plans that were made ahead; afterwards compare with them what routers did.

    Collective over all ranks of the trainer where plans are given: no rank goes on to the optimizer when any of them
    found a mismatch.

    Args:
        balancer: of the model.
        plans: of this rank; None plans every micro-batch on its exact loads.
        keys: of the pass, in order.
        samples: ids of each micro-batch on this rank, for errors.
        device: of the model.

    Raises:
        ForesightMismatch: on all ranks, when routers of any took other routes than were planned for; names micro-batch,
            layer and samples on the ranks that saw it.
    """
    if plans is None or balancer is None:
        yield
        return
    if plans.step is not None and plans.index is not None:
        balancer.foresee(plans.step, keys, plans.index, samples)
    found: ForesightMismatch | None = None
    try:
        yield
    except Exception as error:
        # A plan for other routes may have been impossible to follow: then that is what to say.
        try:
            balancer.end_foresight(check=True)
        except ForesightMismatch as mismatch:
            raise mismatch from error
        raise
    try:
        balancer.end_foresight(check=True)
    except ForesightMismatch as error:
        found = error
    wrong = torch.tensor(0 if found is None else dist.get_rank() + 1, device=device)
    dist.all_reduce(wrong, dist.ReduceOp.MAX)
    if found is not None:
        raise found
    if int(wrong):
        raise ForesightMismatch(
            f"routers of rank {int(wrong) - 1} did not take the routes that {keys[0]} and the micro-batches after it "
            "were planned for: see that rank's error"
        )
