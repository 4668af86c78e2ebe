"""Keep what a run showed, small: python scripts/keep_run.py RUN docs/runs/NAME [--without-balancing RUN]

Writes report.html, metrics.jsonl, the time line (gzip), the newest routing trace of at most --trace-mib, the resolved
configuration, and index.md: held-out accuracy, the KL between rollout and training with replay and without, the time of
each phase, imbalance, and the same run without balancing beside it, with its metrics: medians of the steps that both
runs have. The page names the commands that make it again.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rl.evaluation import eval_files, read_eval, summarize_samples
from rl.ledger import Ledger
from rl.metrics import read_metrics
from rl.report import wilson_interval, write_report

WITHOUT = "metrics-without-balancing.jsonl"
SKIPPED = 2  # first steps, which compile kernels
Metrics = Mapping[int, Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--without-balancing", type=Path, help="the same run with balance.enabled=false")
    parser.add_argument("--command", action="append", default=[], help="that made the run, for the page; repeatable")
    parser.add_argument("--hardware", default="", help="for the page, e.g. 2 NVIDIA H200")
    parser.add_argument("--trace-mib", type=float, default=4.0)
    arguments = parser.parse_args()
    target: Path = arguments.directory
    target.mkdir(parents=True, exist_ok=True)
    kept = keep_files(arguments.run, target, arguments.trace_mib)
    if arguments.without_balancing:
        shutil.copy(arguments.without_balancing / "metrics.jsonl", target / WITHOUT)
        kept.append(WITHOUT)
    text = page(arguments.run, arguments.without_balancing, arguments.command, arguments.hardware, kept)
    (target / "index.md").write_text(text)
    print(f"{target}: {', '.join(sorted(kept))}, index.md")


def keep_files(run: Path, target: Path, trace_mib: float) -> list[str]:
    """Copy what is worth keeping; returns the names."""
    kept = ["report.html", "metrics.jsonl", "config.yaml"]
    write_report(run, target / "report.html")
    shutil.copy(run / "metrics.jsonl", target / "metrics.jsonl")
    config = Ledger.read(run).run["config"]
    (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if (run / "timeline.json").is_file():
        with gzip.open(target / "timeline.json.gz", "wb") as out:
            out.write((run / "timeline.json").read_bytes())
        kept.append("timeline.json.gz")
    traces = sorted((run / "traces").glob("*.safetensors"))
    small = [trace for trace in traces if trace.stat().st_size <= trace_mib * 2**20]
    if small:
        shutil.copy(small[-1], target / small[-1].name)
        kept.append(small[-1].name)
    elif traces:
        print(f"no routing trace kept: the smallest has {min(t.stat().st_size for t in traces) / 2**20:.1f} MiB")
    return kept


def page(run: Path, without: Path | None, commands: Sequence[str], hardware: str, kept: Sequence[str]) -> str:
    ledger, metrics = Ledger.read(run), read_metrics(run)
    versions = {name: version for name, version in ledger.run["versions"].items() if version}
    lines = [f"# {ledger.run['config']['run']['name']}", ""]
    lines += [f"{hardware}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    if commands:
        lines += ["", "```sh", *commands, "```"]
    lines += ["", "Files: " + ", ".join(f"[{name}]({name})" for name in kept) + "."]
    lines += ["", "## Held out", "", *held_out(run, ledger.run["config"]["evaluation"]["correct_from"])]
    lines += ["", "## Rollout against training", "", *agreement(metrics)]
    other = read_metrics(without) if without else None
    lines += ["", "## Time of a step by phase", "", *phases(*paired(metrics, other))]
    lines += ["", "## Imbalance", "", *imbalance(*paired(metrics, other))]
    return "\n".join(lines) + "\n"


def held_out(run: Path, correct_from: float) -> list[str]:
    lines = ["| after step | prompts | accuracy | 95% interval |", "|---|---|---|---|"]
    for step, path in sorted(eval_files(run).items()):
        result = summarize_samples(step, read_eval(path), correct_from)
        low, high = wilson_interval(result.accuracy, result.count)
        lines.append(f"| {step} | {result.count} | {result.accuracy:.1%} | {low:.1%} to {high:.1%} |")
    return lines


def paired(metrics: Metrics, other: Metrics | None) -> tuple[Metrics, Metrics | None]:
    """Of both runs, the steps that both have."""
    if other is None:
        return metrics, None
    common = sorted(set(metrics) & set(other))
    return {step: metrics[step] for step in common}, {step: other[step] for step in common}


def median(metrics: Metrics, name: str) -> float | None:
    values = [values[name] for step, values in sorted(metrics.items()) if name in values and step > SKIPPED]
    return statistics.median(values) if values else None


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def agreement(metrics: Metrics) -> list[str]:
    lines = ["| | with rollout's routes | with training's own |", "|---|---|---|"]
    for label, name in (
        ("KL, k3, mean over tokens", "rollout_kl"),
        ("mean of differences", "rollout_logprob_abs_diff"),
    ):
        ours, own = median(metrics, f"train/{name}"), median(metrics, f"train/{name}_own_routes")
        lines.append(f"| {label} | {shown(ours, '.2e')} | {shown(own, '.2e')} |")
    worst = max(
        (values["train/rollout_kl"] for values in metrics.values() if "train/rollout_kl" in values), default=None
    )
    lines += ["", f"Medians over steps, nats per token; the largest KL of a step is {shown(worst, '.2e')}."]
    return lines


def phases(metrics: Metrics, without: Metrics | None) -> list[str]:
    names = sorted({name for values in metrics.values() for name in values if name.startswith("perf/time/")})
    lines = ["| phase | seconds | without balancing |", "|---|---|---|"]
    for name in [*names, "perf/step_time"]:
        values = median(metrics, name), median(without, name) if without else None
        label = name.removeprefix("perf/time/").removeprefix("perf/")
        lines.append(f"| {label} | {shown(values[0], ',.3f')} | {shown(values[1], ',.3f')} |")
    rates = [shown(median(m, "perf/tokens_per_second"), ",.0f") for m in (metrics, without) if m]
    lines += ["", f"Medians of steps {SKIPPED + 1} to {max(metrics)}; phases of several sides run at the same time."]
    lines += [f"Tokens per second, prompts included: {', without balancing '.join(rates)}."]
    return lines


def imbalance(metrics: Metrics, without: Metrics | None) -> list[str]:
    every = {name for values in metrics.values() for name in values if name.startswith("moe/")}
    names = sorted(name for name in every if "/layer_" not in name and not name.startswith("moe/skipped/"))
    lines = ["| metric | median | without balancing |", "|---|---|---|"]
    for name in names:
        lines.append(
            f"| `{name}` | {shown(median(metrics, name), ',.4g')} "
            f"| {shown(median(without, name) if without else None, ',.4g')} |"
        )
    lines += ["", "Every layer's figures are in metrics.jsonl and in the report."]
    return lines


if __name__ == "__main__":
    main()
