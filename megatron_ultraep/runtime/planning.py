"""Where the plan of a micro-batch comes from, and what the rest of a layer sees of it.

Plans may be there before the micro-batch is (:class:`Foreseen`); else one of two planners makes them, equal bit for
bit:

- :class:`HostPlanner`: loads go to the host, :func:`megatron_ultraep.plan.solve` plans there. Works everywhere; on a
  GPU the host waits for the loads.
- :class:`DevicePlanner`: kernels on the device; the host waits for nothing, and learns the plan later, for telemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from megatron_ultraep.kernels import plan as plan_kernel
from megatron_ultraep.kernels import reroute as reroute_kernel
from megatron_ultraep.kernels.build import current_stream, library_of
from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan.foresight import StepPlan
from megatron_ultraep.plan.types import Plan, PlanSettings
from megatron_ultraep.runtime import reroute
from megatron_ultraep.runtime.slots import SlotPool
from megatron_ultraep.runtime.stopwatch import Stopwatch

Solver = Callable[[np.ndarray, ExpertLayout], Plan]


@dataclass(frozen=True)
class Filled:
    """What the host must know of a plan to leave out what the plan does not need.

    Attributes:
        replicas: of the whole group; where there is none, nothing travels.
        slots: of this rank, up to its last filled one; the others need not be computed.
    """

    replicas: int
    slots: int

    @staticmethod
    def of(layout: ExpertLayout, counts: torch.Tensor) -> Filled:
        """From the counts of a rank on the host; see :class:`Splits`."""
        last = 2 * layout.ranks + layout.experts_per_rank + layout.slots
        tokens = counts[last - layout.slots : last].tolist()
        return Filled(int(counts[-1]), max((slot + 1 for slot, some in enumerate(tokens) if some), default=0))


class Planned(Protocol):
    """One micro-batch of one layer, planned.

    Attributes:
        layout: homes, nodes, slots.
        replica_expert: int64 ``[G, R]`` on the device: the logical expert in each slot, -1 for an empty one.
        filled: None while the host has not learnt it. All ranks learn it, or none does.
    """

    layout: ExpertLayout
    filled: Filled | None

    @property
    def replica_expert(self) -> torch.Tensor: ...

    @property
    def plan(self) -> Plan:
        """The plan on the host; waits for it where it has to."""
        ...

    @property
    def bytes(self) -> int:
        """Memory of the device that it takes."""
        ...


class HostPlanned:
    """A plan made on the host.

    Args:
        plan: of the micro-batch.
        device: where tokens are.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.layout = plan.layout
        self.plan = plan
        self.filled: Filled | None = None
        self._device = device

    @cached_property
    def replica_expert(self) -> torch.Tensor:
        return torch.tensor(self.plan.replica_expert, device=self._device)

    @property
    def bytes(self) -> int:
        return 0


class DevicePlanned:
    """A plan made on the device; it goes to the host when somebody asks.

    Args:
        layout: it was made for.
        made: by the kernel.
    """

    def __init__(self, layout: ExpertLayout, made: plan_kernel.DevicePlan) -> None:
        self.layout = layout
        self.made = made
        self.filled: Filled | None = None

    @property
    def replica_expert(self) -> torch.Tensor:
        return self.made.replica_expert

    @property
    def quota(self) -> torch.Tensor:
        """int64 ``[G, P]`` on the device: tokens from each source rank to each physical expert."""
        return self.made.quota

    @property
    def bytes(self) -> int:
        return self.made.bytes

    @cached_property
    def plan(self) -> Plan:
        return plan_kernel.to_plan(self.layout, self.made.told.cpu().numpy())


class Splits:
    """What a rank's dispatcher counts, from the quotas of a plan. ``W = L + R`` physical experts of a rank.

    Args:
        planned: the plan.
        counts: int64 ``[2 G + W + G W + 1]``, where the tokens are: tokens sent to each rank, received from each rank,
            of each physical expert of this rank, and received for each by source rank ``[G, W]``; then the replicas of
            the whole group.
        host: the same on the host.
        event: of the device, after which ``host`` holds them; None: it does already.
    """

    def __init__(self, planned: Planned, counts: torch.Tensor, host: torch.Tensor, event: Any = None) -> None:
        self.counts = counts
        self._planned, self._host, self._event = planned, host, event

    def on_host(self) -> torch.Tensor:
        """``counts`` on the host, which waits for them; from now on it knows what is filled."""
        if self._event is not None:
            self._event.synchronize()
            self._event, self._host = None, self._host.clone()  # the memory is for the next plan
        if self._planned.filled is None:
            self._planned.filled = Filled.of(self._planned.layout, self._host)
        return self._host


