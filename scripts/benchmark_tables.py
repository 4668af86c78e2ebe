"""Write docs/benchmarks.md from benchmarks/results: what was measured or simulated, where, and by which command.

    python scripts/benchmark_tables.py [FILE]

A table is a few columns of a result; the files hold the rest. A test compares the page with the results.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

Row = Mapping[str, Any]
Table = list[list[str]]

SIZES = (4, 64)  # engines, in tables that have many

HEAD = """\
# Benchmarks

Every table has the ideal or a lower bound beside what was reached, and a case that does not win. Times of GPUs are
medians; simulated ones say so. The files in `benchmarks/results` have all rows, spreads and settings; this page is made
of them by `scripts/benchmark_tables.py`.
"""


@dataclass(frozen=True)
class Shown:
    """One table of the page.

    Attributes:
        title: of its section.
        file: in benchmarks/results.
        command: that made the file.
        text: what the columns mean, and what to see.
        table: from the file's content to a header and rows.
    """

    title: str
    file: str
    command: str
    text: str
    table: Callable[[Mapping[str, Any]], Table]


def number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def grouped(rows: Iterable[Row], key: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of ``key``, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return groups


def mean(rows: Sequence[Row], name: str, digits: int) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return number(statistics.fmean(values), digits) if values else "-"


def training(result: Mapping[str, Any]) -> Table:
    methods = ("stock", "ours", "foresight")
    table = [["model", "imbalance", *methods]]
    for (layout, imbalance), rows in grouped(result["rows"], ("layout", "imbalance")).items():
        of_method = grouped(rows, ("method",))
        speeds = [mean(of_method.get((method,), []), "fraction_of_balanced", 2) for method in methods]
        table.append([layout, str(imbalance), *speeds])
    return table


def exchange(result: Mapping[str, Any]) -> Table:
    table = [["part", "case", "method", "us", "bound, us", "of the bound"]]
    for row in result["rows"]:
        if row["bound_us"]:
            reached = number(row["bound_us"] / row["us"], 2)
            table.append(
                [row["part"], row["case"], row["method"], number(row["us"], 0), number(row["bound_us"], 0), reached]
            )
    return table


def planner(result: Mapping[str, Any]) -> Table:
    table = [["case", "imbalance", "method", "after", "bound", "replicas", "ms"]]
    for place, rows in grouped(result["rows"], ("case", "imbalance", "method")).items():
        table.append(
            [
                *(str(part) for part in place),
                mean(rows, "after", 3),
                mean(rows, "bound", 3),
                mean(rows, "replicas", 1),
                number(1e3 * statistics.fmean(row["seconds"] for row in rows), 2),
            ]
        )
    return table


def foresight(result: Mapping[str, Any]) -> Table:
    methods = ("none", "ultraep", "replicas", "ours", "ours-stale")
    table = [["homes at first", "kappa", *methods, "bound"]]
    for (case, kappa), rows in grouped(result["rows"], ("case", "kappa")).items():
        of_method = grouped([row for row in rows if row["imbalance"] == 1.5], ("method",))
        after = [mean(of_method[method,], "after", 2) for method in methods]
        table.append([case, str(kappa), *after, mean(of_method["ours",], "bound", 2)])
    return table


def composed(result: Mapping[str, Any]) -> Table:
    table = [["case", "kappa", "packed by length", "composed", "bound"]]
    for (case, kappa), rows in grouped(result["rows"], ("case", "kappa")).items():
        of_method = grouped(rows, ("method",))
        busiest = [mean(of_method[method,], "busiest", 3) for method in ("pack", "compose")]
        table.append([case, "trace" if kappa is None else str(kappa), *busiest, mean(rows, "bound", 3)])
    return table


def schedules(result: Mapping[str, Any]) -> Table:
    table = [["instance", "1F1B, one after the other", "greedy", "found", "published", "bound", "CPU s"]]
    for row in [*result["rows"], result["no_gain"]]:
        published = row.get("published") or {}
        table.append(
            [
                row["name"],
                number(row["serial"]["makespan"], 0),
                number(row["greedy"]["makespan"], 0),
                number(row["makespan"], 0),
                number(published.get("annealed"), 0),
                number(row["lower_bound"], 0),
                number(row["seconds"] + row["memory_seconds"], 1),
            ]
        )
    return table


def fused(result: Mapping[str, Any]) -> Table:
    table = [["case", "schedule", "ms", "predicted", "bound", "speed-up"]]
    for row in result["rows"]:
        times = [number(row[name], 0) for name in ("ms", "predicted", "bound")]
        table.append([row["case"], row["method"], *times, number(row["speedup"], 2)])
    return table


def modes(result: Mapping[str, Any]) -> Table:
    table = [["training's share", "mode", "step, s", "bound, s", "speed-up", "engines idle"]]
    for row in result["modes"]:
        seconds = [number(row[name], 0) for name in ("step_seconds", "bound")]
        table.append(
            [str(row["train_share"]), row["mode"], *seconds, number(row["speedup"], 2), f"{row['engine_idle']:.0%}"]
        )
    return table


def dispatch(result: Mapping[str, Any]) -> Table:
    """Makespan over its lower bound; predictors of every quality are in the file."""
    policies = ("fcfs", "longest_first", "skew_aware")
    table = [["engines", "lengths", "waves", *policies]]
    for place, rows in grouped(result["rows"], ("engines", "law", "sigma", "waves")).items():
        engines, law, sigma, waves = place
        if engines not in SIZES:
            continue
        best = []
        for policy in policies:
            of_policy = [row for row in rows if row["policy"] == policy]
            recalls = sorted({row["recall"] for row in of_policy}, key=lambda recall: recall or 0.0)
            kept = [row for row in of_policy if row["recall"] == recalls[len(recalls) // 2]]
            best.append(mean(kept, "ratio", 2))
        table.append([str(engines), f"{law} {sigma}", str(waves), *best])
    return table


def transfer(result: Mapping[str, Any]) -> Table:
    table = [["what", "variant", "GiB", "ms", "GB/s", "of the link"]]
    for row in result["rows"]:
        reached = number(row["fraction"], 2) if row["fraction"] else "-"
        size = number(row["gib"], 4 if row["gib"] < 0.01 else 1)
        table.append([row["what"], row["variant"], size, number(row["ms"], 2), number(row["gbps"], 0), reached])
    return table


def loop(result: Mapping[str, Any]) -> Table:
    table = [["mode", "step, s", "generate, s", "train, s", "speed-up", "allowed"]]
    for row in result["rows"]:
        seconds = [number(row[name], 1) for name in ("step_s", "generate_s", "train_s")]
        table.append([row["mode"], *seconds, number(row["speedup"], 2), number(row["allowed"], 2)])
    return table


def tail(result: Mapping[str, Any]) -> Table:
    """The best threshold of each case."""
    table = [["engines", "lengths", "inference", "best threshold", "seconds", "speed-up", "bound"]]
    for place, rows in grouped(result["simulated"], ("engines", "law", "sigma", "inference")).items():
        engines, law, sigma, inference = place
        if engines not in SIZES:
            continue
        best = max(rows, key=lambda row: row["speedup"])
        table.append(
            [
                str(engines),
                f"{law} {sigma}",
                f"{inference:.0%}",
                f"{best['fraction']:.0%}",
                number(best["seconds"], 1),
                number(best["speedup"], 2),
                number(best["bound"], 2),
            ]
        )
    return table


OF_BALANCED = (
    "Speed as a fraction of the same with balanced routes, the ideal; stock is Megatron alone, ours plans on exact "
    "loads, foresight ahead. At an imbalance of 1.0 there is nothing to gain."
)
PAGES = (
    Shown(
        "One MoE layer",
        "layer-gpu-ep4.json",
        "scripts/bench_layer.py",
        OF_BALANCED,
        training,
    ),
    Shown(
        "One transformer layer",
        "transformer-layer-gpu-ep4.json",
        "scripts/bench_layer.py --transformer-layer",
        OF_BALANCED,
        training,
    ),
    Shown(
        "A model of four layers",
        "model-gpu-ep4.json",
        "scripts/bench_model.py",
        OF_BALANCED,
        training,
    ),
    Shown(
        "Copies and gradients over NVLink",
        "exchange-gpu-ep4.json",
        "scripts/bench_exchange.py",
        "The bound is what the busiest link needs at the speed of a bare peer copy.",
        exchange,
    ),
    Shown(
        "The planner on exact loads",
        "plan-cpu.json",
        "scripts/bench_plan.py",
        "Simulated loads; imbalance (busiest rank over mean) after, its lower bound, replicas, time of one plan.",
        planner,
    ),
    Shown(
        "Steps planned ahead",
        "foresight-cpu.json",
        "scripts/bench_foresight.py --seeds 5",
        "Simulated: 64 ranks in nodes of 8, imbalance 1.5 inside a node; kappa is how alike micro-batches are (inf: "
        "equal). ultraep: replicas only, by its published rule; ours-stale goes by the batch before. Where hot experts "
        "are spread already (shuffled), moving them gains nothing.",
        foresight,
    ),
    Shown(
        "Composed micro-batches",
        "compose-cpu.json",
        "scripts/bench_compose.py",
        "The busiest nodes' tokens over the mean. Simulated lengths and routes, and two traces of real routes.",
        composed,
    ),
    Shown(
        "Fused pipeline schedules",
        "fused-schedule.json",
        "scripts/bench_fused_schedule.py",
        "Makespans in the instances' own unit, simulated; published: of RLHFuse's annealing. `2 x 64` gains nothing.",
        schedules,
    ),
    Shown(
        "Fused schedules, executed",
        "fused-emulated-cpu.json",
        "scripts/bench_fused.py --sleep 8",
        "Four ranks on CPUs whose stages sleep, so that two cores can show what four ranks do: emulated, not a speed.",
        fused,
    ),
    Shown(
        "Fused schedules, executed on GPUs",
        "fused-gpu.json",
        "scripts/bench_fused.py --gpu",
        "One rank a GPU, two layers of 8 experts a stage, stages of 33 ms forward and 72 ms backward; bar: within 10% "
        "of what was predicted. The case with many micro-batches, where there is less to win, was cut off by a time "
        "limit; it is above, emulated.",
        fused,
    ),
    Shown(
        "Streaming, simulated",
        "stream-cpu.json",
        "scripts/bench_stream.py",
        "Seconds of a step with engines as measured on a CPU; training's share is its time over that of generation.",
        modes,
    ),
    Shown(
        "Dispatch by predicted length, simulated",
        "stream-cpu.json",
        "scripts/bench_stream.py",
        "Makespan of generation over its lower bound, predictors of middling quality. With equal lengths, or many "
        "waves, there is little to win.",
        dispatch,
    ),
    Shown(
        "The loop on GPUs",
        "stream-real-gpu.json",
        "scripts/bench_stream_real.py --gpus 2",
        "With eager engines, lengths of at most 128 tokens, and weights through Ray's object store, training is by far "
        "the longer side and overlapping cannot win (allowed < 1).",
        loop,
    ),
    Shown(
        "The loop on GPUs, one step ahead",
        "stream-real-gpu-2.json",
        "scripts/bench_stream_real.py --gpus 2 --direct --modes one-step-continue colocated --longest 512 --median 96",
        "SmolLM2-135M upcycled to 8 experts, long-tailed lengths of at most 512 tokens, CUDA graphs. One step ahead, "
        "one GPU generates and one trains, weights by NCCL; colocated, both take turns, weights by CUDA IPC. Bar: 0.9 "
        "of the speed-up that the phases' times allow; 0.97 is reached.",
        loop,
    ),
    Shown(
        "Weights from trainer to engine",
        "transfer-gpu.json",
        "scripts/bench_transfer.py --gpu",
        "Two GPUs; the link is a bare peer copy. Bar: 70% of it.",
        transfer,
    ),
    Shown(
        "Weights to engines on the trainer's own GPUs",
        "transfer-staged-gpu.json",
        "scripts/bench_transfer.py --gpu --staged --gib 2",
        "Two GPUs, on each a trainer rank with half of the weights and an engine that wants all of them; what it is "
        "compared with is NCCL's broadcast of every byte from one rank to the other. The bar of 70% is missed.",
        transfer,
    ),
    Shown(
        "Inference in the tail of generation, simulated",
        "tail-cpu.json",
        "scripts/bench_tail.py",
        "Inference as a share of generation's time; the best threshold, in unfinished samples of the batch.",
        tail,
    ),
)


def page() -> str:
    parts = [HEAD]
    for shown in PAGES:
        result = json.loads((RESULTS / shown.file).read_text())
        header, *rows = shown.table(result)
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
        parts.append(
            f"## {shown.title}\n\n{shown.text}\n\n`{shown.command}` on {machine(result)}: "
            f"[{shown.file}](../benchmarks/results/{shown.file})\n\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def machine(result: Mapping[str, Any]) -> str:
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    gpus = hardware.get("gpus") or []
    what = f"{len(gpus)} {gpus[0]}" if gpus else f"{hardware.get('cores')} cores of {hardware.get('cpu')}"
    named = [f"{name} {versions[name]}" for name in ("torch", "megatron-core", "vllm") if versions.get(name)]
    return ", ".join([what, *named])


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page())
