"""The planner on a GPU: loads in, the plan as tensors out, bit for bit that of :func:`megatron_ultraep.plan.solve`.

1. ``Search``, a block for each node: the attempts of ``plan/search.py``, side by side, a warp each.
2. ``Fill``, a warp for each column: nodes that would wait for a busier one give their replicas back, quotas are split
   over source ranks, and the table that one source rank reroutes by is made.

No step is seen by the host: calls are launches on the current stream.

Legend: ``G`` ranks, ``E`` experts, ``D`` ranks of a node, ``R`` slots of a rank, ``P`` physical experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from megatron_ultraep.kernels.build import current_stream, library_of
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import Array, NodeDecision, Outcome, Plan, PlanSettings

# As in csrc/plan.h.
_DECISION = 6
_SEARCH_WARPS = 18
_FILL_WARPS = 4
_MOST_EXPERTS = 2**16
_MOST_RANKS = 2**15

_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)  # in the order of plan/search.py


class DevicePlan:
    """A plan as tensors on the device of the loads: views of one allocation, made when they are asked for.

    Attributes:
        replica_expert: int64 ``[G, R]``: the logical expert in each slot, -1 for an empty one.
        quota: int64 ``[G, P]``: tokens that each source rank sends to each physical expert.
        decisions: int64 ``[nodes, 6]``: outcome (as in ``plan/search.py``), before, after, bound, saved_ps, cost_ps.
        table: int32 ``[E, 3 + 2 D]``, by which one source rank reroutes: number of copies, its tokens (at least 1),
            their stride (1 where there is one copy), sums of its quotas over the copies ``[D]``, and the copies'
            physical ids ``[D]``; home first, then by rank. Entries beyond the number of copies are unspecified.
        told: int64 ``[n]``: the first three, one after the other, for the host; see :func:`to_plan`.
    """

    def __init__(self, layout: ExpertLayout, memory: Tensor) -> None:
        self.layout = layout
        self._memory = memory

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._memory.nbytes

    @cached_property
    def replica_expert(self) -> Tensor:
        layout = self.layout
        return self._memory.as_strided((layout.ranks, layout.slots), (layout.slots, 1), 0)

    @cached_property
    def quota(self) -> Tensor:
        physical = _physical(self.layout)
        return self._memory.as_strided((self.layout.ranks, physical), (physical, 1), _parts(self.layout)[0])

    @cached_property
    def decisions(self) -> Tensor:
        start = sum(_parts(self.layout)[:2])
        return self._memory.as_strided((_nodes(self.layout), _DECISION), (_DECISION, 1), start)

    @cached_property
    def told(self) -> Tensor:
        return self._memory[: sum(_parts(self.layout))]

    @cached_property
    def table(self) -> Tensor:
        experts, width = self.layout.experts, 3 + 2 * self.layout.node_size
        return self._memory.view(torch.int32).as_strided((experts, width), (width, 1), 2 * sum(_parts(self.layout)))


def _physical(layout: ExpertLayout) -> int:
    return layout.experts + layout.ranks * layout.slots


def _nodes(layout: ExpertLayout) -> int:
    return layout.ranks // layout.node_size


def _parts(layout: ExpertLayout) -> tuple[int, int, int]:
    """Elements of replica_expert, quota and decisions."""
    return layout.ranks * layout.slots, layout.ranks * _physical(layout), _nodes(layout) * _DECISION


class PlanKernel:
    """Plans on a device.

    Args:
        layout: homes, nodes and slots.
        settings: how to search.
        source: the rank whose table is made.
        device: where loads come from and plans go; on a CPU the same kernels run one thread at a time.

    Raises:
        ValueError: a source that is no rank of the layout, or a layout that the kernels have no room for.
        BuildError: the kernels could not be compiled.
    """

    def __init__(self, layout: ExpertLayout, settings: PlanSettings, source: int, device: torch.device) -> None:
        if not 0 <= source < layout.ranks:
            raise ValueError(f"expected a source rank from 0 to {layout.ranks - 1}, got {source}")
        if layout.experts > _MOST_EXPERTS or layout.ranks > _MOST_RANKS or layout.slots > _MOST_EXPERTS // 2:
            raise ValueError(
                f"plan kernels serve up to {_MOST_EXPERTS} experts, {_MOST_RANKS} ranks and {_MOST_EXPERTS // 2} slots "
                f"a rank, got {layout.experts} experts, {layout.ranks} ranks and {layout.slots} slots: plan on the CPU"
            )
        self.layout = layout
        self.device = device
        self._library = library_of(device)
        self._expert_at = torch.tensor(layout.expert_at, dtype=torch.int32, device=device)
        self._shape = (layout.experts, layout.ranks, layout.node_size, layout.slots)
        costs = settings.costs
        self._costs = (1, costs.token_ps, costs.replica_ps, costs.fixed_ps) if costs else (0, 0, 0, 0)
        self._search = (settings.min_tokens, settings.tolerance_ppm, *self._costs)
        self._source = source
        self._search_warps, self._fill_warps = self._warps()
        # Where replica_expert, quota, decisions, table (int32), the search's decisions and its replicas (int32) begin.
        table = -(-layout.experts * (3 + 2 * layout.node_size) // 2)
        sizes = (*_parts(layout), table, _nodes(layout) * _DECISION, layout.ranks * layout.slots)
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def __call__(self, loads: Tensor) -> DevicePlan:
        """Plan for exact loads; returns at once, on the current stream of the device.

        Args:
            loads: int64 ``[G, E]``, contiguous, on the device: tokens that each source rank routes to each logical
                expert. Counts made on the device are never negative, so they are not checked here; that
                ``ranks * tokens * topk`` is at most ``search.MOST_TOKENS`` is for the caller to check, on the host.

        Raises:
            ValueError: loads of another shape, type or device.
        """
        layout = self.layout
        shape = (layout.ranks, layout.experts)
        if loads.shape != shape or loads.dtype != torch.int64 or not loads.is_contiguous():
            raise ValueError(
                f"expected contiguous int64 loads {list(shape)}, got {loads.dtype} {list(loads.shape)} of strides "
                f"{loads.stride()}"
            )
        if loads.device.type != self.device.type or self.device.index not in (None, loads.device.index):
            raise ValueError(f"expected loads on {self.device}, got {loads.device}")
        # One allocation: the host is on the way to the next kernels, and each costs it microseconds.
        memory = loads.new_empty(self._starts[-1])
        address = memory.data_ptr()
        replica_expert, quota, decisions, table, decided, held = (address + 8 * start for start in self._starts[:-1])
        inputs = (loads.data_ptr(), self._expert_at.data_ptr(), decided, held)
        outputs = (replica_expert, quota, decisions, table)
        with _on(loads.device):
            stream = current_stream(loads.device)
            self._library("plan_search", *inputs, *self._shape, *self._search, self._search_warps, stream=stream)
            self._library(
                "plan_fill",
                *inputs,
                *outputs,
                *self._shape,
                self._source,
                self._costs[0],
                self._fill_warps,
                stream=stream,
            )
        return DevicePlan(layout, memory)

    def _warps(self) -> tuple[int, int]:
        """Warps of a block of either kernel, as many as there is shared memory for."""
        layout = self.layout
        sizes = torch.empty(4, dtype=torch.int64)
        shape = (layout.ranks, layout.node_size, layout.experts_per_rank, layout.slots)
        with _on(self.device):
            self._library("plan_sizes", *shape, sizes)
        block, search, fill, room = sizes.tolist()
        if block + search > room or fill > room:
            raise ValueError(
                f"plan kernels need {max(block + search, fill)} bytes of shared memory for nodes of "
                f"{layout.node_size} ranks with {layout.experts_per_rank} experts and {layout.slots} slots each, and "
                f"{self.device} has {room}: take smaller nodes or fewer slots, or plan on the CPU"
            )
        return min(_SEARCH_WARPS, (room - block) // search), min(_FILL_WARPS, room // fill)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device current, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def to_plan(layout: ExpertLayout, told: Array) -> Plan:
    """The plan that :func:`megatron_ultraep.plan.solve` would have returned, from the host's copy of a device plan.

    Args:
        layout: that of the kernel.
        told: int64 ``[n]``, :attr:`DevicePlan.told`; becomes the plan's, read-only.
    """
    replicas, quotas, _ = _parts(layout)
    decisions = told[replicas + quotas :].reshape(-1, _DECISION)
    made = tuple(NodeDecision(_OUTCOMES[outcome], *numbers) for outcome, *numbers in decisions.tolist())
    return Plan(
        layout,
        told[:replicas].reshape(layout.ranks, layout.slots),
        told[replicas : replicas + quotas].reshape(layout.ranks, -1),
        made,
    )
