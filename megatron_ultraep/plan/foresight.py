"""The plans of a whole step, from loads that are known before it starts.

:func:`step_loads` counts what every router will see, :func:`solve_step` plans every (micro-batch, layer) with the bits
of :func:`megatron_ultraep.plan.solve`, :meth:`StepPlan.for_rank` makes what one rank needs, small enough to ship, and
:class:`Foreseer` does the planning in a process of its own while something else runs.

Source: planning from replayed routes is ReLibra's and ForeMoE's idea; neither has published code.

Legend: ``M`` micro-batches, ``N`` MoE layers, ``G`` expert-parallel ranks, ``E`` logical experts, ``L = E / G`` homes
of a rank, ``R`` slots of a rank, ``W = L + R``, ``C`` most copies of an expert in the step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import quota, search
from megatron_ultraep.plan.loads import Histogram, Rows, needed_counts, step_loads
from megatron_ultraep.plan.types import Array, NodeDecision, Plan, PlanSettings, stride
from megatron_ultraep.processes import end_with_parent

__all__ = [
    "Foreseer",
    "Histogram",
    "PlanHandle",
    "RankPlans",
    "Rows",
    "StepPlan",
    "needed_counts",
    "solve_step",
    "step_loads",
]

Compact = npt.NDArray[np.integer]

TABLE_HEADER = 3
"""Columns of a reroute table before its quota sums; ``kernels.reroute`` has the same number."""


@dataclass(frozen=True, eq=False)
class RankPlans:
    """What one expert-parallel rank needs of a step's plans. Immutable, small, picklable.

    Attributes:
        layouts: of each MoE layer.
        replica_expert: int64 ``[M, N, G, R]``: the logical expert in each slot, -1 for an empty one.
        table: int32 ``[M, N, E, 3 + 2 C]``, what ``kernels.reroute`` reads: number of copies, max(1, tokens), stride
            (1 where there is one copy), quota sums ``[C]``, physical ids ``[C]``, home first, then by rank. Beyond the
            number of copies the sums stay at the tokens, and ids are -1.
        splits: int64 ``[M, N, 2 G + W + G W]``: tokens sent to each rank, received from each rank, of each physical
            expert of this rank, and received for each by source rank ``[G, W]``.
        loads: int32 ``[M, N, E]``: this rank's own loads, to be compared with what its routers do.
        replicas: int32 ``[M, N]``: replicas of the whole group.
    """

    layouts: tuple[ExpertLayout, ...]
    replica_expert: Array
    table: npt.NDArray[np.int32]
    splits: Array
    loads: npt.NDArray[np.int32]
    replicas: npt.NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(a.nbytes for a in (self.replica_expert, self.table, self.splits, self.loads, self.replicas))


class _Copies(NamedTuple):
    """All replicas of a step, sorted by micro-batch, layer, expert and rank; each field int64 ``[replicas]``.

    Attributes:
        microbatch, layer, expert, rank, slot: of the replica.
        column: which copy of its expert it is, from 1.
        home: rank of its home.
    """

    microbatch: Array
    layer: Array
    expert: Array
    rank: Array
    slot: Array
    column: Array
    home: Array


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Every plan of a step, compact: what is not said of a home follows from loads and replicas. Immutable, picklable.

    Attributes:
        layouts: of each MoE layer, all of one shape.
        loads: uint16 or int32 ``[M, N, G, E]``: the loads planned for.
        replica_expert: int16 or int32 ``[M, N, G, R]``: the logical expert in each slot, -1 for an empty one.
        replica_quota: uint16 or int32 ``[M, N, G, G R]``: tokens from each source rank to each slot.
        decisions: int32 ``[M, N, nodes, 4]``: outcome, before, after and bound of ``NodeDecision``.
        gate: int64 ``[M, N, nodes, 2]``: its ``saved_ps`` and ``cost_ps``.
    """

    layouts: tuple[ExpertLayout, ...]
    loads: Compact
    replica_expert: Compact
    replica_quota: Compact
    decisions: npt.NDArray[np.int32]
    gate: Array

    @property
    def microbatches(self) -> int:
        """M."""
        return int(self.loads.shape[0])

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(a.nbytes for a in (self.loads, self.replica_expert, self.replica_quota, self.decisions, self.gate))

    def plan(self, microbatch: int, layer: int) -> Plan:
        """One plan, with the bits of ``solve``.

        Raises:
            IndexError: no such micro-batch or layer.
        """
        layout = self.layouts[layer]
        loads = self.loads[microbatch, layer].astype(np.int64)
        replica_expert = self.replica_expert[microbatch, layer].astype(np.int64)
        ranks, homes, slots = layout.ranks, layout.experts_per_rank, layout.slots
        taken = self.replica_quota[microbatch, layer].astype(np.int64)
        filled = np.nonzero(replica_expert.ravel() >= 0)[0]
        at_home = loads.copy()
        for column in filled:  # a few; an expert may have several, so no fancy indexing
            at_home[:, replica_expert.ravel()[column]] -= taken[:, column]
        whole = np.concatenate(
            [
                at_home[:, quota.expert_at_array(layout)].reshape(ranks, ranks, homes),
                taken.reshape(ranks, ranks, slots),
            ],
            axis=2,
        )
        made = tuple(
            NodeDecision(quota.OUTCOMES[outcome], *numbers, *gate)
            for (outcome, *numbers), gate in zip(
                self.decisions[microbatch, layer].tolist(), self.gate[microbatch, layer].tolist(), strict=True
            )
        )
        return Plan(layout, replica_expert, whole.reshape(ranks, -1), made)

    @property
    def before(self) -> Array:
        """int64 ``[M, N]``: tokens of the busiest rank without replicas."""
        return self._busiest(1)

    @property
    def after(self) -> Array:
        """int64 ``[M, N]``: tokens of the busiest rank."""
        return self._busiest(2)

    @property
    def bound(self) -> Array:
        """int64 ``[M, N]``: mean of the busiest node, rounded up, below which no plan goes."""
        return self._busiest(3)

    def _busiest(self, column: int) -> Array:
        worst: Array = self.decisions[..., column].max(axis=2).astype(np.int64)
        return worst

    @cached_property
    def _copies(self) -> _Copies:
        layout = self.layouts[0]
        microbatch, layer, rank, slot = np.nonzero(self.replica_expert >= 0)
        expert = self.replica_expert[microbatch, layer, rank, slot].astype(np.int64)
        number = (microbatch * len(self.layouts) + layer) * layout.experts + expert
        order = np.argsort(number, kind="stable")  # ranks ascend already
        number = number[order]
        column = np.arange(len(number)) - np.searchsorted(number, number) + 1
        microbatch, layer, expert, rank, slot = (a[order] for a in (microbatch, layer, expert, rank, slot))
        home = self._home_slot[layer, expert] // layout.experts_per_rank
        return _Copies(microbatch, layer, expert, rank, slot, column, home)

    @cached_property
    def _home_slot(self) -> Array:
        return np.array([layout.home_slot for layout in self.layouts], dtype=np.int64)

    def for_rank(self, rank: int) -> RankPlans:
        """What one expert-parallel rank needs.

        Raises:
            ValueError: no such rank.
        """
        layout = self.layouts[0]
        if not 0 <= rank < layout.ranks:
            raise ValueError(f"expected an expert-parallel rank from 0 to {layout.ranks - 1}, got {rank}")
        loads = np.ascontiguousarray(self.loads[:, :, rank]).astype(np.int32)
        replicas = (self.replica_expert >= 0).sum(axis=(2, 3), dtype=np.int32)
        arrays = (
            self.replica_expert.astype(np.int64),
            self._table(rank, loads),
            self._splits(rank, loads),
            loads,
            replicas,
        )
        for array in arrays:
            array.setflags(write=False)
        return RankPlans(self.layouts, *arrays)

    def _sent(self, rank: int) -> Array:
        """int64 ``[replicas]``: tokens that a source rank sends to each of ``_copies``."""
        c = self._copies
        sent: Array = self.replica_quota[c.microbatch, c.layer, rank, c.rank * self.layouts[0].slots + c.slot]
        return sent.astype(np.int64)

    def _table(self, rank: int, loads: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        layout, c, sent = self.layouts[0], self._copies, self._sent(rank)
        homes, width = layout.experts_per_rank, layout.experts_per_rank + layout.slots
        most = 1 + int(c.column.max(initial=0))
        table = np.empty((*loads.shape, TABLE_HEADER + 2 * most), dtype=np.int32)
        until, ids = table[..., TABLE_HEADER : TABLE_HEADER + most], table[..., TABLE_HEADER + most :]
        table[..., 0] = 1
        table[..., 1] = np.maximum(1, loads)
        table[..., 2] = 1
        until[:] = loads[..., None]
        ids[..., 0] = self._home_slot // homes * width + self._home_slot % homes
        ids[..., 1:] = -1
        if len(c.expert):
            ids[c.microbatch, c.layer, c.expert, c.column] = c.rank * width + homes + c.slot
            last = np.append(c.column[1:] == 1, True)
            of_expert = c.microbatch[last], c.layer[last], c.expert[last]
            table[(*of_expert, 0)] = 1 + c.column[last]
            table[(*of_expert, 2)] = stride(loads[of_expert].astype(np.int64))
            # The sum up to a copy is the tokens less those of the copies behind it.
            sums = np.cumsum(sent)
            behind = sums[last][np.cumsum(c.column == 1) - 1] - sums + sent
            until[c.microbatch, c.layer, c.expert, c.column - 1] -= behind.astype(np.int32)
        return table

    def _splits(self, rank: int, loads: npt.NDArray[np.int32]) -> Array:
        layout, c = self.layouts[0], self._copies
        ranks, homes, slots = layout.ranks, layout.experts_per_rank, layout.slots
        at_home = np.take_along_axis(loads, np.argsort(self._home_slot, axis=1)[None], axis=2)
        sent = at_home.reshape(*loads.shape[:2], ranks, homes).sum(axis=3, dtype=np.int64)
        sent += self.replica_quota[:, :, rank].reshape(*loads.shape[:2], ranks, slots).sum(axis=3, dtype=np.int64)
        np.subtract.at(sent, (c.microbatch, c.layer, c.home), self._sent(rank))

        received = np.empty((*loads.shape[:2], ranks, homes + slots), dtype=np.int64)
        for layer, of_layer in enumerate(self.layouts):
            received[:, layer, :, :homes] = self.loads[:, layer][:, :, list(of_layer.experts_of(rank))]
        received[..., homes:] = self.replica_quota[..., rank * slots : (rank + 1) * slots]
        lent = np.nonzero(c.home == rank)[0]
        column = c.rank[lent] * slots + c.slot[lent]
        place = self._home_slot[c.layer[lent], c.expert[lent]] % homes
        np.subtract.at(
            received.transpose(0, 1, 3, 2),
            (c.microbatch[lent], c.layer[lent], place),
            self.replica_quota[c.microbatch[lent], c.layer[lent], :, column].astype(np.int64),
        )
        return np.concatenate(
            [sent, received.sum(axis=3), received.sum(axis=2), received.reshape(*loads.shape[:2], -1)], axis=2
        )


def solve_step(
    loads: Array, layouts: Sequence[ExpertLayout], settings: PlanSettings | None = None, *, threads: int | None = None
) -> StepPlan:
    """Plan every (micro-batch, layer) of a step; each plan has the bits of ``solve``.

    Args:
        loads: int64 ``[M, N, G, E]``, from :func:`step_loads`; kept unchanged.
        layouts: of each MoE layer; homes may differ, nothing else.
        settings: as for ``solve``.
        threads: that plan side by side; None: one for each core of this process. The result does not depend on it.

    Raises:
        ValueError: loads that ``solve`` refuses, naming micro-batch and layer, or that do not fit the layouts.
    """
    settings = settings or PlanSettings()
    layout = _check_step(loads, layouts)
    microbatches, layers, ranks, experts = loads.shape
    homes, slots, nodes = layout.experts_per_rank, layout.slots, ranks // layout.node_size
    loads = np.ascontiguousarray(loads)
    solver, costs = search.compiled(), quota.costs_array(settings)
    kept = np.empty(loads.shape, dtype=_smallest(loads))
    replica_expert = np.empty((microbatches, layers, ranks, slots), dtype=np.int16 if experts < 2**15 else np.int32)
    # Where a source's loads fit 16 bits its quotas do.
    replica_quota = np.empty((microbatches, layers, ranks, ranks * slots), dtype=kept.dtype)
    decisions = np.empty((microbatches, layers, nodes, 4), dtype=np.int32)
    gate = np.empty((microbatches, layers, nodes, 2), dtype=np.int64)

    def solve_layer(layer: int) -> None:
        expert_at = quota.expert_at_array(layouts[layer])
        for microbatch in range(microbatches):
            exact = loads[microbatch, layer]
            valid, slot_expert, whole, decided = solver(
                exact, expert_at, ranks, layout.node_size, slots, settings.min_tokens, settings.tolerance_ppm, costs
            )
            if valid != search.VALID:
                raise ValueError(f"micro-batch {microbatch}, MoE layer {layer}: {quota.complaint(exact, valid)}")
            kept[microbatch, layer] = exact
            replica_expert[microbatch, layer] = slot_expert
            replica_quota[microbatch, layer] = whole.reshape(ranks, ranks, homes + slots)[:, :, homes:].reshape(
                ranks, -1
            )
            decisions[microbatch, layer] = decided[:, :4]
            gate[microbatch, layer] = decided[:, 4:]

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(solve_layer, range(layers)))
    if settings.costs is not None:
        _spare_idle_nodes(layout, replica_expert, replica_quota, decisions, gate)
    for array in (kept, replica_expert, replica_quota, decisions, gate):
        array.setflags(write=False)
    return StepPlan(tuple(layouts), kept, replica_expert, replica_quota, decisions, gate)


