"""The gate's constants, measured once on this machine and max-reduced, so that every rank has the same."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import Costs, Plan
from megatron_ultraep.runtime.layer import Experts
from megatron_ultraep.runtime.planning import HostPlanned
from megatron_ultraep.runtime.slots import SlotPool
from megatron_ultraep.runtime.transport import Homes, Transport

_REPEATS = 5
_TOKENS_BESIDE = 16384
_LEAST_EXPOSED = 0.1  # of a copy's own time: what is measured beside computing is a small difference of long times
_STANDSTILL = 30_000_000  # cycles: tens of milliseconds, more than the host takes to queue a forward and backward


class _MeasuredExperts(Experts, Protocol):
    """Experts that can be run on made-up tokens."""

    def try_tokens(self, tokens: int) -> None:
        """Forward and backward of one expert over this many tokens; leaves no gradient anywhere."""
        ...


def measure_costs(
    experts: _MeasuredExperts,
    pool: SlotPool,
    layout: ExpertLayout,
    transport: Transport,
    *,
    token_ns: int = 0,
    copy_ns_per_mib: int = 0,
) -> Costs:
    """What a token costs in the experts, and what copying a replica costs whoever computes meanwhile.

    Where the transport works beside the computing stream a copy costs what it slows computing down by; else all of its
    time.

    Args:
        experts: of one layer on this rank.
        pool: its slots.
        layout: homes and slots.
        transport: of the group; all ranks measure together.
        token_ns, copy_ns_per_mib: given constants; 0 measures.
    """
    element = torch.empty((), dtype=pool.shape.dtype).element_size()
    # Weights in forward, again in backward; gradients at least as wide as weights, usually fp32, once.
    replica_bytes = pool.shape.numel * (2 * element + max(4, element))
    token_ps, copy_ps = token_ns * 1000, copy_ns_per_mib * 1000 // 1024
    if not token_ps:
        # On a GPU as many as fill it: below that a token costs less than one more does later.
        small, large = (4096, 16384) if pool.shape.device.type == "cuda" else (256, 2048)
        seconds = [_best(functools.partial(experts.try_tokens, tokens), pool) for tokens in (small, large)]
        token_ps = max(1, round((seconds[1] - seconds[0]) / (large - small) * 1e12))
    if not copy_ps:
        copy_ps = _copy_ps_per_kib(experts, pool, layout, transport)
    mine = torch.tensor([token_ps, copy_ps], dtype=torch.int64, device=pool.shape.device)
    largest = transport.largest(mine)
    return Costs(token_ps=largest[0], copy_ps_per_kib=largest[1], replica_bytes=replica_bytes)


def _copy_ps_per_kib(experts: _MeasuredExperts, pool: SlotPool, layout: ExpertLayout, transport: Transport) -> int:
    """How long computing is held up by 1 KiB on its way from rank to rank (ps)."""
    # Every rank sends experts to the next rank of its node: all links busy, as in a real placement.
    copies = min(layout.slots, layout.experts_per_rank)
    ring = HostPlanned(_ring(layout, copies), pool.shape.device)
    homes = Homes(experts.home_parameters)

    # All begin together: the wait for a late sender is not the copy's. Whoever gathers loads places next.
    nothing = torch.zeros(layout.experts, dtype=torch.int64, device=pool.shape.device)

    def meet() -> None:
        transport.gather_loads(nothing, pool)

    def place(beside: Callable[[], None] = lambda: None) -> None:
        transport.place(ring, pool, homes)
        beside()
        transport.await_placed(ring, pool)
        transport.weights_sent(pool)

    experts.before_reading()
    seconds = _best(place, pool, meet)
    if transport.overlaps:
        # What travels beside computing takes some of its memory bandwidth and a few of its multiprocessors.
        work = functools.partial(experts.try_tokens, _TOKENS_BESIDE)
        alone = _best(work, pool)
        beside = _best(functools.partial(place, work), pool, meet)
        seconds = min(seconds, max(_LEAST_EXPOSED * seconds, beside - alone))
    pool.holder = None
    element = torch.empty((), dtype=pool.shape.dtype).element_size()
    return max(1, round(seconds * 1e12 / (copies * pool.shape.numel * element / 1024)))


def _ring(layout: ExpertLayout, copies: int) -> Plan:
    """Replicas on each rank: of the first experts of the rank before it in its node. No tokens."""
    replica_expert = np.full((layout.ranks, layout.slots), -1, dtype=np.int64)
    for rank in range(layout.ranks):
        first = rank // layout.node_size * layout.node_size
        following = first + (rank - first + 1) % layout.node_size
        replica_expert[following, :copies] = layout.experts_of(rank)[:copies]
    physical = layout.ranks * (layout.experts_per_rank + layout.slots)
    return Plan(layout, replica_expert, np.zeros((layout.ranks, physical), dtype=np.int64), ())


def _best(run: Callable[[], None], pool: SlotPool, first: Callable[[], None] = lambda: None) -> float:
    """Seconds of the fastest of a few runs, after one that warms up.

    Args:
        run: what is timed.
        pool: whose device it runs on.
        first: what is done before each run, untimed.
    """
    time_once = _seconds_on_gpu if pool.shape.device.type == "cuda" else _seconds
    return min([time_once(run, first) for _ in range(_REPEATS + 1)][1:])


def _seconds(run: Callable[[], None], first: Callable[[], None]) -> float:
    first()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _seconds_on_gpu(run: Callable[[], None], first: Callable[[], None]) -> float:
    """Time of the device alone: it stands still until the host has queued all of it."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_STANDSTILL)  # type: ignore[no-untyped-call]
    first()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
