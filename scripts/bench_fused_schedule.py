#!/usr/bin/env python
"""Fused schedules of two models on one pipeline against published ones, brute force and plain 1F1B. Simulated.

    python scripts/bench_fused_schedule.py --instances FILE [--seconds 60] [--memory-seconds 300] [--json FILE] [--bars]

Every method runs here, on one core; only the rows named published are quoted from the file of instances.

- ``serial``: 1F1B of one model, then of the other, with a barrier between them: what two trainings take.
- ``concatenated``: the same orders without a barrier.
- ``greedy``: the published start of the search, by our own scheduler.
- ``fused``: ours. ``seconds`` is processor time until its makespan was first reached, ``memory_seconds`` from there
  until its peak memory was. Where published figures are given, a makespan as short is short enough, and
- ``shortest`` is the search without that goal (and without its memory phase), where the lower bound is below.

``lower_bound`` is ours (heads, work and tails of every node). Memory is the fullest node's activations. What 1F1B holds
is what the two models need one after the other, which published rows call the lower bound of memory.

Bars: the published makespan or less in every instance; its peak memory where that is what 1F1B holds, else within 10%.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ultraep.pipeline.baselines import concatenated, serial_makespan, serial_peak_memory  # noqa: E402
from megatron_ultraep.pipeline.bound import lower_bound  # noqa: E402
from megatron_ultraep.pipeline.exact import optimal_makespan  # noqa: E402
from megatron_ultraep.pipeline.greedy import greedy  # noqa: E402
from megatron_ultraep.pipeline.problem import PipelineModel, Problem  # noqa: E402
from megatron_ultraep.pipeline.simulate import simulate  # noqa: E402
from megatron_ultraep.pipeline.solve import solve  # noqa: E402
from scripts.machine import hardware  # noqa: E402
from tests.megatron_ultraep.pipeline.cases import random_problem  # noqa: E402

MOST_MEMORY = 1.10
ROUNDING = 1e-6
EASY_SECONDS = 5.0  # where fusing does not win
SMALL_ROUNDS = 4  # of the search on instances that are solved exactly
HEAD = (
    f"{'name':8} {'method':12} {'makespan':>9} {'bound':>7} {'/ bound':>8} {'speed-up':>8} {'memory':>7} {'seconds':>8}"
)


def warm_up() -> float:
    """Seconds that compiling takes (or loading what a run before has compiled)."""
    begun = time.process_time()
    solve(random_problem(0), rounds=1, memory_rounds=1)
    return time.process_time() - begun


def measure(
    name: str, problem: Problem, seconds: float, memory_seconds: float, seed: int, goal: float | None = None
) -> dict[str, Any]:
    """Ours and the comparators on one problem; with ``goal`` a makespan is short enough."""
    serial = serial_makespan(problem)
    holds = serial_peak_memory(problem)
    joined = simulate(concatenated(problem))
    begun = time.process_time()
    by_rule = simulate(greedy(problem))
    greedy_seconds = time.process_time() - begun
    begun, wall = time.process_time(), time.monotonic()
    found = solve(problem, seed, seconds, memory_seconds, makespan_goal=goal, clock=time.process_time)
    return {
        "name": name,
        "makespan": found.makespan,
        "lower_bound": found.bound,
        "peak_memory": found.peak_memory,
        "seconds": found.seconds,
        "memory_seconds": found.memory_seconds,
        "searched_seconds": time.process_time() - begun,
        "wall_seconds": time.monotonic() - wall,
        "rounds": found.rounds,
        "memory_rounds": found.memory_rounds,
        "memory_bound": found.memory_bound,
        "bubble": found.timeline.bubble,
        "digest": found.schedule.digest(),
        "serial": {"makespan": serial, "peak_memory": holds},
        "concatenated": {"makespan": joined.makespan, "peak_memory": max(joined.peak_memory)},
        "greedy": {
            "makespan": by_rule.makespan,
            "peak_memory": max(by_rule.peak_memory),
            "seconds": greedy_seconds,
        },
    }  # fmt: skip


def missed_bars(row: dict[str, Any]) -> list[str]:
    """What a row promises against its published figures and does not keep."""
    published = row.get("published")
    if published is None:
        return []
    missed = []
    if row["makespan"] > published["annealed"] * (1 + ROUNDING):
        missed.append(f"{row['name']}: makespan {row['makespan']:g}, published {published['annealed']:g}")
    reached, holds = published["annealed_peak_memory"], published["memory_lower_bound"]
    most = reached if reached <= holds * (1 + ROUNDING) else MOST_MEMORY * reached
    if row["peak_memory"] > most * (1 + ROUNDING):
        missed.append(f"{row['name']}: peak memory {row['peak_memory']:g}, more than {most:g} (published {reached:g})")
    return missed


def print_row(row: dict[str, Any]) -> None:
    """A line for each method."""
    serial, bound = row["serial"]["makespan"], row["lower_bound"]

    def line(method: str, makespan: float, memory: float, seconds: float | None) -> None:
        took = "" if seconds is None else f"{seconds:8.1f}"
        print(
            f"{row['name']:8} {method:12} {makespan:9g} {bound:7g} {makespan / bound:8.4f} {serial / makespan:7.3f}x "
            f"{memory:7.2f} {took}"
        )

    for method in ("serial", "concatenated", "greedy"):
        line(method, row[method]["makespan"], row[method]["peak_memory"], row[method].get("seconds"))
    line("fused", row["makespan"], row["peak_memory"], row["seconds"] + row["memory_seconds"])
    if "shortest" in row:
        line("shortest", *row["shortest"].values())
    if "published" in row:
        published = row["published"]
        line("(published)", published["annealed"], published["annealed_peak_memory"], None)


def against_brute_force(count: int) -> dict[str, Any]:
    """Random small problems: how often the search finds the shortest makespan, and where it does not."""
    ratios, bounds, unsolved = [], [], 0
    for seed in range(count):
        problem = random_problem(seed)
        found = solve(problem, rounds=SMALL_ROUNDS, memory_rounds=0, seconds=60.0)
        try:
            best = optimal_makespan(problem, found.makespan + ROUNDING)
        except TimeoutError:
            unsolved += 1
            continue
        ratios.append(found.makespan / min(best, found.makespan))
        bounds.append(lower_bound(problem) / best)
    return {
        "problems": count,
        "solved_exactly": len(ratios),
        "too_large": unsolved,
        "optimal_share": float(np.mean([ratio <= 1 + ROUNDING for ratio in ratios])),
        "worst_ratio": max(ratios),
        "bound_is_optimum_share": float(np.mean([ratio >= 1 - ROUNDING for ratio in bounds])),
        "bound_above_optimum": sum(ratio > 1 + ROUNDING for ratio in bounds),
    }


def where_fusing_does_not_win() -> dict[str, Any]:
    """Many micro-batches on few stages: 1F1B's bubbles are 1/65 of the time, and nothing more is to be had."""
    models = tuple(
        PipelineModel.uniform(
            name, stages=2, microbatches=64, forward=f, backward=2 * f, activation=1.0, reversed=name == "small"
        )
        for name, f in (("large", 5.0), ("small", 4.0))
    )
    return measure("2 x 64", Problem(2, models), EASY_SECONDS, EASY_SECONDS, 0)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=Path, required=True, metavar="FILE", help="JSON with a list `instances`")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="instances to run (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="most processor time for the makespan")
    parser.add_argument("--memory-seconds", type=float, default=300.0, help="most processor time for memory after that")
    parser.add_argument("--small", type=int, default=40, metavar="N", help="random problems for brute force")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--bars", action="store_true", help="exit with 1 when a bar is missed")
    arguments = parser.parse_args(argv)

    instances = json.loads(arguments.instances.read_text())["instances"]
    names = [given["name"] for given in instances]
    unknown = sorted(set(arguments.only or names) - set(names))
    if unknown:
        parser.error(f"--only: expected names of {', '.join(names)}; got {', '.join(unknown)}")
    document: dict[str, Any] = {
        "simulated": True,
        "rows": [],
        "compile_seconds": warm_up(),
        "settings": {"seconds": arguments.seconds, "memory_seconds": arguments.memory_seconds, "seed": arguments.seed},
        "hardware": hardware() | {"threads_used": 1, "load_average": os.getloadavg()[0]},
        "versions": versions(),
    }
    missed: list[str] = []
    print(HEAD)
    for given in instances:
        if arguments.only and given["name"] not in arguments.only:
            continue
        problem = Problem.of_instance(given)
        published = given.get("published")
        goal = None if published is None else published["annealed"]
        row = measure(given["name"], problem, arguments.seconds, arguments.memory_seconds, arguments.seed, goal)
        if published is not None:
            row["published"] = published
            if row["lower_bound"] < goal * (1 - ROUNDING):
                shortest = solve(problem, arguments.seed, arguments.seconds, 0.0, clock=time.process_time)
                row["shortest"] = {
                    "makespan": shortest.makespan,
                    "peak_memory": shortest.peak_memory,
                    "seconds": shortest.seconds,
                }
        print_row(row)
        sys.stdout.flush()
        missed += missed_bars(row)
        document["rows"].append(row)
        write(arguments.json, document)
    if arguments.small:
        document["brute_force"] = exact = against_brute_force(arguments.small)
        print(
            f"\n{exact['problems']} random small problems, {exact['solved_exactly']} solved by brute force: the search "
            f"finds the shortest makespan in {exact['optimal_share']:.1%}, at worst {exact['worst_ratio']:.4f} x it;\n"
            f"the lower bound is right in {exact['bound_is_optimum_share']:.1%}, too high in "
            f"{exact['bound_above_optimum']}"
        )
        if exact["bound_above_optimum"]:
            missed.append(f"the lower bound is above the optimum in {exact['bound_above_optimum']} small problems")
    print("\nWhere fusing does not win: 64 micro-batches of both models on 2 stages")
    document["no_gain"] = easy = where_fusing_does_not_win()
    print_row(easy)
    document["missed"] = missed
    print(
        f"\nSimulated times and activations. Bars: the published makespan everywhere; peak memory as published where "
        f"that is what 1F1B holds,\nelse within {MOST_MEMORY - 1:.0%}: {'kept' if not missed else 'MISSED'}"
    )
    print("\n".join(missed))
    write(arguments.json, document)
    return 1 if missed and arguments.bars else 0


def write(file: Path | None, document: dict[str, Any]) -> None:
    """The document with a row a line; a run that is cut off leaves what it has."""
    if file is None:
        return
    head, tail = json.dumps(document | {"rows": []}, indent=1).split('"rows": []')
    lines = ",\n  ".join(json.dumps(_rounded(row)) for row in document["rows"])
    file.write_text(f'{head}"rows": [\n  {lines}\n ]{tail}\n')


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 4) if isinstance(value, float) else _rounded(value) if isinstance(value, dict) else value
        for key, value in row.items()
    }


if __name__ == "__main__":
    sys.exit(main())