def _spare_idle_nodes(
    layout: ExpertLayout, replica_expert: Compact, replica_quota: Compact, decisions: npt.NDArray[np.int32], gate: Array
) -> None:
    """What ``solve`` does of the same name, for all plans; in place."""
    balanced, kept_off = search.BALANCED, search.GAIN_BELOW_COST
    slowest = decisions[..., 2].max(axis=2, keepdims=True)
    spared = (decisions[..., 0] == balanced) & (decisions[..., 1] <= slowest)
    by_rank = np.repeat(spared, layout.node_size, axis=2)
    replica_expert[by_rank] = -1
    by_column = np.repeat(by_rank, layout.slots, axis=2)
    replica_quota[np.broadcast_to(by_column[:, :, None], replica_quota.shape)] = 0
    decisions[spared, 0] = kept_off
    decisions[spared, 2] = decisions[spared, 1]
    gate[spared] = 0


def _check_step(loads: Array, layouts: Sequence[ExpertLayout]) -> ExpertLayout:
    """Refuse what does not fit; returns the layout of the first layer."""
    if not isinstance(loads, np.ndarray) or loads.dtype != np.int64 or loads.ndim != 4:
        what = f"{loads.dtype} {list(loads.shape)}" if isinstance(loads, np.ndarray) else type(loads).__name__
        raise ValueError(
            f"expected int64 loads [micro-batches, MoE layers, ranks, experts], got {what}: count them with step_loads"
        )
    if not layouts or len(layouts) != loads.shape[1]:
        raise ValueError(f"expected one layout per MoE layer, got {len(layouts)} layouts for {loads.shape[1]} layers")
    first = layouts[0]
    shape = (first.experts, first.ranks, first.node_size, first.slots)
    for layer, layout in enumerate(layouts):
        if (layout.experts, layout.ranks, layout.node_size, layout.slots) != shape:
            raise ValueError(f"expected layouts of one shape, got {first} for MoE layer 0 and {layout} for {layer}")
    if loads.shape[2:] != (first.ranks, first.experts):
        raise ValueError(
            f"expected loads of [ranks, experts] = [{first.ranks}, {first.experts}], got {list(loads.shape[2:])}"
        )
    return first


