"""What a rank of the speed benchmarks does: force routes, time iterations, profile one.

Routes are forced through routing replay, as in the RL loop: probabilities still come from the router's logits, so the
router, the probabilities and their gradients are real. Keys are set once and used again and again.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.plan.generator import draw_routes, expert_weights
from megatron_ultraep.replay.trace import RoutingTrace
from scripts.bench_subject import Keys, Shape, Subject, device, synchronize

GIB = 2**30
_STANDSTILL = 40_000_000  # cycles: 20 to 30 ms, more than the host takes to queue the backward of a layer


@dataclass(frozen=True)
class Routes:
    """Routes that iterations go through in turn.

    Attributes:
        keys: of each iteration's micro-batches.
        loads: int64 ``[micro-batches of all iterations, layers, ranks, experts]``.
        imbalance: max / mean over ranks of the tokens computed, mean over micro-batches and layers, unbalanced.
    """

    keys: tuple[Keys, ...]
    loads: np.ndarray
    imbalance: float


def set_routes(subject: Subject, name: str, draw: Callable[[int], np.ndarray]) -> Routes:
    """Set the routes of this rank, a draw for each (iteration, micro-batch, layer). Collective.

    Args:
        name: of these routes; what keys call the model.
        draw: from the number of a draw to ``[tokens of this rank, topk]``; numbers count layers fastest.
    """
    shape, numbers = subject.shape, itertools.count()
    counts, keys = [], []
    for step in range(shape.draws):
        mine = tuple(MicroBatchKey(name, "train", step, i) for i in range(shape.micro_batches))
        for key in mine:
            routes = np.stack([draw(next(numbers)) for _ in range(shape.layers)]).astype(np.int64)
            counts += [np.bincount(layer.ravel(), minlength=shape.experts) for layer in routes]
            subject.replay.set(key, torch.from_numpy(routes))
        keys.append(mine)
    mine_of_all = torch.from_numpy(np.stack(counts)).to(device())
    of_ranks = [torch.empty_like(mine_of_all) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine_of_all)
    loads = torch.stack(of_ranks, dim=1).cpu().numpy()
    on_ranks = loads.sum(1).reshape(len(counts), dist.get_world_size(), -1).sum(-1)
    imbalance = float((on_ranks.max(1) / on_ranks.mean(1)).mean())
    return Routes(tuple(keys), loads.reshape(-1, shape.layers, *loads.shape[1:]), imbalance)


def foresee(balancer: Any, routes: Routes) -> None:
    """Plan all micro-batches of all iterations ahead; their plans stay, since iterations come again."""
    from megatron_ultraep.plan.foresight import solve_step

    layers = range(routes.loads.shape[1])
    step = solve_step(routes.loads, [balancer.layout_of(n + 1) for n in layers], balancer.settings)
    keys = [key for iteration in routes.keys for key in iteration]
    balancer.foresee(step, keys, {n + 1: n for n in layers})


def generated(subject: Subject, imbalance: float, seed: int = 0) -> Routes:
    """Routes of the load generator.

    Raises:
        ValueError: an imbalance that this many ranks cannot have.
    """
    shape = subject.shape
    weights = expert_weights(dist.get_world_size(), shape.experts, shape.topk, imbalance)

    def draw(number: int) -> np.ndarray:
        return draw_routes(weights, shape.tokens, shape.topk, np.random.default_rng([seed, number, dist.get_rank()]))

    return set_routes(subject, f"imbalance-{imbalance}", draw)


def recorded(subject: Subject, path: str) -> Routes:
    """Routes of a trace, its rows taken cyclically: each rank its own.

    Raises:
        ValueError: a trace of another number of experts or top-k, or of fewer rows than a micro-batch.
    """
    trace, shape = RoutingTrace.load(path), subject.shape
    if (trace.experts, trace.topk) != (shape.experts, shape.topk):
        raise ValueError(
            f"the trace has {trace.experts} experts, top-{trace.topk}; the layer has {shape.experts}, "
            f"top-{shape.topk}: give --experts and --topk"
        )
    rows = np.concatenate([sample.routes for sample in trace.samples])

    def draw(number: int) -> np.ndarray:
        micro_batch, layer = divmod(number, shape.layers)
        first = (micro_batch * dist.get_world_size() + dist.get_rank()) * shape.tokens
        return rows[np.arange(first, first + shape.tokens) % len(rows), layer % trace.moe_layers]

    return set_routes(subject, "trace", draw)


@dataclass
class Block:
    """Timed iterations of one method.

    Attributes:
        ms: of each iteration, on the slowest rank.
        device_gib: device memory in use at the end, on the fullest rank; None on CPUs.
        metrics: of balancing, one for each iteration; empty without.
    """

    ms: list[float]
    device_gib: float | None
    metrics: list[dict[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


class Bench:
    """Times a subject; every rank does the same.

    Device memory is what the driver says is in use, less what was in use before anything was built (the CUDA context,
    other processes). Cached memory is given back before each block and never during one, so that the figure at the end
    is the most the allocator has held, plus what it does not know of: communicators, symmetric memory.
    """

    def __init__(self, make: Callable[[Shape], Subject], shape: Shape) -> None:
        device_gib()  # the context
        self._before = device_gib()
        self.subject = make(shape)

    def block(self, routes: Routes, *, iterations: int, warmup: int, balancer: Any = None) -> Block:
        """Warm up, then time iterations. With a balancer, a training step asks for its metrics, as jobs do."""
        metrics: list[dict[str, float]] = []
        asks = balancer is not None and self.subject.shape.kind == "model"

        def run(iteration: int) -> None:
            self.subject(routes.keys[iteration % len(routes.keys)])
            if asks:
                metrics.append(balancer.metrics())

        self.subject.zero_gradients()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # Replay counts, at the first use of a key, rows that would be routed otherwise: every draw is warmed up.
        for iteration in range(max(warmup, len(routes.keys))):
            run(iteration)
        if balancer is not None:
            balancer.metrics()
        metrics.clear()
        gc.collect()
        gc.disable()  # as jobs do that time their collections; a pause on one rank is one on all
        synchronize()
        dist.barrier()  # behind the collection, whose length differs from rank to rank
        synchronize()
        marks = [_mark()]
        for iteration in range(iterations):
            run(iteration)
            marks.append(_mark())
        synchronize()
        gc.enable()
        if balancer is not None and not asks:
            metrics.append(balancer.metrics())
        mine = torch.tensor(
            [*(_ms(a, b) for a, b in itertools.pairwise(marks)), (device_gib() or 0.0) - (self._before or 0.0)],
            dtype=torch.float64,
            device=device(),
        )
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        *times, used = mine.tolist()
        return Block(times, used if torch.cuda.is_available() else None, metrics)

    def backward(self, routes: Routes, *, iterations: int) -> list[float]:
        """Times of the backward alone, of each iteration, on the slowest rank (ms); ranks meet before each."""
        subject: Any = self.subject
        times = []
        for iteration in range(iterations + 2):
            output = subject.forward(routes.keys[iteration % len(routes.keys)])
            synchronize()
            dist.barrier()
            synchronize()
            if torch.cuda.is_available():  # the host queues the backward while the device stands still
                torch.cuda._sleep(_STANDSTILL)  # type: ignore[no-untyped-call]
            start = _mark()
            output.backward(subject.gradient)
            end = _mark()
            synchronize()
            times.append(_ms(start, end))
        slowest = torch.tensor(times[2:], dtype=torch.float64, device=device())
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return [float(ms) for ms in slowest.tolist()]


@contextlib.contextmanager
def gradients_stay(transport: Any) -> Iterator[None]:
    """Replicas' gradients are not sent home: what a backward takes without that. Its gradients are wrong."""
    transport.send_home = lambda *_: None
    transport.await_home = lambda *_: None
    try:
        yield
    finally:
        del transport.send_home, transport.await_home


