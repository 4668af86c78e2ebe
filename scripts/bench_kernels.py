#!/usr/bin/env python
"""Kernels that plan and reroute: time on the device, wall time, lower bound, and whether bits equal the CPU's.

    python scripts/bench_kernels.py [--json benchmarks/results/kernels-gpu.json] [--quick]

Loads and routes are simulated (``megatron_ultraep.plan.generator``), times are measured. ``device`` is the time between
two CUDA events, queued behind a spinning kernel so that the host's work is not in it; ``wall`` is from the call until
the device is idle again. Comparators run here, on the same inputs: the planner and the reroute that need the host.

Lower bounds: bytes over the copy bandwidth measured in this run (count, reroute), one launch (plan).

Without a GPU the host build of the kernels runs, as a smoke test: no bars. Exits with 1 when a bar is missed or bits
differ.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ultraep.kernels import plan as plan_kernel  # noqa: E402
from megatron_ultraep.kernels.reroute import CHUNK_ROWS, Counts, count, reroute  # noqa: E402
from megatron_ultraep.layout import ExpertLayout  # noqa: E402
from megatron_ultraep.plan import Costs, Plan, PlanSettings, solve  # noqa: E402
from megatron_ultraep.plan.generator import draw_routes, expert_weights, simulate  # noqa: E402
from megatron_ultraep.runtime import reroute as reference  # noqa: E402
from scripts.machine import hardware  # noqa: E402

SOURCE = 0  # the rank whose tokens are rerouted
SLOTS = 2
DRAWS = 4  # inputs that take turns; in the large cases together more than the cache holds
WARMUP, REPEATS, WALL_REPEATS = 10, 60, 20
SPIN_CYCLES = 1_000_000  # about half a millisecond: longer than the host takes to queue one call
SECTOR = 32  # bytes; the least that is read of memory
PLAN_BAR_US, REROUTE_BAR_US = 55.0, 38.0

# One layer of hidden 4096, ffn 1536 in bf16 on H100; a replica moves its weights twice and fp32 gradients once.
GATE = Costs(token_ps=307_000, copy_ps_per_kib=2_840, replica_bytes=4 * 37_700_000, fixed_ps=100_000_000)


@dataclass(frozen=True)
class Case:
    """A cluster and what one of its ranks routes.

    Attributes:
        tokens: of each rank.
        thinning: the other ranks draw one in so many of their tokens, each counted so many times (drawing is slow).
        bars: whether the bars are for this case.
    """

    name: str
    ranks: int
    experts: int
    topk: int
    node_size: int
    imbalances: tuple[float, ...]
    tokens: int = 8192
    thinning: int = 8
    bars: bool = False

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(self.experts, self.ranks, node_size=self.node_size, slots=SLOTS)

    @property
    def physical(self) -> int:
        return self.experts + self.ranks * SLOTS

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.ranks} ranks in nodes of {self.node_size}, {self.experts} experts, "
            f"{self.physical} physical, top-{self.topk}, {self.tokens} tokens a rank"
        )


# Imbalance 1.05 has hardly anything to gain: planning is paid all the same.
CASES = (
    Case("ep64", 64, 256, 8, 64, (1.5, 2.0, 3.0), bars=True),
    Case("ep4", 4, 32, 4, 4, (2.0,)),
    Case("ep8", 8, 128, 8, 8, (1.05, 2.0)),
    Case("ep512-nodes-of-64", 512, 512, 8, 64, (2.0,), thinning=64),
)
QUICK = (replace(CASES[1], tokens=500),)


@dataclass(frozen=True)
class Input:
    """One micro-batch: loads of all ranks, and what the source rank has on the device."""

    loads: np.ndarray  # int64 [G, E]
    device_loads: torch.Tensor
    routing_map: torch.Tensor  # bool [T, E]
    probs: torch.Tensor  # float32 [T, E], a leaf
    gradient: torch.Tensor  # float32 [T, P]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in us, None where they are not measured.

    Attributes:
        method: ``kernel``, or the comparator's name.
        equal: whether bits equal the CPU's; None for comparators.
    """

    case: str
    imbalance: float
    gate: bool
    work: str
    method: str
    device_us: float | None
    wall_us: float
    bound_us: float | None = None
    bar_us: float | None = None
    equal: bool | None = None
    kind: str = "measured"

    @property
    def kept(self) -> bool | None:
        """Whether the bar is; None without a bar or a time to hold against it."""
        return None if self.bar_us is None or self.device_us is None else self.device_us <= self.bar_us

    @property
    def missed(self) -> bool:
        return self.kept is False or self.equal is False