def _smallest(values: Array) -> npt.DTypeLike:
    return np.uint16 if values.max(initial=0) < 2**16 and values.min(initial=0) >= 0 else np.int32


class PlanHandle:
    """A step's plans on their way from a :class:`Foreseer`."""

    def __init__(self, future: Future[StepPlan], what: str) -> None:
        self._future, self._what = future, what

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return self._future.done()

    def result(self, timeout_s: float) -> StepPlan:
        """The plans; waits for them.

        Args:
            timeout_s: longest wait (s).

        Raises:
            TimeoutError: not planned in time.
            ValueError: loads or layouts that :func:`solve_step` refuses, with its message.
            RuntimeError: the planning process is gone.
        """
        try:
            return self._future.result(timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"waited {timeout_s} s for {self._what} from the planning process, which has not sent them: give it "
                "more time or cores, or plan from exact loads"
            ) from error
        except (BrokenExecutor, CancelledError) as error:
            raise RuntimeError(
                f"expected {self._what} from the planning process, which has ended or was closed: see its last words "
                f"above, memory first ({error})"
            ) from error


class Foreseer:
    """Plans steps in background processes, while rollout or the previous step runs; a context manager.

    Args:
        processes: that plan, each a step at a time; started once, when the foreseer is made.
        threads: of each process, see :func:`solve_step`.
    """

    def __init__(self, processes: int = 1, threads: int | None = None) -> None:
        if processes < 1:
            raise ValueError(f"expected processes >= 1, got {processes}")
        # Spawned: this process may hold CUDA, threads and process groups.
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent)
        self._threads = threads
        for _ in range(processes):
            self._pool.submit(_warm_up)  # the first step need not wait for imports and compilation

    def submit(self, loads: Array, layouts: Sequence[ExpertLayout], settings: PlanSettings | None = None) -> PlanHandle:
        """Begin to plan a step; arguments as for :func:`solve_step`. Does not wait.

        Raises:
            ValueError: see :func:`solve_step`.
            RuntimeError: closed, or its process is gone.
        """
        _check_step(loads, layouts)
        fits = loads.size == 0 or max(int(loads.max()), -int(loads.min())) < 2**31
        sent = loads.astype(_smallest(loads)) if fits else loads  # those that do not fit are refused there
        what = f"the plans of {loads.shape[0]} micro-batches x {loads.shape[1]} MoE layers"
        try:
            future = self._pool.submit(_solve_sent, sent, tuple(layouts), settings, self._threads)
        except (BrokenExecutor, RuntimeError) as error:
            raise RuntimeError(
                f"expected a planning process to make {what}, it has ended or was closed: {error}"
            ) from error
        return PlanHandle(future, what)

    def close(self, timeout_s: float = 60.0) -> None:
        """End the processes; what has not begun is given up.

        Raises:
            TimeoutError: a process still plans after ``timeout_s`` (s).
        """
        ending = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ending.start()
        ending.join(timeout_s)
        if ending.is_alive():
            raise TimeoutError(f"waited {timeout_s} s for the planning process to end; it still plans a step")

    def __enter__(self) -> Foreseer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _warm_up() -> None:
    search.compiled()


def _solve_sent(
    sent: Compact, layouts: tuple[ExpertLayout, ...], settings: PlanSettings | None, threads: int | None
) -> StepPlan:
    return solve_step(sent.astype(np.int64), layouts, settings, threads=threads)
