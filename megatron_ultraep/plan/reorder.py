"""Which rank is home to which expert in the coming step, so that nodes are balanced for it; nothing moves for nothing.

Replicas balance the ranks of a node in every micro-batch (:func:`megatron_ultraep.plan.solve`), but never leave it, so
a micro-batch is as slow as the mean of its busiest node. Homes change between steps only, with weights and optimizer
states: they have to suit all micro-batches of the step at once. :func:`reorder` chooses them, layer by layer, so that::

    horizon * token_ps * (sum over micro-batches of the predicted tokens of the busiest rank) + time of the moves

is least. Predicted is the mean of the busiest node where there are slots, which replicas come within their tolerance
of, and what slots cannot reach (:mod:`megatron_ultraep.plan.reorder_ranks`, step 3); the busiest rank itself where
there are none. Where it is known how the step will be planned, the planner itself is asked about nodes that slots may
not reach, and their homes are repaired (:mod:`megatron_ultraep.plan.reorder_repair`).

Invariants, whatever the loads:

1. The moves of a layer take less time than they are predicted to save within ``horizon`` steps, or there are none.
2. Every rank keeps its number of homes. An expert that stays on its rank keeps its slot; those that move take the slots
   that were left.
3. The same arguments give the same bits, on any rank and any machine.

Source: reordering for replayed routes is ReLibra's and ForeMoE's idea; LPT is Graham's; the search is our own
(:mod:`megatron_ultraep.plan.reorder_search`, then :mod:`megatron_ultraep.plan.reorder_ranks` and
:mod:`megatron_ultraep.plan.reorder_repair`).

Legend: ``M`` micro-batches, ``N`` MoE layers, ``G`` ranks, ``E`` logical experts, ``D`` ranks of a node.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import reorder_ranks, reorder_repair, reorder_search
from megatron_ultraep.plan.reorder_search import Floats
from megatron_ultraep.plan.search import MOST_TOKENS
from megatron_ultraep.plan.types import Array, PlanSettings

_EXACT_BITS = 52  # integers that float64 holds, with a bit to spare


@dataclass(frozen=True)
class ReorderSettings:
    """Integer costs of reordering; the same on every rank.

    Attributes:
        token_ps: time one more token costs the busiest rank, forward and backward (ps).
        expert_bytes: what moves with an expert: weights, main parameters, moments.
        node_ps_per_kib: time that a link is held up by 1 KiB to a rank of the same node (ps); less than the bare
            transfer where moves are overlapped.
        cross_ps_per_kib: the same to a rank of another node (ps).
        horizon: steps for which the loads are expected to hold.
        rounds: how long the search goes on: most times that every home looks for a swap.

    Raises:
        ValueError: fields that are no integers or out of range.
    """

    token_ps: int
    expert_bytes: int
    node_ps_per_kib: int
    cross_ps_per_kib: int
    horizon: int = 1
    rounds: int = 3

    def __post_init__(self) -> None:
        limits = {
            "token_ps": (0, 4 * 10**9),
            "expert_bytes": (0, 2**45),
            "node_ps_per_kib": (0, 10**9),
            "cross_ps_per_kib": (0, 10**9),
            "horizon": (1, 2**10),
            "rounds": (0, 1000),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(
                    f"ReorderSettings.{name} must be an integer from {least} to {most}, got {value!r}: check the unit"
                )
            object.__setattr__(self, name, int(value))

    def move_ps(self, ranks: int, *, across: bool) -> int:
        """Time of one expert's move (ps), rounded up: moves spread over the links of all ranks."""
        per_kib = self.cross_ps_per_kib if across else self.node_ps_per_kib
        return -(-self.expert_bytes * per_kib // (1024 * ranks))


@dataclass(frozen=True)
class MovePlan:
    """What changes in one layer between two steps.

    Attributes:
        before, layout: homes as they are, and as they will be; equal where nothing moves.
        bytes_in_node, bytes_across: moved inside nodes and between them.
        move_ps: time of the moves (ps).
        before_ps, after_ps: time of the layer in one step, predicted for the homes as they are and as they will be
            (ps, computing alone); by the planner itself where it was asked about the homes.
    """

    before: ExpertLayout
    layout: ExpertLayout
    bytes_in_node: int
    bytes_across: int
    move_ps: int
    before_ps: int
    after_ps: int

    @cached_property
    def moves(self) -> tuple[tuple[int, int, int], ...]:
        """``(expert, from rank, to rank)`` of every expert that changes its rank, by expert."""
        old, new = _ranks(self.before), _ranks(self.layout)
        return tuple((int(e), int(old[e]), int(new[e])) for e in np.nonzero(old != new)[0])


def reorder(
    loads: Array,
    layouts: Sequence[ExpertLayout],
    settings: ReorderSettings,
    *,
    plans: PlanSettings | None = None,
    threads: int | None = None,
) -> list[MovePlan]:
    """Choose the homes of every layer for the coming step.

    Args:
        loads: int64 ``[M, N, G, E]``, from ``foresight.step_loads``, or ``[N, G, E]``, summed over micro-batches, which
            balances the sum only.
        layouts: of each MoE layer, as they are.
        settings: costs.
        plans: with which :func:`megatron_ultraep.plan.foresight.solve_step` will plan the step, to repair nodes that it
            could not balance; None leaves them.
        threads: that plan side by side; None: one for each core of this process. The result does not depend on it.

    Returns:
        One plan per MoE layer.

    Raises:
        ValueError: loads that are no int64 array of that shape, negative or too many, or that do not fit the layouts.
    """
    loads = _check(loads, layouts)

    def of_layer(layer: int) -> MovePlan:
        return _reorder_layer(_totals(loads, layer), layouts[layer], settings, plans)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(of_layer, range(len(layouts))))