class Clock:
    """Times calls on a device; a call gets the index of its input."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def device_us(self, run: Callable[[int], Any]) -> float | None:
        """Median time on the device; None on a CPU."""
        if self.device.type != "cuda":
            return None
        for i in range(WARMUP):
            run(i % DRAWS)
        pairs = []
        for i in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            run(i % DRAWS)
            end.record()
            pairs.append((start, end))
        self.wait()
        return statistics.median(float(start.elapsed_time(end)) for start, end in pairs) * 1e3

    def wall_us(self, run: Callable[[int], Any]) -> float:
        """Median time from the call until the device is idle."""
        run(0)
        times = []
        for i in range(min(self.repeats, WALL_REPEATS)):
            self.wait()
            start = time.perf_counter()
            run(i % DRAWS)
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6


@dataclass(frozen=True)
class Limits:
    """What the device can do at best, measured; zeros on a CPU, where nothing is bounded.

    Attributes:
        bytes_per_us: copied, read and written counted each.
        launch_us: time of a kernel that does next to nothing.
    """

    bytes_per_us: float
    launch_us: float

    @classmethod
    def measure(cls, clock: Clock) -> Limits:
        if clock.device.type != "cuda":
            return cls(0.0, 0.0)
        source = torch.empty(2**29, dtype=torch.uint8, device=clock.device)
        target, small = torch.empty_like(source), torch.zeros(1, device=clock.device)
        copied, launched = clock.device_us(lambda _: target.copy_(source)), clock.device_us(lambda _: small.zero_())
        return cls(2 * source.numel() / (copied or 1), launched or 0.0)

    def moving(self, size: int) -> float | None:
        """The least time (us) to move so many bytes."""
        return size / self.bytes_per_us if self.bytes_per_us else None


def draw(case: Case, imbalance: float, seed: int, device: torch.device) -> Input:
    """Loads of thinned routes for the other ranks, all routes for the source rank."""
    _, loads = simulate(
        ranks=case.ranks,
        experts=case.experts,
        tokens=case.tokens // case.thinning,
        topk=case.topk,
        target_imbalance=imbalance,
        seed=seed,
    )
    loads *= case.thinning
    weights = expert_weights(case.ranks, case.experts, case.topk, imbalance)
    routes = draw_routes(weights, case.tokens, case.topk, np.random.default_rng([seed, case.ranks]))
    loads[SOURCE] = np.bincount(routes.ravel(), minlength=case.experts)
    routing_map = torch.zeros(case.tokens, case.experts, dtype=torch.bool)
    routing_map.scatter_(1, torch.from_numpy(routes).long(), True)
    generator = torch.Generator().manual_seed(seed)
    return Input(
        loads=loads,
        device_loads=torch.from_numpy(loads).to(device),
        routing_map=routing_map.to(device),
        probs=torch.rand(case.tokens, case.experts, generator=generator).to(device).requires_grad_(),
        gradient=torch.randn(case.tokens, case.physical, generator=generator).to(device),
    )


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, on the CPU."""
    left, right = left.detach().cpu(), right.detach().cpu()
    if left.dtype == torch.float32:
        left, right = left.view(torch.int32), right.view(torch.int32)
    return left.dtype == right.dtype and torch.equal(left, right)


