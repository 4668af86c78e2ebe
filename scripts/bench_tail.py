#!/usr/bin/env python
"""When to gather generation's tail: a sweep of R_t, simulated; and one real run with and without. RLHFuse, section 4.

    python scripts/bench_tail.py [--engines 4 16 64] [--seeds 5] [--json benchmarks/results/tail-cpu.json]
    python scripts/bench_tail.py --real [--repeats 5] [--engines --json FILE]   # vLLM, Megatron and Ray on CPUs
    python scripts/bench_tail.py --profile latency.json       # of scripts/measure_latency.py

Simulated (``rl/simulation/tail.py``, with measured latencies of an engine): generation and inference of one batch share
the devices, an engine on each. Engines have 64 seats; a batch fills all of them once, in groups of 8 samples of one
prompt of 256 tokens. Lengths: log-normal or bimodal around a median of 1000 tokens, at most 8192; the last law, all
alike, is there because nothing can be won. ``inference``: its time on all devices / time of generation. A copy of the
models takes a quarter of the devices, changing hands 1% of generation. An engine takes all its seats of the tail, or as
many as leave its step within twice the time of one with a single sample (BS_max): the better of both, as the loop does.

- columns: speed-up of generation + inference over no fusion, by R_t as a percentage of the batch; mean over seeds.
- ``bound``: the speed-up that no order of the same work can beat.

Real: see ``scripts/bench_tail_real.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.rollout.latency import LatencyProfile  # noqa: E402
from rl.rollout.tail import seats_within  # noqa: E402
from rl.simulation.lengths import LengthLaw, draw_groups  # noqa: E402
from rl.simulation.tail import InferenceCost, simulate_tails  # noqa: E402
from rl.simulation.threshold import FRACTIONS  # noqa: E402
from scripts.bench_plan import versions  # noqa: E402
from scripts.machine import hardware  # noqa: E402

PROFILE = ROOT / "benchmarks" / "data" / "latency-tiny-cpu.json"
ENGINES = (4, 16, 64)
SEATS, SAMPLES, PROMPT_TOKENS, CAP = 64, 8, 256, 8192
KV_TOKENS = 1 << 20  # of an engine's cache: 60 GB at 57 KiB a token (28 layers, 4 heads of 128, two bytes)
LAWS = (
    LengthLaw("lognormal", 1000, 0.6, CAP),
    LengthLaw("lognormal", 1000, 1.0, CAP),
    LengthLaw("lognormal", 1000, 1.4, CAP),
    LengthLaw("bimodal", 1000, 0.4, CAP),
    LengthLaw("lognormal", 1000, 0.0, CAP),
)
SHARES = (0.1, 0.3, 0.6)
SWITCH_SHARE = 0.01


def rows_of(
    profile: LatencyProfile, engines: int, law: LengthLaw, share: float, seeds: int, tail_seats: int
) -> list[dict[str, Any]]:
    """A row per fraction of the batch, means over seeds; times in seconds."""
    found: dict[float, list[dict[str, float]]] = {fraction: [] for fraction in FRACTIONS}
    for seed in range(seeds):
        groups = draw_groups(law, engines * SEATS // SAMPLES, SAMPLES, seed, PROMPT_TOKENS)
        samples, tokens = engines * SEATS, sum(group.tokens for group in groups)
        settings: dict[str, Any] = {"engines": engines, "seats": SEATS, "kv_tokens": KV_TOKENS}
        settings["tail_seats"] = tail_seats
        free = simulate_tails(groups, profile, costs=InferenceCost(0.0), thresholds=[], **settings)
        generate = free.plain.generated
        costs = InferenceCost(share * generate * engines / tokens, SWITCH_SHARE * generate, max(1, engines // 4))
        by_fraction = {fraction: round(fraction * samples) for fraction in FRACTIONS}
        longest = PROMPT_TOKENS + CAP
        sweep = simulate_tails(
            groups, profile, costs=costs, thresholds=list(by_fraction.values()), longest=longest, **settings
        )
        for fraction, threshold in by_fraction.items():
            times = sweep.by_threshold.get(threshold, sweep.plain)
            found[fraction].append(
                {
                    "seconds": times.seconds,
                    "generated": times.generated,
                    "speedup": sweep.plain.seconds / times.seconds,
                    "bound": sweep.plain.seconds / sweep.bound,
                    "hidden": times.hidden_tokens / tokens,
                    "kept": float(times.kept),
                    "moved": float(times.moved),
                }
            )
    case = {"engines": engines, "law": law.name, "sigma": law.sigma, "inference": share, "seeds": seeds}
    case["tail_seats"] = tail_seats
    return [
        case
        | {"fraction": fraction}
        | {name: statistics.fmean(one[name] for one in some) for name in some[0]}
        | {"speedup_worst": min(one["speedup"] for one in some)}
        for fraction, some in found.items()
    ]


def best_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in BS_max only, the fastest."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("engines", "law", "sigma", "inference", "fraction"))
        if key not in found or row["speedup"] > found[key]["speedup"]:
            found[key] = row
    return list(found.values())


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A line per law and share of inference, a column per fraction."""
    print(f"{'law':>9} {'sigma':>5} {'inference':>9}", end="")
    print("".join(f" {fraction:6.0%}" for fraction in FRACTIONS) + f" {'bound':>6} {'best':>5} {'BS_max':>6}")
    for case in dict.fromkeys((row["law"], row["sigma"], row["inference"]) for row in rows):
        some = [row for row in rows if (row["law"], row["sigma"], row["inference"]) == case]
        best = max(some, key=lambda row: (row["speedup"], -row["fraction"]))
        print(f"{case[0]:>9} {case[1]:5.1f} {case[2]:9.0%}", end="")
        print("".join(f" {row['speedup']:6.3f}" for row in some), end="")
        print(f" {some[0]['bound']:6.3f} {best['fraction']:5.0%} {best['tail_seats']:6d}")


