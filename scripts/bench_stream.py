#!/usr/bin/env python
"""Who generates what, and what training gains from samples that arrive one by one. Simulated, from measured latencies.

    python scripts/bench_stream.py [--engines 4 16 64 512] [--seeds 5] [--json benchmarks/results/stream-cpu.json]
    python scripts/bench_stream.py --profile latency.json       # of scripts/measure_latency.py
    python scripts/bench_stream.py --real rows.json             # against measured runs, see rl/simulation/real_rows.py

Discrete events (``rl.simulation``) with the dispatch policies that real runs use. Engines have 64 seats; a group is 8
samples of one prompt; as many groups as fill all seats once (one wave) or several times. Lengths: log-normal around
2000 tokens, at most 30,000, a fifth of the variance between samples of the same prompt; bimodal: a tenth of the prompts
are 8 times as long. Predictions are of each group's longest response, and find the given share of the longest fifth
(``recall``; 1.0 is the oracle, 0.87 what StreamRL publishes).

- ``fcfs``, ``random``: need no predictions.
- ``longest_first``; ``skew_aware``: the longest fifth on engines of their own.
- ``bound``: no schedule is shorter: the longest sample alone, or all tokens at the best throughput.

``ratio`` is makespan / bound, mean over seeds, the worst in brackets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.rollout.dispatch import Dispatch, get_dispatch  # noqa: E402
from rl.rollout.latency import LatencyProfile  # noqa: E402
from rl.simulation.generation import Generation, SimGroup, lower_bound  # noqa: E402
from rl.simulation.lengths import LengthLaw, draw_groups, with_predictions  # noqa: E402
from rl.simulation.loops import LoopSettings, TrainCost, simulate  # noqa: E402
from rl.simulation.real_rows import compare, read_real_rows  # noqa: E402
from scripts.bench_plan import versions  # noqa: E402
from scripts.machine import hardware  # noqa: E402

PROFILE = ROOT / "benchmarks" / "data" / "latency-tiny-cpu.json"
ENGINES = (4, 16, 64, 512)
SEATS, SAMPLES, PROMPT_TOKENS = 64, 8, 256
LAWS = (
    LengthLaw("lognormal", sigma=0.6),
    LengthLaw("lognormal", sigma=1.0),
    LengthLaw("lognormal", sigma=1.4),
    LengthLaw("bimodal", sigma=0.4),
)
POLICIES = (
    ("fcfs", None),
    ("random", None),
    ("longest_first", 0.5),
    ("longest_first", 0.87),
    ("longest_first", 1.0),
    ("skew_aware", 0.5),
    ("skew_aware", 0.87),
    ("skew_aware", 1.0),
)
WAVES, WAVES_OF_MANY, MANY = (1, 4), (1, 2), 512
MOST_ERROR = 0.10  # of simulated step times against measured ones

STEPS, LOOP_ENGINES, LOOP_WAVES = 8, 16, 2
TRAIN_SHARES = (0.25, 0.5, 1.0)  # training time of a set / its generation time under fcfs
LOOPS = (
    ("sync", LoopSettings("sync")),
    ("streaming", LoopSettings("streaming")),
    ("async 1, continue", LoopSettings("async", staleness=1)),
    ("async 1, finish", LoopSettings("async", staleness=1, in_flight="finish")),
    ("async 2, continue", LoopSettings("async", staleness=2)),
)
CHUNKS = 8  # of a set
TRANSFER_SHARE = 0.02  # of a generation under fcfs


def policy(name: str, profile: LatencyProfile, seed: int) -> Dispatch:
    settings: dict[str, Any] = {"random": {"seed": seed}, "skew_aware": {"step_seconds": profile}}.get(name, {})
    return get_dispatch(name, **settings)


def generation_of(profile: LatencyProfile, engines: int, dispatch: Dispatch) -> Generation:
    return Generation(
        profile,
        engines,
        SEATS,
        dispatch,
        prefill_seconds_per_token=profile.prefill_seconds_per_token,
        group_seconds=profile.group_seconds,
        ask_every=max(1, engines // 8),
    )


def makespans(
    profile: LatencyProfile, engines: int, law: LengthLaw, waves: int, seed: int
) -> Iterator[tuple[str, float | None, float, float]]:
    """``(policy, recall, makespan, bound)`` of every policy on the same groups."""
    groups = draw_groups(law, engines * SEATS * waves // SAMPLES, SAMPLES, seed, PROMPT_TOKENS)
    bound = lower_bound(profile, groups, SEATS, [1.0] * engines)
    for name, recall in POLICIES:
        given = groups if recall is None else with_predictions(groups, recall, seed)
        generation = generation_of(profile, engines, policy(name, profile, seed))
        generation.submit(given)
        generation.run()
        yield name, recall, generation.now, bound


def dispatch_rows(
    profile: LatencyProfile, engines: int, law: LengthLaw, waves: int, seeds: int
) -> list[dict[str, Any]]:
    """One row per policy, over all seeds; times in seconds."""
    found: dict[tuple[str, float | None], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        for name, recall, makespan, bound in makespans(profile, engines, law, waves, seed):
            found.setdefault((name, recall), []).append((makespan, bound))
    return [
        {
            "engines": engines,
            "law": law.name,
            "sigma": law.sigma,
            "waves": waves,
            "policy": name,
            "recall": recall,
            "makespan": statistics.fmean(makespan for makespan, _ in some),
            "lower_bound": statistics.fmean(bound for _, bound in some),
            "ratio": statistics.fmean(makespan / bound for makespan, bound in some),
            "ratio_worst": max(makespan / bound for makespan, bound in some),
            "seeds": seeds,
        }
        for (name, recall), some in found.items()
    ]


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A line per law and waves, a column per policy."""
    print(f"{'law':>9} {'sigma':>5} {'waves':>5} {'bound s':>8}", end="")
    for name, recall in POLICIES:
        print(f" {name.replace('_', ' ')[:9] + ('' if recall is None else f' {recall:g}'):>15}", end="")
    print()
    for case in dict.fromkeys((row["law"], row["sigma"], row["waves"]) for row in rows):
        some = [row for row in rows if (row["law"], row["sigma"], row["waves"]) == case]
        print(f"{case[0]:>9} {case[1]:5.1f} {case[2]:5d} {some[0]['lower_bound']:8.1f}", end="")
        for row in some:
            print(f" {row['ratio']:6.3f} ({row['ratio_worst']:6.3f})", end="")
        print()