def torch_reroute(case: Case, data: Input, plan: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``runtime.reroute`` does from the plan on, its table on the host included."""
    table = torch.from_numpy(reference.tables(plan, SOURCE)).to(device)
    probs, routing_map = data.probs.to(device), data.routing_map.to(device)
    return reference.reroute(probs, routing_map, table, topk=case.topk, physical=case.physical)


def counted_right(data: Input, counts: Counts) -> bool:
    until = data.routing_map.cpu().cumsum(0)
    starts = torch.arange(0, len(until), CHUNK_ROWS)
    before = (until[starts] - data.routing_map.cpu()[starts].long()).int()
    return same(counts.loads, until[-1]) and same(counts.before, before)


def count_row(case: Case, imbalance: float, inputs: list[Input], clock: Clock, limits: Limits) -> Row:
    def run(i: int) -> Counts:
        return count(inputs[i].routing_map)

    moved = case.tokens * case.experts + (-(-case.tokens // CHUNK_ROWS)) * case.experts * 4 + case.experts * 8
    return Row(
        case.name,
        imbalance,
        False,
        "count",
        "kernel",
        clock.device_us(run),
        clock.wall_us(run),
        limits.moving(moved),
        equal=all(counted_right(data, run(i)) for i, data in enumerate(inputs)),
    )


def plan_rows(
    case: Case, imbalance: float, settings: PlanSettings, inputs: list[Input], clock: Clock, limits: Limits
) -> Iterator[Row]:
    layout = case.layout
    kernel = plan_kernel.PlanKernel(layout, settings, SOURCE, clock.device)

    def run(i: int) -> Any:
        return kernel(inputs[i].device_loads)

    def host(i: int) -> Plan:
        return solve(inputs[i].device_loads.cpu().numpy(), layout, settings)

    def equal(i: int) -> bool:
        made = run(i)
        return plan_kernel.to_plan(layout, made.told.cpu().numpy()).same_bits(solve(inputs[i].loads, layout, settings))

    where = (case.name, imbalance, settings.costs is not None, "plan")
    yield Row(
        *where,
        "kernel",
        clock.device_us(run),
        clock.wall_us(run),
        limits.launch_us or None,
        PLAN_BAR_US if case.bars else None,
        all(equal(i) for i in range(len(inputs))),
    )
    yield Row(*where, "numba, loads to the host", None, clock.wall_us(host))


def reroute_rows(
    case: Case, imbalance: float, settings: PlanSettings, inputs: list[Input], clock: Clock, limits: Limits
) -> Iterator[Row]:
    layout = case.layout
    kernel = plan_kernel.PlanKernel(layout, settings, SOURCE, clock.device)
    tables = [kernel(data.device_loads).table.clone() for data in inputs]
    befores = [count(data.routing_map).before for data in inputs]
    plans = [solve(data.loads, layout, settings) for data in inputs]

    def forward(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return reroute(inputs[i].probs, inputs[i].routing_map, befores[i], tables[i], case.physical)

    def with_torch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_reroute(case, inputs[i], plans[i], clock.device)

    def backward_of(made: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[int], torch.Tensor]:
        def run(i: int) -> torch.Tensor:
            return torch.autograd.grad(made[i][0], inputs[i].probs, inputs[i].gradient, retain_graph=True)[0]

        return run

    made = [forward(i) for i in range(len(inputs))]
    backward = backward_of(made)
    torch_backward = backward_of([with_torch(i) for i in range(len(inputs))])

    # One input: the reference on the CPU is slow.
    expected, expected_map = torch_reroute(case, inputs[0], plans[0], torch.device("cpu"))
    expected_gradient = torch.autograd.grad(expected, inputs[0].probs, inputs[0].gradient.cpu())[0]

    pairs, element = case.tokens * case.topk, inputs[0].probs.element_size()
    logical, physical = case.tokens * case.experts, case.tokens * case.physical
    tables_bytes = (tables[0].numel() + befores[0].numel()) * 4
    forward_bytes = logical + min(pairs * SECTOR, logical * element) + physical * (element + 1) + tables_bytes
    backward_bytes = logical + min(pairs * SECTOR, physical * element) + logical * element + tables_bytes

    where = (case.name, imbalance, settings.costs is not None)
    yield Row(
        *where,
        "reroute",
        "kernel",
        clock.device_us(forward),
        clock.wall_us(forward),
        limits.moving(forward_bytes),
        REROUTE_BAR_US if case.bars else None,
        same(made[0][0], expected) and same(made[0][1], expected_map),
    )
    yield Row(*where, "reroute", "torch, tables from the host", None, clock.wall_us(with_torch))
    yield Row(
        *where,
        "reroute backward",
        "kernel",
        clock.device_us(backward),
        clock.wall_us(backward),
        limits.moving(backward_bytes),
        equal=same(backward(0), expected_gradient),
    )
    yield Row(*where, "reroute backward", "torch", clock.device_us(torch_backward), clock.wall_us(torch_backward))


def rows_of(case: Case, clock: Clock, limits: Limits) -> Iterator[Row]:
    """Count once for an imbalance; plan and reroute without and with the gate."""
    for imbalance in case.imbalances:
        inputs = [draw(case, imbalance, seed, clock.device) for seed in range(DRAWS)]
        yield count_row(case, imbalance, inputs, clock, limits)
        for settings in (PlanSettings(), PlanSettings(costs=GATE)):
            yield from plan_rows(case, imbalance, settings, inputs, clock, limits)
            yield from reroute_rows(case, imbalance, settings, inputs, clock, limits)


def print_row(row: Row) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    bar = {None: "-", True: "kept", False: "MISSED"}[row.kept]
    bar = bar if row.kept is None else f"{row.bar_us:.0f} {bar}"
    bits = {None: "-", True: "equal", False: "DIFFER"}[row.equal]
    print(
        f"{row.imbalance:9} {'yes' if row.gate else 'no':>4} {row.work:17} {row.method:27} {row.kind:8} "
        f"{number(row.device_us):>9} {number(row.wall_us):>9} {number(row.bound_us):>7} {bar:>10} {bits:>6}",
        flush=True,
    )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write hardware, versions, limits and rows there")
    parser.add_argument("--quick", action="store_true", help="one small case, few repeats")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, 5 if arguments.quick else REPEATS)
    limits = Limits.measure(clock)
    if device.type == "cpu":
        print("CPU: times are of the host build, no bars")
    else:
        name, rate = torch.cuda.get_device_name(), limits.bytes_per_us / 1e6
        print(f"{name}: copies {rate:.2f} TB/s, a launch {limits.launch_us:.1f} us")
    rows: list[Row] = []
    for case in QUICK if arguments.quick else CASES:
        print(
            f"\n{case}; us\n{'imbalance':>9} {'gate':>4} {'':17} {'':27} {'':8} {'device':>9} {'wall':>9} {'bound':>7} "
            f"{'bar':>10} {'bits':>6}"
        )
        for row in rows_of(case, clock, limits):
            rows.append(row)
            print_row(row)

    missed = [row for row in rows if row.missed]
    verdict = "MISSED" if missed else "kept" if device.type == "cuda" else "bits equal, no bars"
    print(
        f"\nSimulated loads, measured times, medians of {clock.repeats} (wall: {min(clock.repeats, WALL_REPEATS)}), "
        f"{DRAWS} inputs in turn.\nBars, where a row has one, and bits equal to the CPU's in rows of kernels: {verdict}"
    )
    if arguments.json:
        document = {
            "hardware": hardware() | {"cuda": torch.version.cuda},
            "versions": versions(),
            "limits": asdict(limits),
            "rows": [asdict(row) | {"kept": row.kept} for row in rows],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