def _reorder_layer(
    tokens: Floats, layout: ExpertLayout, settings: ReorderSettings, plans: PlanSettings | None
) -> MovePlan:
    """The plan of one layer; ``tokens``: float64 ``[E, M]``, integers."""
    part_ranks = layout.node_size if layout.slots else 1
    parts = layout.ranks // part_ranks
    node = np.arange(parts) * part_ranks // layout.node_size
    costs = [settings.move_ps(layout.ranks, across=across) for across in (False, True)]
    price = np.where(node[:, None] == node[None, :], costs[0], costs[1]).astype(np.float64) * part_ranks
    np.fill_diagonal(price, 0)
    home_slot = np.asarray(layout.home_slot, dtype=np.int64)
    weight, shift = float(settings.token_ps * settings.horizon), float(_shift(tokens))
    part = reorder_search.compiled()(
        tokens, home_slot, layout.experts_per_rank, part_ranks, price, weight, shift, settings.rounds
    )
    placed, before, after = reorder_ranks.compiled()(
        tokens,
        home_slot,
        part,
        layout.experts_per_rank,
        part_ranks,
        layout.slots,
        price,
        float(costs[0] * part_ranks),
        weight,
        shift,
    )
    placed = _in_old_slots(placed, home_slot, layout.experts_per_rank)
    if plans is not None and layout.slots:
        placed, before, after = _repaired(tokens, layout, placed, (before, after), settings, plans)
    new = layout
    if not np.array_equal(placed, home_slot):
        new = ExpertLayout(layout.experts, layout.ranks, tuple(placed.tolist()), layout.node_size, layout.slots)
    inside, across = _moved(home_slot, placed, layout)
    return MovePlan(
        before=layout,
        layout=new,
        bytes_in_node=inside * settings.expert_bytes,
        bytes_across=across * settings.expert_bytes,
        move_ps=inside * costs[0] + across * costs[1],
        before_ps=settings.token_ps * int(before) // part_ranks,
        after_ps=settings.token_ps * int(after) // part_ranks,
    )


