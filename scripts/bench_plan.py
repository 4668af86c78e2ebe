#!/usr/bin/env python
"""Planners side by side on simulated loads: imbalance after, replicas, smallest replica, solver time.

    python scripts/bench_plan.py [--seeds 5] [--json benchmarks/results/plan-cpu.json]

Every method gets the same loads (``megatron_ultraep.plan.generator``) and runs here; nothing is quoted. No method that
keeps tokens inside the home's node gets below ``bound``. EPLB and "reordered" move homes over nodes, so it does not
bind them, but neither can act inside a micro-batch. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import scipy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ultraep.layout import ExpertLayout  # noqa: E402
from megatron_ultraep.plan import Costs, PlanSettings, comparators, solve  # noqa: E402
from megatron_ultraep.plan.comparators import Balance  # noqa: E402
from megatron_ultraep.plan.generator import simulate  # noqa: E402
from scripts.machine import hardware  # noqa: E402

MOST_OVER_BOUND = 1.010
FLOOR = 1024
TOKENS, TOPK, SLOTS = 8192, 8, 2
IMBALANCES = (1.5, 2.0, 3.0)
EASY_IMBALANCE = 1.05  # printed, not a row: hardly anything to gain
REPEATS = 5

# One layer of hidden 4096, ffn 1536 in bf16 on H100: 20.1 ms for 65536 tokens, 361 GB/s between two ranks; a replica
# moves its weights twice and fp32 gradients once.
EXAMPLE_COSTS = Costs(token_ps=307_000, copy_ps_per_kib=2_840, replica_bytes=4 * 37_700_000, fixed_ps=100_000_000)


@dataclass(frozen=True)
class Case:
    """A cluster: ranks, experts, and ranks of a node."""

    name: str
    ranks: int
    experts: int
    node_size: int

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(self.experts, self.ranks, node_size=self.node_size, slots=SLOTS)

    def __str__(self) -> str:
        return f"{self.name}: {self.ranks} ranks in nodes of {self.node_size}, {self.experts} experts"


CASES = (
    Case("ep8", 8, 128, 8),
    Case("ep64-one-node", 64, 256, 64),
    Case("ep64-nodes-of-8", 64, 256, 8),
)
LARGE = Case("ep512-nodes-of-64", 512, 512, 64)

Method = Callable[[np.ndarray, ExpertLayout], Balance]
SETTINGS = PlanSettings(min_tokens=FLOOR)
GATED = PlanSettings(min_tokens=FLOOR, costs=EXAMPLE_COSTS)


def ours(loads: np.ndarray, layout: ExpertLayout) -> Balance:
    return comparators.of_plan(solve(loads, layout, SETTINGS))


def gated(loads: np.ndarray, layout: ExpertLayout) -> Balance:
    return comparators.of_plan(solve(loads, layout, GATED))


def reordered(loads: np.ndarray, layout: ExpertLayout) -> Balance:
    return ours(loads, comparators.reordered(loads, layout))


METHODS: dict[str, Method] = {
    "ours": ours,
    "ultraep": lambda loads, layout: comparators.ultraep(loads, layout, FLOOR),
    "eplb": comparators.eplb,
    "lplb": comparators.lplb,
    "none": comparators.none,
}
TABLE_ONLY: dict[str, Method] = {"ours, gated": gated, "reordered + ours": reordered}


def seconds(run: Callable[[], Any]) -> float:
    """Median time of a few runs (s)."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def solver_seconds(method: str, loads: np.ndarray, layout: ExpertLayout) -> float:
    """Time of the method itself; for ours the whole of ``solve``, from loads to plan."""
    if method in ("ours", "ours, gated"):
        return seconds(lambda: solve(loads, layout, GATED if "gated" in method else SETTINGS))
    run = METHODS.get(method) or TABLE_ONLY[method]
    return seconds(lambda: run(loads, layout))


def measure(case: Case, imbalance: float, seed: int, loads: np.ndarray) -> Iterator[dict[str, Any]]:
    """One row per method, of the keys that the JSON file documents."""
    layout = case.layout
    mean = loads.sum() / case.ranks
    for name, method in (METHODS | TABLE_ONLY).items():
        balance = method(loads, layout)
        yield {
            "case": case.name,
            "imbalance": imbalance,
            "seed": seed,
            "method": name,
            "after": balance.imbalance,
            "bound": comparators.bound(loads, layout) / mean,
            "replicas": balance.replicas,
            "min_replica_tokens": balance.min_replica_tokens,
            "floor": FLOOR,
            "seconds": solver_seconds(name, loads, layout),
        }