class Foreseen:
    """One micro-batch of one layer, planned ahead.

    Args:
        key: of the micro-batch.
        step, microbatch, layer: where the plan comes from.
        replica_expert: int64 ``[G, R]`` on the device.
        table: int32 ``[E, 3 + 2 C]`` on the device: by what this rank reroutes.
        counts, host: see :class:`Splits`.
        seen: int64 ``[E]`` on the device: what this rank's router did is written there.
    """

    def __init__(
        self,
        key: MicroBatchKey,
        step: StepPlan,
        microbatch: int,
        layer: int,
        replica_expert: torch.Tensor,
        table: torch.Tensor,
        counts: torch.Tensor,
        host: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        self.key = key
        self.layout: ExpertLayout = step.layouts[layer]
        self.replica_expert, self.table, self.seen = replica_expert, table, seen
        self.counts, self.host = counts, host
        self.used = False
        self.filled: Filled | None = Filled.of(self.layout, host)
        self._where = (step, microbatch, layer)

    @property
    def bytes(self) -> int:
        return 0

    @cached_property
    def plan(self) -> Plan:
        step, microbatch, layer = self._where
        return step.plan(microbatch, layer)


class Aside:
    """Copies to the host that wait for what was there at the last mark, and for nothing that was queued after it.

    Args:
        device: GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._marked = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """What the current stream has queued so far may be copied."""
        self._marked.record()

    def follow(self) -> None:
        self.stream.wait_event(self._marked)


class PlanBatch:
    """Plans on their way to the host. Nobody waits, until somebody asks for them.

    Args:
        planned: in any order, of any layouts.
        aside: on GPUs, where they are copied: behind the newest plan, beside all that came after it.
    """

    def __init__(self, planned: Sequence[Planned], aside: Aside | None = None) -> None:
        self._kept = list(planned)  # their memory is read on another stream
        if aside is None:
            self._start(planned)
        else:
            aside.follow()
            with torch.cuda.stream(aside.stream):
                self._start(planned)

    def _start(self, planned: Sequence[Planned]) -> None:
        self._count = len(planned)
        self._plans = {i: each for i, each in enumerate(planned) if not isinstance(each, DevicePlanned)}
        waiting: dict[ExpertLayout, list[tuple[int, DevicePlanned]]] = {}
        for i, each in enumerate(planned):
            if isinstance(each, DevicePlanned):
                waiting.setdefault(each.layout, []).append((i, each))
        # Those of one layout go over together, into pinned memory.
        self._rows = [
            (layout, [i for i, _ in some], torch.stack([p.made.told for _, p in some]).to("cpu", non_blocking=True))
            for layout, some in waiting.items()
        ]
        self._event: Any = None
        if any(rows.is_pinned() for _, _, rows in self._rows):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def landed(self) -> bool:
        """Whether all have come; those that have are moved out of pinned memory."""
        if self._event is not None and self._event.query():
            self._event = None
            self._kept.clear()
            self._rows = [(layout, numbers, rows.clone()) for layout, numbers, rows in self._rows]
        return self._event is None

    def plans(self) -> list[Plan]:
        """The plans in the order of ``planned``; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        found = {i: each.plan for i, each in self._plans.items()}
        for layout, numbers, rows in self._rows:
            found |= {i: plan_kernel.to_plan(layout, row) for i, row in zip(numbers, rows.numpy(), strict=True)}
        return [found[i] for i in range(self._count)]


class Gatherer(Protocol):
    """The part of a transport that planners need; see :class:`megatron_ultraep.runtime.transport.Transport`."""

    def gather_loads(self, loads: torch.Tensor, pool: SlotPool) -> torch.Tensor: ...


class Planner(Protocol):
    """Plans micro-batches of the layers of one layout, and reroutes by the plan."""

    def plan(self, routing_map: torch.Tensor, gatherer: Gatherer, pool: SlotPool) -> Planned:
        """Plan on the exact loads of all ranks. Collective over the expert-parallel group.

        Args:
            routing_map: bool ``[tokens of this rank, logical experts]``.
            gatherer: of loads.
            pool: slots that the plan's replicas will be placed in next.
        """
        ...

    def follow(self, foreseen: Foreseen, routing_map: torch.Tensor) -> Planned:
        """Take a plan that was made ahead; communicates nothing.

        Args:
            foreseen: of this micro-batch; it is told what the router did.
            routing_map: as for :meth:`plan`.
        """
        ...

    def reroute(
        self, planned: Planned, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send each (token, expert) pair to a copy, for the last plan of :meth:`plan` or :meth:`follow`.

        Args:
            planned: that plan.
            probs: ``[tokens, logical experts]``, differentiable.
            routing_map: bool, the same shape.

        Returns:
            the same for physical experts.
        """
        ...

    def splits(self, planned: Planned) -> Splits:
        """What this rank's dispatcher counts, for the last plan of :meth:`plan` or :meth:`follow`."""
        ...


class HostPlanner:
    """Plans with :func:`megatron_ultraep.plan.solve` or any other function of loads.

    Args:
        layout: homes, nodes, slots.
        topk: experts per token.
        solve: from loads and layout to a plan; the same function on every rank.
        source: this rank in the expert-parallel group.
        watch: told where time goes.
    """

    def __init__(self, layout: ExpertLayout, topk: int, solve: Solver, source: int, watch: Stopwatch) -> None:
        self.layout = layout
        self.topk = topk
        self.solve = solve
        self._watch = watch
        self._source = source

    def plan(self, routing_map: torch.Tensor, gatherer: Gatherer, pool: SlotPool) -> Planned:
        with self._watch("loads"):
            loads = gatherer.gather_loads(routing_map.sum(0, dtype=torch.int64), pool).cpu().numpy()
        with self._watch("plan"):
            return HostPlanned(self.solve(loads, self.layout), routing_map.device)

    def follow(self, foreseen: Foreseen, routing_map: torch.Tensor) -> Planned:
        foreseen.seen.copy_(routing_map.sum(0))
        foreseen.used = True
        return foreseen

    def reroute(
        self, planned: Planned, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._watch("reroute"):
            table = torch.from_numpy(reroute.tables(planned.plan, self._source)).to(probs.device)
            return reroute.reroute(probs, routing_map, table, topk=self.topk, physical=_physical(self.layout))

    def splits(self, planned: Planned) -> Splits:
        if isinstance(planned, Foreseen):
            return Splits(planned, planned.counts, planned.host)
        host = torch.from_numpy(splits_of(planned.plan, self._source))
        return Splits(planned, host.to(planned.replica_expert.device, non_blocking=True), host)


class DevicePlanner:
    """Plans with kernels on the device of the tokens.

    Args:
        layout: homes, nodes, slots.
        settings: how to search.
        source: this rank in the expert-parallel group.
        device: of the tokens.
        watch: told where time goes.

    Raises:
        ValueError: a layout that the kernel cannot serve.
    """

    def __init__(
        self, layout: ExpertLayout, settings: PlanSettings, source: int, device: torch.device, watch: Stopwatch
    ) -> None:
        self.layout = layout
        self._kernel = plan_kernel.PlanKernel(layout, settings, source, device)
        self._source = source
        self._watch = watch
        self._before: torch.Tensor | None = None
        self._table: torch.Tensor | None = None
        self._told: torch.Tensor | None = None
        self._event: Any = None

    def plan(self, routing_map: torch.Tensor, gatherer: Gatherer, pool: SlotPool) -> Planned:
        with self._watch("loads"):
            counts = reroute_kernel.count(routing_map)
            loads = gatherer.gather_loads(counts.loads, pool)
        with self._watch("plan"):
            made = self._kernel(loads)
        self._before, self._table = counts.before, made.table
        return DevicePlanned(self.layout, made)

    def follow(self, foreseen: Foreseen, routing_map: torch.Tensor) -> Planned:
        with self._watch("loads"):
            counts = reroute_kernel.count(routing_map, foreseen.seen)
        foreseen.used = True
        self._before, self._table = counts.before, foreseen.table
        return foreseen

    def reroute(
        self, planned: Planned, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before, table = self._before, self._table
        self._before = self._table = None
        if before is None or table is None:
            raise RuntimeError("reroute without a plan: the stages of a balanced layer were called out of order")
        with self._watch("reroute"):
            return reroute_kernel.reroute(probs, routing_map, before, table, _physical(self.layout))

    def splits(self, planned: Planned) -> Splits:
        if isinstance(planned, Foreseen):
            return Splits(planned, planned.counts, planned.host)
        assert isinstance(planned, DevicePlanned)
        layout, device = self.layout, planned.replica_expert.device
        width = layout.experts_per_rank + layout.slots
        size = 2 * layout.ranks + width + layout.ranks * width + 1
        if self._told is None:
            self._told = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        counts = torch.empty(size, dtype=torch.int64, device=device)
        # The kernel writes to the host's memory itself: no copy, and no other stream.
        library_of(device)(
            "splits", layout.ranks, width, layout.slots, self._source, planned.quota, planned.replica_expert, counts,
            self._told, stream=current_stream(device),
        )  # fmt: skip
        if self._event is None:
            return Splits(planned, counts, counts)
        self._event.record()
        return Splits(planned, counts, self._told, self._event)


def splits_of(plan: Plan, source: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The counts of :class:`Splits`, int64 ``[2 G + W + G W + 1]``, for a rank of a plan on the host."""
    quota, ranks = plan.quota, plan.layout.ranks
    width = quota.shape[1] // ranks
    sent = quota[source].reshape(ranks, width).sum(1)
    received = quota[:, source * width : (source + 1) * width]
    replicas = np.array([np.count_nonzero(plan.replica_expert >= 0)])
    return np.concatenate((sent, received.sum(1), received.sum(0), received.ravel(), replicas))


def _physical(layout: ExpertLayout) -> int:
    return layout.ranks * (layout.experts_per_rank + layout.slots)