def _repaired(
    tokens: Floats,
    layout: ExpertLayout,
    placed: Array,
    predicted: tuple[float, float],
    settings: ReorderSettings,
    plans: PlanSettings,
) -> tuple[Array, float, float]:
    """Home slots ``[E]`` and predictions, before and after, with nodes repaired; unchanged where that does not pay.

    Predictions are tokens of the busiest node, summed over micro-batches.
    """
    home_slot = np.asarray(layout.home_slot, dtype=np.int64)
    token_ps = settings.token_ps * settings.horizon
    inside_ps, across_ps = (settings.move_ps(layout.ranks, across=across) for across in (False, True))
    found = reorder_repair.repair(tokens, home_slot, placed, layout, plans, token_ps, inside_ps)
    if found is None:
        return placed, *predicted
    # What the planner said of the present homes is better known than what was predicted.
    before = found.before * layout.node_size if np.array_equal(placed, home_slot) else int(predicted[0])
    after = found.after * layout.node_size
    repaired = _in_old_slots(found.home_slot, home_slot, layout.experts_per_rank)
    inside, across = _moved(home_slot, repaired, layout)
    if token_ps * (before - after) <= layout.node_size * (inside * inside_ps + across * across_ps):
        return placed, *predicted
    return repaired, before, after


def _in_old_slots(placed: Array, origin: Array, homes: int) -> Array:
    """int64 ``[E]``: every expert on its rank, those that stay in their old slots; searches mix slots."""
    rank = placed // homes
    stays = rank == origin // homes
    slots = np.where(stays, origin, -1)
    come = np.nonzero(~stays)[0]
    free = np.ones(len(origin), dtype=np.bool_)
    free[origin[stays]] = False
    slots[come[np.argsort(rank[come], kind="stable")]] = np.nonzero(free)[0]  # as many in a rank as come to it
    return slots


def _moved(old: Array, new: Array, layout: ExpertLayout) -> tuple[int, int]:
    """Experts that change their rank inside a node, and across."""
    old_rank, new_rank = old // layout.experts_per_rank, new // layout.experts_per_rank
    across = int(np.count_nonzero(old_rank // layout.node_size != new_rank // layout.node_size))
    return int(np.count_nonzero(old_rank != new_rank)) - across, across


def _shift(tokens: Floats) -> int:
    """Power of two by which tokens are divided so that sums of squares over micro-batches stay exact."""
    microbatches = tokens.shape[1]
    largest = int(tokens.sum(axis=0).max(initial=0))
    most = 1 << (_EXACT_BITS - 2 - microbatches.bit_length()) // 2
    return int(1 << max(0, (largest // most).bit_length()))


def _check(loads: Array, layouts: Sequence[ExpertLayout]) -> Array:
    """The loads as ``[M, N, G, E]``; refuses what does not fit."""
    if not isinstance(loads, np.ndarray) or loads.dtype != np.int64 or loads.ndim not in (3, 4):
        what = f"{loads.dtype} {list(loads.shape)}" if isinstance(loads, np.ndarray) else type(loads).__name__
        raise ValueError(
            f"expected int64 loads [(micro-batches,) MoE layers, ranks, experts], got {what}: count by step_loads"
        )
    if loads.ndim == 3:
        loads = loads[None]
    if len(layouts) != loads.shape[1]:
        raise ValueError(f"expected one layout per MoE layer, got {len(layouts)} layouts for {loads.shape[1]} layers")
    for layer, layout in enumerate(layouts):
        if loads.shape[2:] != (layout.ranks, layout.experts):
            raise ValueError(
                f"expected loads of [ranks, experts] = [{layout.ranks}, {layout.experts}] for MoE layer {layer}, got "
                f"{list(loads.shape[2:])}"
            )
    return loads


def _totals(loads: Array, layer: int) -> Floats:
    """float64 ``[E, M]``: tokens of each expert of a layer, integers."""
    totals: Array = loads[:, layer].sum(axis=1)
    # A single load first: sums of larger ones might have wrapped.
    if loads[:, layer].max(initial=0) > MOST_TOKENS or totals.sum(axis=1).max(initial=0) > MOST_TOKENS:
        raise ValueError(
            f"expected at most {MOST_TOKENS} tokens in a micro-batch, got more in MoE layer {layer}: check that loads "
            "are tokens of micro-batches"
        )
    if totals.min(initial=0) < 0:
        raise ValueError(f"expected loads >= 0, got fewer in MoE layer {layer}: count routed tokens")
    return np.ascontiguousarray(totals.T).astype(np.float64)


def _ranks(layout: ExpertLayout) -> Array:
    ranks: Array = np.asarray(layout.home_slot, dtype=np.int64) // layout.experts_per_rank
    return ranks