def run_cases(seeds: int) -> list[dict[str, Any]]:
    """Rows of all cases, imbalances, seeds and methods; cases of one shape share their loads."""
    shapes = sorted({(case.ranks, case.experts) for case in CASES})
    rows = []
    for ranks, experts in shapes:
        for imbalance in (EASY_IMBALANCE, *IMBALANCES):
            for seed in range(seeds):
                _, loads = simulate(
                    ranks=ranks, experts=experts, tokens=TOKENS, topk=TOPK, target_imbalance=imbalance, seed=seed
                )
                for case in CASES:
                    if (case.ranks, case.experts) == (ranks, experts):
                        rows += measure(case, imbalance, seed, loads)
    return rows


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """What our rows promise and do not keep."""
    missed = []
    reference = {(r["case"], r["imbalance"], r["seed"]): r["replicas"] for r in rows if r["method"] == "ultraep"}
    for row in rows:
        if row["method"] != "ours":
            continue
        where = f"{row['case']}, imbalance {row['imbalance']}, seed {row['seed']}"
        if row["after"] > MOST_OVER_BOUND * row["bound"]:
            missed.append(f"{where}: after {row['after']:.4f} is more than {MOST_OVER_BOUND} x {row['bound']:.4f}")
        ultraep = reference[row["case"], row["imbalance"], row["seed"]]
        if row["replicas"] > ultraep:
            missed.append(f"{where}: {row['replicas']} replicas, UltraEP's rule makes {ultraep}")
        if row["replicas"] and row["min_replica_tokens"] < FLOOR:
            missed.append(f"{where}: a replica of {row['min_replica_tokens']} tokens")
    return missed


def print_table(rows: list[dict[str, Any]], seeds: int) -> None:
    """Median over seeds, the worst in brackets."""
    header = f"{'imbalance':>9} {'method':18} {'after':>15} {'/ bound':>15} {'replicas':>10} {'smallest':>9} {'ms':>9}"
    for case in CASES:
        print(f"\n{case}, {TOPK} experts a token, {TOKENS} tokens and {SLOTS} slots a rank, floor {FLOOR}")
        print(header)
        for imbalance in (EASY_IMBALANCE, *IMBALANCES):
            of_case = [r for r in rows if r["case"] == case.name and r["imbalance"] == imbalance]
            bounds = [r["bound"] for r in of_case if r["method"] == "ours"]
            print(f"{imbalance:9} {'(bound)':18} {statistics.median(bounds):6.4f} ({max(bounds):6.4f})")
            for method in METHODS | TABLE_ONLY:
                print(f"{imbalance:9} {method:18} {summary([r for r in of_case if r['method'] == method])}")
    print(
        f"\nSimulated loads, measured solver time. Median of {seeds} seeds (worst in brackets; smallest replica: of "
        "all).\nms: our compiled solver; the comparators are plain Python, and their times are not the originals'."
        "\nreordered: experts first change homes over nodes and ranks (LPT), which needs routes known beforehand."
    )


def summary(rows: list[dict[str, Any]]) -> str:
    after = [r["after"] for r in rows]
    ratio = [r["after"] / r["bound"] for r in rows]
    replicas = [r["replicas"] for r in rows]
    smallest = min((r["min_replica_tokens"] for r in rows if r["replicas"]), default=0)
    milliseconds = statistics.median(r["seconds"] for r in rows) * 1e3
    return (
        f"{statistics.median(after):6.4f} ({max(after):6.4f}) {statistics.median(ratio):6.4f} ({max(ratio):6.4f}) "
        f"{statistics.median(replicas):4g} ({max(replicas):3d}) {smallest:9d} {milliseconds:9.3f}"
    )


def print_large() -> None:
    """Solver times at 512 ranks; loads of an eighth of the tokens, times 8."""
    print(f"\n{LARGE}: time of solve, ms (best, median of {4 * REPEATS}), target 8 ms")
    for imbalance in (2.0, 3.0):
        _, loads = simulate(
            ranks=LARGE.ranks, experts=LARGE.experts, tokens=TOKENS // 8, topk=TOPK, target_imbalance=imbalance, seed=0
        )
        loads *= 8
        for name, settings in (("ours", SETTINGS), ("ours, gated", GATED)):
            times = []
            for _ in range(4 * REPEATS):
                start = time.perf_counter()
                plan = solve(loads, LARGE.layout, settings)
                times.append((time.perf_counter() - start) * 1e3)
            over = max(d.after / d.bound for d in plan.decisions)
            print(
                f"{imbalance:9} {name:18} {min(times):7.3f} {statistics.median(times):7.3f}   {len(plan.replicas)} "
                f"replicas, worst node {over:.4f} of its bound"
            )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "scipy": scipy.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="loads of each case and imbalance (count; default 5)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    rows = run_cases(arguments.seeds)
    print_table(rows, arguments.seeds)
    print_large()
    missed = missed_bars(rows)
    print(
        f"\nBars, in every row: after <= {MOST_OVER_BOUND} x bound, no more replicas than UltraEP's rule, no replica "
        f"under {FLOOR} tokens: {'kept' if not missed else 'MISSED'}"
    )
    print("\n".join(missed))
    if arguments.json:
        kept = [r for r in rows if r["method"] in METHODS and r["imbalance"] in IMBALANCES]
        document = {"rows": kept, "hardware": hardware() | {"threads_used": 1}, "versions": versions()}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