def loop_rows(profile: LatencyProfile, law: LengthLaw, share: float, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Step times of the modes, all with longest-first at StreamRL's recall."""
    found: dict[str, list[dict[str, float]]] = {}
    per_set = LOOP_ENGINES * SEATS * LOOP_WAVES // SAMPLES
    for seed in range(seeds):
        batches: list[list[SimGroup]] = []
        for step in range(steps):
            groups = draw_groups(law, per_set, SAMPLES, seed, PROMPT_TOKENS, step, step * per_set)
            batches.append(with_predictions(groups, 0.87, seed))
        plain = generation_of(profile, LOOP_ENGINES, get_dispatch("fcfs"))
        plain.submit(batches[0])
        plain.run()
        tokens = statistics.fmean(sum(group.tokens for group in groups) for groups in batches)
        fixed = 0.02 * share * plain.now / CHUNKS
        train = TrainCost(fixed, 0.98 * share * plain.now / tokens)
        alone = statistics.fmean(lower_bound(profile, groups, SEATS, [1.0] * LOOP_ENGINES) for groups in batches)
        tokens_bound = lower_bound(profile, list(itertools.chain(*batches)), SEATS, [1.0] * LOOP_ENGINES) / steps
        for name, settings in LOOPS:
            settings = replace(
                settings, chunk_groups=max(1, per_set // CHUNKS), transfer_seconds=TRANSFER_SHARE * plain.now
            )
            generation = generation_of(profile, LOOP_ENGINES, get_dispatch("longest_first"))
            result = simulate(batches, generation, train, settings)
            # With staleness, sets overlap: only all tokens together bound generation.
            generating = tokens_bound if settings.staleness else alone
            found.setdefault(name, []).append(
                {
                    "step_seconds": result.makespan / steps,
                    "bound": max(generating, share * plain.now) if settings.staleness else generating,
                    "engine_idle": result.engine_idle,
                    "trainer_idle": result.trainer_idle,
                }
            )
    sync = statistics.fmean(each["step_seconds"] for each in found["sync"])
    return [
        {"mode": name, "law": law.name, "sigma": law.sigma, "train_share": share, "seeds": seeds, "steps": steps}
        | {key: statistics.fmean(each[key] for each in some) for key in some[0]}
        | {"speedup": sync / statistics.fmean(each["step_seconds"] for each in some)}
        for name, some in found.items()
    ]


def print_loops(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'training/generation':>19} {'mode':18} {'step s':>8} {'bound s':>8} {'over sync':>9} "
        f"{'engines idle':>12} {'trainer idle':>12}"
    )
    for row in rows:
        print(
            f"{row['train_share']:19.2f} {row['mode']:18} {row['step_seconds']:8.1f} {row['bound']:8.1f} "
            f"{row['speedup']:9.3f} {row['engine_idle']:12.1%} {row['trainer_idle']:12.1%}"
        )


def not_won(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Cases in which a policy of ours is slower than first come, first served."""
    told = []
    for row in rows:
        if row["policy"] not in ("longest_first", "skew_aware"):
            continue
        keys = ("engines", "law", "sigma", "waves")
        plain = next(r for r in rows if r["policy"] == "fcfs" and all(r[key] == row[key] for key in keys))
        if row["ratio"] > plain["ratio"]:
            told.append(
                f"{row['engines']} engines, {row['law']} {row['sigma']:g}, {row['waves']} waves: {row['policy']} at "
                f"recall {row['recall']:g} {row['ratio']:.3f}, fcfs {plain['ratio']:.3f}"
            )
    return told


def compare_real(path: Path, profile: LatencyProfile) -> tuple[list[dict[str, Any]], list[str]]:
    """Simulated step times beside measured ones, and those further apart than the bar."""
    rows = [compare(row, profile) for row in read_real_rows(path)]
    print(f"\nAgainst measured runs ({path.name})")
    print(f"{'mode':12} {'engines':>7} {'steps':>5} {'measured s':>10} {'simulated s':>11} {'error':>7}")
    for row in rows:
        print(
            f"{row['mode']:12} {row['engines']:7d} {row['steps']:5d} {row['measured_step_seconds']:10.3f} "
            f"{row['simulated_step_seconds']:11.3f} {row['error']:+7.1%}"
        )
    missed = [f"{row['mode']}: {row['error']:+.1%} off" for row in rows if abs(row["error"]) > MOST_ERROR]
    print(f"Bar: within {MOST_ERROR:.0%}: {'kept' if not missed else 'MISSED: ' + ', '.join(missed)}")
    return rows, missed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=int, nargs="*", default=ENGINES, help="engines (default: 4 16 64 512)")
    parser.add_argument("--seeds", type=int, default=5, help="sets of groups of each case (count; default 5)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the modes; 0: not simulated")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="measured latencies of an engine (JSON)")
    parser.add_argument("--real", type=Path, help="measured runs to compare with (JSON)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--bars", action="store_true", help="exit with 1 when a bar is missed")
    arguments = parser.parse_args(argv)

    profile, begun = LatencyProfile.load(arguments.profile), time.perf_counter()
    print(f"Simulated, with engine latencies measured in {arguments.profile.name}")
    rows: list[dict[str, Any]] = []
    for engines in arguments.engines:
        print(f"\n{engines} engines of {SEATS} seats: makespan / bound", flush=True)
        some: list[dict[str, Any]] = []
        for law in LAWS:
            for waves in WAVES_OF_MANY if engines >= MANY else WAVES:
                some += dispatch_rows(profile, engines, law, waves, arguments.seeds)
        print_rows(some)
        rows += some
    if rows:
        lost = not_won(rows)
        print(f"\nWhere ours does not win ({len(lost)} of {sum(r['recall'] is not None for r in rows)}):")
        print("\n".join(lost) if lost else "nowhere in these cases")
    loops: list[dict[str, Any]] = []
    if arguments.steps:
        print(f"\nModes, {LOOP_ENGINES} engines, log-normal 1.0, {LOOP_WAVES} waves, {arguments.steps} steps")
        for share in TRAIN_SHARES:
            loops += loop_rows(profile, LAWS[1], share, arguments.seeds, arguments.steps)
        print_loops(loops)
        print(
            "Streaming hides no more than what trains before the last sample has come; with little training it gains "
            "little.\n'finish' lets engines run empty for every set of weights and can lose what overlap gains."
        )
    real: list[dict[str, Any]] = []
    missed: list[str] = []
    if arguments.real:
        real, missed = compare_real(arguments.real, profile)
    print(f"\nAll of it simulated in {time.perf_counter() - begun:.0f} s.")
    if arguments.json:
        document = {
            "simulated": True,
            "profile": arguments.profile.name,
            "rows": rows,
            "modes": loops,
            "real": real,
            "missed": missed,
            "hardware": hardware(),
            "versions": versions(),
        }
        write(arguments.json, document)
    return 1 if missed and arguments.bars else 0


def write(path: Path, document: dict[str, Any]) -> None:
    """A row a line."""
    tables = ("rows", "modes", "real")
    text = json.dumps(document | dict.fromkeys(tables), indent=1)
    for name in tables:
        lines = ",\n  ".join(json.dumps(rounded(row)) for row in document[name])
        text = text.replace(f'"{name}": null', f'"{name}": [\n  {lines}\n ]' if lines else f'"{name}": []')
    path.write_text(text + "\n")


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