def not_won(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Cases in which a fraction is slower than no fusion, or nothing is faster."""
    told = []
    for case in dict.fromkeys((row["engines"], row["law"], row["sigma"], row["inference"]) for row in rows):
        some = [r for r in rows if (r["engines"], r["law"], r["sigma"], r["inference"]) == case and r["fraction"]]
        worse = [row for row in some if row["speedup"] < 1 - 1e-9]
        name = f"{case[0]} engines, {case[1]} {case[2]:g}, inference {case[3]:.0%}"
        if max(row["speedup"] for row in some) <= 1 + 1e-9:
            told.append(f"{name}: at no R_t")
        elif worse:
            told.append(f"{name}: not at {', '.join(format(row['fraction'], '.0%') for row in worse)}")
    return told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=int, nargs="*", default=ENGINES, help="engines (default: 4 16 64)")
    parser.add_argument("--seeds", type=int, default=5, help="batches of each case (count; default 5)")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="measured latencies of an engine (JSON)")
    parser.add_argument("--real", action="store_true", help="also run vLLM and Megatron on CPUs")
    parser.add_argument("--repeats", type=int, default=5, help="real: batches with and without, in turns (default 5)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args(argv)

    profile, begun, rows = LatencyProfile.load(arguments.profile), time.perf_counter(), []
    if arguments.engines:
        print(f"Simulated, with engine latencies measured in {arguments.profile.name}: speed-up over no fusion")
    for engines in arguments.engines:
        print(f"\n{engines} engines of {SEATS} seats", flush=True)
        some = []
        for law, share in itertools.product(LAWS, SHARES):
            for tail_seats in sorted({seats_within(profile, SEATS), SEATS}):
                some += rows_of(profile, engines, law, share, arguments.seeds, tail_seats)
        print_rows(best_of(some))
        rows += some
    if rows:
        lost = not_won(best_of(rows))
        print(f"\nWhere gathering does not win ({len(lost)} cases):")
        print("\n".join(lost) if lost else "nowhere in these cases")
        print(f"\nSimulated in {time.perf_counter() - begun:.0f} s.")
    real = None
    if arguments.real:
        from scripts.bench_tail_real import measure

        real = measure(profile, arguments.repeats)
    if arguments.json:
        document = {"simulated": rows, "real": real, "profile": arguments.profile.name}
        write(arguments.json, document | {"hardware": hardware(), "versions": versions()})
    return 0 if real is None or real["identical"] else 1


def write(path: Path, document: dict[str, Any]) -> None:
    """A simulated row a line."""
    text = json.dumps(document | {"simulated": None}, indent=1)
    lines = ",\n  ".join(json.dumps(rounded(row)) for row in document["simulated"])
    path.write_text(text.replace('"simulated": null', f'"simulated": [\n  {lines}\n ]', 1) + "\n")


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
