"""What every rank of ``bench_exchange.py`` does: time the exchange of replicas, and compare bits."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import Plan
from megatron_ultraep.runtime import choose, symmetric
from megatron_ultraep.runtime.planning import HostPlanned
from megatron_ultraep.runtime.slots import Buffers, ExpertShape
from megatron_ultraep.runtime.transport import Homes
from scripts.bench_exchange_rows import (
    HEADER,
    OVERLAP_HEADER,
    SLOTS,
    Case,
    Limits,
    Options,
    Overlap,
    Results,
    Row,
    case_of,
    cases,
    line,
    overlap_line,
)

WARMUP = 5
SPIN_CYCLES = 2_000_000  # about a millisecond: longer than the host takes to queue one repeat
TIMEOUT_S = 20.0  # of waits on the device
PLACE_BAR = 1.05  # of the bare copy's time
SAME_BITS_REPEATS = 5
PLACE_BLOCKS = (8, 16, 24, 32, 48, 64)
REDUCE_BLOCKS = (8, 16, 24, 32, 48)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Mark = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        run: queues it; calls what it is given at moments of interest.
        prepare: queues what comes before, untimed.
        align: queues a wait for all ranks; the clock's by default.
    """

    run: Callable[[Mark], Any]
    prepare: Callable[[], Any] | None = None
    align: Callable[[], Any] | None = None


class Clock:
    """Times what all ranks do together, from a moment that all of them have reached on the device.

    Args:
        device: of this rank.
        align: queues a wait for all ranks.
        repeats: timed; as many as :data:`WARMUP` come before on a GPU.
    """

    def __init__(self, device: torch.device, align: Callable[[], Any], repeats: int) -> None:
        self.device = device
        self.align = align
        self.repeats = repeats
        self.gpu = device.type == "cuda"

    def settle(self) -> None:
        """All ranks have nothing left to do."""
        if self.gpu:
            torch.cuda.synchronize()
        dist.barrier()

    def __call__(self, *works: Work) -> list[torch.Tensor]:
        """Times of the slowest rank (us) of each: ``[repeats, marks made + 1]``, the last until all is done.

        Several take turns, so that all of them see the same clock rates.
        """
        taken: list[list[list[Any]]] = [[] for _ in works]
        warmup = WARMUP if self.gpu else 1
        for repeat in range(1 + warmup + self.repeats):
            if repeat < 2:
                self.settle()  # the first time kernels are loaded and memory is allocated
            for work, stamps in zip(works, taken, strict=True):
                if work.prepare is not None:
                    work.prepare()
                if self.gpu:
                    torch.cuda._sleep(SPIN_CYCLES)
                (work.align or self.align)()
                marks = [self._now()]
                work.run(lambda marks=marks: marks.append(self._now()))
                marks.append(self._now())
                if repeat > warmup:
                    stamps.append(marks)
        self.settle()
        return [self._slowest(stamps) for stamps in taken]

    def us(self, work: Work) -> float:
        """Median time of the slowest rank until all is done (us)."""
        return median(self(work)[0])

    def _now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _slowest(self, stamps: list[list[Any]]) -> torch.Tensor:
        if self.gpu:
            us = [[1e3 * marks[0].elapsed_time(mark) for mark in marks[1:]] for marks in stamps]
        else:
            us = [[1e6 * (mark - marks[0]) for mark in marks[1:]] for marks in stamps]
        times = torch.tensor(us, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.cpu()


def median(times: torch.Tensor, mark: int = -1) -> float:
    return float(times[:, mark].quantile(0.5))


@contextmanager
def blocks_of(name: str, blocks: int) -> Iterator[None]:
    """With so many blocks of a kernel."""
    usual = getattr(symmetric, name)
    setattr(symmetric, name, blocks)
    try:
        yield
    finally:
        setattr(symmetric, name, usual)


class Streams:
    """Copies on a stream for each peer, so that none waits for another. On a CPU they run at once."""

    def __init__(self, device: torch.device, ranks: int) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(ranks)] if device.type == "cuda" else []

    def copy(self, copies: list[tuple[int, list[torch.Tensor], list[torch.Tensor]]]) -> None:
        """Peer, targets, sources; the current stream waits for all."""
        if not self._streams:
            for _, targets, sources in copies:
                _copy(targets, sources)
            return
        current = torch.cuda.current_stream()
        used = [self._streams[peer] for peer in sorted({peer for peer, _, _ in copies})]
        for stream in used:
            stream.wait_stream(current)
        for peer, targets, sources in copies:
            with torch.cuda.stream(self._streams[peer]):
                _copy(targets, sources)
        for stream in used:
            current.wait_stream(stream)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