def device_gib() -> float | None:
    """Memory of this rank's device in use by anyone (GiB); None on CPUs."""
    if not torch.cuda.is_available():
        return None
    synchronize()
    free, total = torch.cuda.mem_get_info()
    return float((total - free) / GIB)


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _ms(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end)) if torch.cuda.is_available() else (end - start) * 1e3


def largest_of_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value on the rank where it is largest. Collective."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, values)
    return {name: max(one[name] for one in told if name in one) for name in sorted({n for one in told for n in one})}


def profiled(run: Callable[[], None], file: str) -> dict[str, tuple[float, int]]:
    """Trace one call into a Chrome trace; device time (ms; on CPUs, time of operators) and calls by kernel."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    synchronize()
    dist.barrier()
    with profile(activities=activities) as profiler:
        run()
        synchronize()
    profiler.export_chrome_trace(file)
    found = {}
    for event in profiler.key_averages():
        if gpu and event.device_type == DeviceType.CUDA:
            found[event.key] = (event.self_device_time_total / 1e3, event.count)
        elif not gpu:
            found[event.key] = (event.self_cpu_time_total / 1e3, event.count)
    return found


def top_kernels(ours: dict[str, tuple[float, int]], balanced: dict[str, tuple[float, int]], most: int = 25) -> str:
    """The kernels that take longest with ours, those of ``balanced`` beside them."""
    names = sorted(set(ours) | set(balanced), key=lambda n: -max(ours.get(n, (0, 0))[0], balanced.get(n, (0, 0))[0]))
    lines = [f"{'ms':>9} {'calls':>6} {'balanced':>9} {'calls':>6}  kernel"]
    for name in names[:most]:
        mine, ideal = ours.get(name, (0.0, 0)), balanced.get(name, (0.0, 0))
        lines.append(f"{mine[0]:9.3f} {mine[1]:6d} {ideal[0]:9.3f} {ideal[1]:6d}  {name[:100]}")
    total = [sum(ms for ms, _ in found.values()) for found in (ours, balanced)]
    return "\n".join([*lines, f"{total[0]:9.3f} {'':6} {total[1]:9.3f} {'':6}  all"])


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p10 and p90."""
    low, high = np.percentile(values, [10, 90])
    return float(low), float(high)