class Bench:
    """One rank's transport, experts and measurements.

    Args:
        options: sizes.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.ranks = dist.get_world_size()
        group = tuple(range(self.ranks))
        transport = choose.make_transport([group], group, 0, symmetric=True, timeout_s=TIMEOUT_S)
        assert transport is not None
        self.transport = transport
        self.rank = transport.rank
        self.device = choose.device_of_rank()
        self.layout = ExpertLayout(SLOTS * self.ranks, self.ranks, slots=SLOTS)
        self.mine = [int(expert) for expert in self.layout.experts_of(self.rank)]
        names = tuple(f"matrix{i}" for i in range(len(options.shapes)))
        self.shape = ExpertShape(names, options.shapes, torch.bfloat16, self.device)
        self.pool = transport.make_pool(self.shape, SLOTS)
        tiny = transport.make_pool(ExpertShape(("one",), ((1,),), torch.bfloat16, self.device), 1)
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.clock = Clock(self.device, lambda: transport.gather_loads(one, tiny), options.repeats)
        self.streams = Streams(self.device, self.ranks)
        self.gpu = self.clock.gpu
        side = (options.gemm, options.gemm)
        dtype = torch.bfloat16 if self.gpu else torch.float32
        self.left, self.right = (torch.randn(side, device=self.device).to(dtype) for _ in range(2))
        self.product = torch.empty_like(self.left)
        self.results = Results(Limits(0.0, 0.0, 0.0))

    # Values: the same numbers wherever they are drawn, on GPUs of one kind.

    def values(self, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """An expert's worth of numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [torch.randn(s, generator=generator, device=self.device).to(dtype) for s in self.options.shapes]

    def weight(self, expert: int) -> list[torch.Tensor]:
        return self.values(expert, torch.bfloat16)

    def base(self, expert: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """A home's gradient, before anything is added."""
        return self.values(1000 + expert, dtype)

    def gradient(self, expert: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """What a replica sends home."""
        return self.values(10_000 + 1000 * rank + expert, dtype)

    def planned(self, case: Case) -> HostPlanned:
        physical = self.layout.ranks * (self.layout.experts_per_rank + SLOTS)
        quota = np.zeros((self.ranks, physical), dtype=np.int64)
        planned = HostPlanned(Plan(self.layout, np.array(case.replicas), quota, ()), self.device)
        _ = planned.replica_expert  # sent to the device now
        return planned

    def everywhere(self, right: bool) -> bool:
        """Whether it is so on all ranks."""
        flag = torch.tensor([int(right)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def peer_slots(self, pool: Any, buffers: Buffers, rank: int) -> list[list[torch.Tensor]]:
        """Another rank's slots, by slot and matrix, as tensors of this process."""
        region = pool.region(buffers)
        if isinstance(region.keep, list):
            memory = region.keep[rank][: buffers.bytes]
        else:
            memory = region.keep.get_buffer(rank, (buffers.bytes,), torch.uint8)
        if memory.data_ptr() != int(region.addresses[rank]):
            raise RuntimeError(f"torch has the memory of rank {rank} elsewhere than the transport")
        flat = memory.view(buffers.flat.dtype)
        width = flat.element_size()
        return [
            [
                flat[start // width : (start + size) // width].view(each)
                for start, size, each in zip(
                    (slot * buffers.stride + offset for offset in buffers.offsets),
                    buffers.sizes,
                    self.options.shapes,
                    strict=True,
                )
            ]
            for slot in range(len(buffers))
        ]

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def add(self, *rows: Row) -> None:
        self.results.rows += rows
        for row in rows:
            self.say(line(row))

    def least(self, size: int, gbs: float) -> float | None:
        """The least time (us) for so many bytes; None on a CPU, where nothing is bounded."""
        return size / gbs / 1e3 if self.gpu else None

    # Measurements, in the order in which they are made.

    def run(self) -> Results:
        gradients = {name: self.transport.make_pool(self.shape, SLOTS) for name in DTYPES}
        for name, pool in gradients.items():
            pool.gradients(DTYPES[name])
        self.limit(gradients["fp32"])
        self.say(HEADER)
        for case in cases("place", self.ranks):
            self.place(case)
        for name, pool in gradients.items():
            for case in cases("reduce", self.ranks):
                self.reduce(case, pool, name)
        self.control(gradients["fp32"])
        self.say(f"\n{OVERLAP_HEADER}")
        for case in cases("place", self.ranks)[2:]:
            self.beside(case, "bf16")
        for name, pool in gradients.items():
            for case in cases("reduce", self.ranks)[1:]:
                self.beside(case, name, pool)
        self.clock.settle()
        self.transport.check()
        self.transport.close()
        return self.results

    def limit(self, pool: Any) -> None:
        """Measure the limits."""
        buffers = pool.gradients(torch.float32)
        region = pool.region(buffers)
        local = torch.zeros(buffers.bytes, dtype=torch.uint8, device=self.device)
        remote = None
        if self.rank == 0 and isinstance(region.keep, list):
            remote = region.keep[1][: buffers.bytes]
        elif self.rank == 0:
            remote = region.keep.get_buffer(1, (buffers.bytes,), torch.uint8)

        def push(_: Mark) -> None:
            if remote is not None:
                remote.copy_(local, non_blocking=True)

        def pull(_: Mark) -> None:
            if remote is not None:
                local.copy_(remote, non_blocking=True)

        small = torch.zeros(1, device=self.device)
        pushed, pulled = self.clock(Work(push), Work(pull))
        launched = self.clock.us(Work(lambda _: small.zero_()))
        self.results.limits = limits = Limits(
            buffers.bytes / float(pushed.min()) / 1e3, buffers.bytes / float(pulled.min()) / 1e3, launched
        )
        self.say(
            f"A copy of {buffers.bytes / 1e6:.1f} MB by rank 0 to rank 1: {limits.push_gbs:.1f} GB/s, from it: "
            f"{limits.pull_gbs:.1f} GB/s; a launch: {limits.launch_us:.1f} us\n"
        )

    def placing(self, case: Case, *, beside: bool = False) -> tuple[Work, Homes]:
        """Placement, begun when all ranks have freed their slots, and home weights.

        Args:
            case: replicas.
            beside: whether matrix products run meanwhile; the mark is their end.
        """
        planned, homes = self.planned(case), Homes([self.weight(expert) for expert in self.mine])
        loads = torch.zeros(self.layout.experts, dtype=torch.int64, device=self.device)

        def run(mark: Mark) -> None:
            self.transport.place(planned, self.pool, homes)
            if beside:
                self.multiply()
                mark()
            self.transport.await_placed(planned, self.pool)
            self.transport.weights_sent(self.pool)

        return Work(run, align=lambda: self.transport.gather_loads(loads, self.pool)), homes

    def placed_right(self, case: Case) -> bool:
        right = True
        for _, expert, rank, slot in case.moves:
            if rank == self.rank:
                right &= all(map(torch.equal, self.pool.weights[slot], self.weight(expert)))
        return self.everywhere(right)

    def place(self, case: Case) -> None:
        """Rows of one case of placement."""
        work, homes = self.placing(case)
        slots = {rank: self.peer_slots(self.pool, self.pool.weights, rank) for rank in range(self.ranks)}
        copies = [
            (rank, slots[rank][slot], list(homes.tensors[self.mine.index(expert)]))
            for home, expert, rank, slot in case.moves
            if home == self.rank
        ]
        size = case.busiest * sum(self.pool.weights.sizes)
        limits = self.results.limits
        bound = self.least(size, max(limits.push_gbs, limits.pull_gbs))
        usual = symmetric._PLACE_BLOCKS

        self.pool.weights.flat.zero_()
        ours = Row("place", case.name, "kernel", 0.0, "bf16", usual, size, bound)
        ours.us = self.clock.us(work)
        ours.equal = self.placed_right(case)
        self.pool.weights.flat.zero_()
        bare = Row("place", case.name, "bare peer copy", 0.0, "bf16", None, size, bound)
        bare.us = self.clock.us(Work(lambda _: self.streams.copy(copies)))
        bare.equal = self.placed_right(case)
        ours.bar_us = PLACE_BAR * bare.us if self.gpu else None
        self.add(ours, bare)
        for blocks in PLACE_BLOCKS if self.options.sweep else ():
            with blocks_of("_PLACE_BLOCKS", blocks):
                us = self.clock.us(work)
            self.add(Row("place", case.name, "kernel, swept", us, "bf16", blocks, size, bound))

    def summing(self, case: Case, pool: Any, name: str, *, beside: bool = False) -> tuple[Work, Homes]:
        """Reduction, begun when slots hold gradients, and home gradients; see :meth:`placing`."""
        dtype = DTYPES[name]
        planned, homes = self.planned(case), Homes([self.base(expert, dtype) for expert in self.mine])
        made = {s: self.gradient(e, r, dtype) for _, e, r, s in case.moves if r == self.rank}

        def prepare() -> None:
            self.transport.before_gradients(planned, pool, dtype, accumulate=True)
            for slot, sources in made.items():
                _copy(list(pool.gradients(dtype)[slot]), sources)

        def run(mark: Mark) -> None:
            self.transport.send_home(planned, pool, homes, None)
            if beside:
                self.multiply()
                mark()
            self.transport.await_home(pool)

        return Work(run, prepare), homes

    def same_bits(self, case: Case, pool: Any, name: str) -> bool:
        """Whether repeats have the same bits, and those that torch makes of the same sums."""
        dtype = DTYPES[name]
        work, homes = self.summing(case, pool, name)
        expected = []
        for expert in self.mine:
            sums = [t.float() for t in self.base(expert, dtype)]
            for _, other, rank, _ in case.moves:
                if other == expert:
                    for total, more in zip(sums, self.gradient(expert, rank, dtype), strict=True):
                        total += more
            expected.append([t.to(dtype) for t in sums])
        right = True
        for _ in range(SAME_BITS_REPEATS):
            for place, expert in enumerate(self.mine):
                _copy(list(homes.tensors[place]), self.base(expert, dtype))
            assert work.prepare is not None
            work.prepare()
            work.run(lambda: None)
            for found, wanted in zip(homes.tensors, expected, strict=True):
                right &= all(map(_same_bits, found, wanted))
        return self.everywhere(right)

    def reduce(self, case: Case, pool: Any, name: str) -> None:
        """Rows of one case of reduction."""
        dtype = DTYPES[name]
        work, homes = self.summing(case, pool, name)
        buffers = pool.gradients(dtype)
        size = case.busiest * sum(buffers.sizes)
        bound = self.least(size, self.results.limits.pull_gbs)
        ours = Row("reduce", case.name, "kernel", 0.0, name, symmetric._REDUCE_BLOCKS, size, bound)
        ours.equal = self.same_bits(case, pool, name)
        ours.us = self.clock.us(work)

        slots = {rank: self.peer_slots(pool, buffers, rank) for rank in range(self.ranks)}
        mine = [move for move in case.moves if move[0] == self.rank]
        staging = [[torch.empty(s, dtype=dtype, device=self.device) for s in self.options.shapes] for _ in mine]
        copies = [(rank, staged, slots[rank][slot]) for staged, (_, _, rank, slot) in zip(staging, mine, strict=True)]

        def copy_and_add(_: Mark) -> None:
            self.streams.copy(copies)
            for staged, (_, expert, _, _) in zip(staging, mine, strict=True):
                torch._foreach_add_(list(homes.tensors[self.mine.index(expert)]), staged)

        us = self.clock.us(Work(copy_and_add))
        self.add(ours, Row("reduce", case.name, "peer copy, then add", us, name, None, size, bound))
        for blocks in REDUCE_BLOCKS if self.options.sweep else ():
            with blocks_of("_REDUCE_BLOCKS", blocks):
                us = self.clock.us(work)
            self.add(Row("reduce", case.name, "kernel, swept", us, name, blocks, size, bound))

    def control(self, pool: Any) -> None:
        """Rows of what moves next to nothing."""
        bound = self.results.limits.launch_us if self.gpu else None
        for experts in self.options.experts:
            loads = torch.arange(experts, device=self.device) + 1000 * self.rank
            out = loads.new_empty(self.ranks, experts)
            wanted = torch.stack([torch.arange(experts) + 1000 * rank for rank in range(self.ranks)])
            case, size = f"loads of {experts} experts", 8 * experts * self.ranks

            def gather(_: Mark, loads: torch.Tensor = loads) -> None:
                self.transport.gather_loads(loads, self.pool)

            def collective(_: Mark, loads: torch.Tensor = loads, out: torch.Tensor = out) -> None:
                dist.all_gather_into_tensor(out.view(-1), loads)

            found = self.transport.gather_loads(loads, self.pool).cpu()
            ours = Row("control", case, "gather_loads", 0.0, "int64", None, size, bound)
            ours.equal = self.everywhere(torch.equal(found, wanted))
            # Each alone: work of a collective's stream must not be in the other's time.
            ours.us = self.clock.us(Work(gather))
            us = self.clock.us(Work(collective))
            backend = "NCCL" if self.gpu else "gloo"
            self.add(ours, Row("control", case, f"{backend} all-gather", us, "int64", None, size, bound))
        nothing = case_of("empty plan", self.ranks, {})
        # From the clock's wait, which frees no slots here: FREE is announced inside.
        us = self.clock.us(Work(self.placing(nothing)[0].run))
        self.add(Row("control", "empty plan", "FREE, place, await_placed", us, bound_us=bound))
        us = self.clock.us(self.summing(nothing, pool, "fp32")[0])
        self.add(Row("control", "empty plan", "send_home, await_home", us, bound_us=bound))

    def multiply(self) -> None:
        for _ in range(self.options.gemms):
            torch.matmul(self.left, self.right, out=self.product)

    def beside(self, case: Case, dtype: str, pool: Any = None) -> None:
        """Rows of an exchange beside matrix products: of a reduction where there is a pool of gradients."""
        if pool is None:
            part, constant, swept = "place", "_PLACE_BLOCKS", PLACE_BLOCKS
            alone, together = self.placing(case)[0], self.placing(case, beside=True)[0]
        else:
            part, constant, swept = "reduce", "_REDUCE_BLOCKS", REDUCE_BLOCKS
            alone = self.summing(case, pool, dtype)[0]
            together = self.summing(case, pool, dtype, beside=True)[0]
        usual = getattr(symmetric, constant)
        for blocks in [usual, *(b for b in swept if self.options.sweep and b != usual)]:
            with blocks_of(constant, blocks):
                gemm, exchange, both = self.clock(Work(lambda _: self.multiply()), alone, together)
            found = Overlap(
                part, case.name, dtype, blocks, median(gemm), median(exchange), median(both, 0), median(both)
            )
            self.results.overlaps.append(found)
            self.say(overlap_line(found))


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    kind = torch.int32 if left.dtype == torch.float32 else torch.int16
    return torch.equal(left.view(kind), right.view(kind))


def measure(options: Options) -> Results:
    """Everything, on this rank."""
    try:
        return Bench(options).run()
    except Exception:
        # The first rank to answer is often not the first to fail.
        print(f"rank {dist.get_rank()}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
