#!/usr/bin/env python
"""How much overlapping generation and training saves, in real runs: vLLM, Megatron, Ray, one after another.

    python scripts/bench_stream_real.py [--modes sync streaming one-step colocated] [--steps 12]
        [--json benchmarks/results/stream-real-cpu.json]
        [--rows rows.json --profile benchmarks/data/latency-tiny-cpu.json]
    python scripts/bench_stream_real.py --gpus 2 --json FILE     # half of the GPUs generate, half train; colocated: all

Each mode is a run of its own of ``ultraep-rl train`` with the same prompts, seeds and number of samples. Response
lengths are log-normal by prompt and cut off at a limit (a long tail), whatever the model says; what follows a
response's end is neither rewarded nor learnt from. On CPUs it is the smoke recipe's task and model; on GPUs a model of
SmolLM2-135M's shape with 8 experts, 2 of them active, in each layer (random weights unless ``--model`` says which:
``python -c "from rl.models import upcycle; upcycle.smollm2('DIRECTORY')"`` makes the real one).

- ``step``: mean seconds of a step, without the first ones, in which kernels are compiled, and, of asynchronous runs,
  without the last ``staleness`` ones, in which nothing is left to generate; ``generate`` and ``train``: seconds of it
  in which engines and trainer ranks were busy, weight updates included.
- ``ideal``: max(generate, train) of the same run, what no overlap can beat. colocated and sync: their sum.
- ``allowed``: (g + t) of colocated (else of sync) / max(g', t') of the mode; ``speed-up``: the measured one. On GPUs
  the bar is a speed-up of one-step of at least 0.9 of what is allowed.

Measured. ``--rows`` writes what ``scripts/bench_stream.py --real`` compares the simulator with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.ledger import Ledger  # noqa: E402
from rl.metrics import read_metrics  # noqa: E402
from rl.orchestration.experience import with_length  # noqa: E402
from rl.timeline import read_timeline  # noqa: E402
from rl.types import Prompt  # noqa: E402
from scripts.machine import hardware  # noqa: E402

SKIPPED = 2  # first steps, in which an asynchronous run fills up and kernels are compiled
BAR = 0.9
STREAM: dict[str, dict[str, Any]] = {
    "sync": {},
    "streaming": {"pipelining": True},
    "one-step": {"staleness": 1},
    "one-step-continue": {"staleness": 1, "in_flight": "continue", "pipelining": True},
    "colocated": {"colocated": True},
}


@dataclass
class Row:
    """One mode; times in seconds, means over steps but for the first and those that only end the run."""

    mode: str
    steps: int
    step_s: float
    generate_s: float
    train_s: float
    ideal_s: float
    engine_idle: float
    trainer_idle: float
    transfer_s: float
    reward_first: float
    reward_last: float
    allowed: float | None = None
    speedup: float | None = None
    memory_gib: dict[str, float] = field(default_factory=dict)


def smollm2_shaped(path: str | Path) -> Path:
    """A Mixtral-layout model of SmolLM2-135M's shape, 8 experts top-2, random weights in bfloat16."""
    from rl.models import tiny

    return tiny.mixtral(
        path, layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536, initializer_range=0.02, dtype="bfloat16"
    )


def configuration(mode: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The run's YAML."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
    config["run"] = {"name": mode, "output_dir": str(directory / mode), "seed": 1, "steps": arguments.steps}
    config["model"]["path"] = str(directory / "model")
    config["stream"] = {**STREAM[mode], **({"chunk_tokens": arguments.chunk_tokens} if arguments.chunk_tokens else {})}
    config["data"] |= {"prompts_per_step": arguments.prompts, "samples_per_prompt": arguments.samples}
    config["sampling"] |= {
        "max_tokens": arguments.longest,
        "forced_lengths": {"median": arguments.median, "sigma": arguments.sigma},
    }
    config["rollout"] |= {"max_model_len": 64 + arguments.longest + 32, "max_num_seqs": arguments.seats}
    config["trainer"] |= {"ranks": 1, "parallel": {"ep": 1}, "tokens_per_micro_batch": 8192}
    config["algorithm"] |= {"mini_batches": 1}
    config["algorithm"]["routes"]["compare_own_every"] = 0
    config["evaluation"] = {"at_start": False, "at_end": False, "prompts": 256}
    config["checkpoint"] = {"every": 0}
    config["logging"] = {"wandb": "off", "tensorboard": False}
    if arguments.profile:
        config["stream"]["latency_profile"] = str(arguments.profile.absolute())
    if arguments.gpus:
        half = arguments.gpus if mode == "colocated" else arguments.gpus // 2
        config["model"] = {
            "path": str(arguments.model or directory / "model"),
            "create": None if arguments.model else "scripts.bench_stream_real:smollm2_shaped",
            "dtype": "bfloat16",
        }
        config["trainer"] |= {"ranks": half, "backend": "nccl", "parallel": {"ep": half}}
        config["trainer"]["tokens_per_micro_batch"] = 16384
        config["rollout"] |= {"engines": half, "device": "cuda", "kv_cache_gib": 16}
        config["data"]["max_prompt_tokens"] = 512
        config["rollout"]["max_model_len"] = 512 + arguments.longest
        config["warmup"] = {"steps": 0}
        config["stream"]["transfer"] = "auto" if arguments.direct else "store"
        config["ray"] = {"object_store_mib": 8192}
        # Gigabytes of optimizer states are written at the start and the end otherwise.
        config["checkpoint"]["save_optimizer"] = False
    return config


def train(mode: str, arguments: argparse.Namespace, directory: Path) -> Row:
    """Run one mode and read what it wrote."""
    path = directory / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(configuration(mode, arguments, directory)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (directory / f"{mode}.log").open("w") as log:
        code = subprocess.run(
            [sys.executable, "-m", "rl.cli", "train", str(path)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            timeout=arguments.limit,
        ).returncode
    if code:
        raise SystemExit(f"{mode}: exit code {code}\n{(directory / f'{mode}.log').read_text()[-4000:]}")
    return read(mode, directory)


def steps_of(mode: str, directory: Path) -> list[dict[str, float]]:
    """Metrics of every step."""
    return [m for m in read_metrics(directory / mode).values() if "perf/step_time" in m]


def read(mode: str, directory: Path) -> Row:
    every = steps_of(mode, directory)
    ahead = STREAM[mode].get("staleness", 0)
    kept = every[SKIPPED : len(every) - ahead] or every[SKIPPED:]

    # Means: steps of an asynchronous run alternate, where a long one makes up for what the next finds done.
    step = statistics.fmean(m["perf/step_time"] for m in kept)
    generate = statistics.fmean(m["perf/step_time"] * (1 - m["stream/engine_idle_fraction"]) for m in kept)
    trained = statistics.fmean(m["perf/step_time"] * (1 - m["stream/trainer_idle_fraction"]) for m in kept)
    overlapped = mode not in ("sync", "colocated")
    third = max(1, len(every) // 3)
    memory = {k.rsplit("/", 1)[1]: v for k, v in every[-1].items() if k.startswith("perf/memory_gib")}
    return Row(
        mode=mode,
        steps=len(every),
        step_s=step,
        generate_s=generate,
        train_s=trained,
        ideal_s=max(generate, trained) if overlapped else generate + trained,
        engine_idle=1 - generate / step,
        trainer_idle=1 - trained / step,
        transfer_s=statistics.fmean(m["perf/time/transfer"] for m in kept),
        reward_first=statistics.fmean(m["rollout/reward/mean"] for m in every[:third]),
        reward_last=statistics.fmean(m["rollout/reward/mean"] for m in every[-third:]),
        memory_gib=memory,
    )


def simulator_row(row: Row, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The run in the form of ``rl/simulation/real_rows.py``."""
    every = steps_of(row.mode, directory)
    records = Ledger.read(directory / row.mode).records
    steps, seconds, tokens, chunks = [], 0.0, 0.0, 0.0
    for step, (metrics, record) in enumerate(zip(every, records, strict=True)):
        lengths = []
        for epoch, ordinal in record.consumed:
            prompt = with_length(_prompt(epoch, ordinal), arguments.median, arguments.sigma, arguments.longest)
            lengths.append([prompt.metadata["max_tokens"]] * arguments.samples)
        total = metrics["perf/tokens_per_second"] * metrics["perf/step_time"]
        count = sum(map(len, lengths))
        steps.append(
            {
                "step_seconds": metrics["perf/step_time"],
                "prompt_tokens": (total - sum(map(sum, lengths))) / count,
                "lengths": lengths,
            }
        )
        if step < SKIPPED:
            continue
        seconds += metrics["perf/time/old_logprob"] + metrics["perf/time/train"]
        tokens += total
        chunks += metrics.get("stream/chunks", 1.0)
    mode = {"one-step": "async", "one-step-continue": "async"}.get(row.mode, row.mode)
    update = _update_seconds(directory / row.mode / "timeline.json")
    return {
        "mode": mode,
        "engines": engines_of(row.mode, arguments.gpus),
        "seats": arguments.seats,
        "staleness": STREAM[row.mode].get("staleness", 0),
        "in_flight": STREAM[row.mode].get("in_flight", "finish"),
        "chunk_groups": max(1, round(arguments.prompts / (chunks / (len(steps) - SKIPPED)))),
        "skip": SKIPPED,
        # Off the GPUs and back: twice a step.
        "switch_seconds": statistics.median(m.get("perf/time/offload", 0.0) for m in every[SKIPPED:]) / 2,
        "train": {"fixed_seconds": 0.0, "seconds_per_token": seconds / tokens, "apply_seconds": 0.0},
        # A synchronous run waits until engines have taken the weights up, which counts by itself.
        "transfer_seconds": statistics.median(
            max(0.0, m["perf/time/weight_update"] - update) if mode != "async" else m["perf/time/export"]
            for m in every[SKIPPED:]
        ),
        # The profile was measured with the machine to itself; here the trainer, the driver and Ray share its cores.
        "slowdown": statistics.median(m.get("stream/engine_slowdown", 1.0) for m in every[SKIPPED:]),
        "update_seconds": update,
        "steps": steps,
    }


def engines_of(mode: str, gpus: int) -> int:
    """Engines of a run: all GPUs colocated, else half of them; one on CPUs."""
    return (gpus if mode == "colocated" else gpus // 2) or 1


def _update_seconds(timeline: Path) -> float:
    """Median time that an engine stands still for new weights."""
    spans = [e["dur"] / 1e6 for e in read_timeline(timeline) if e["ph"] == "X" and e["name"].startswith("update ")]
    return statistics.median(spans)


def _prompt(epoch: int, ordinal: int) -> Prompt:
    import numpy as np

    return Prompt(f"train/{epoch}/{ordinal}", ordinal, epoch, "", np.zeros(1, np.int32))


def judge(rows: Sequence[Row]) -> None:
    """Fill in what overlapping allows and what it gave, against colocated, or sync without it."""
    by_mode = {row.mode: row for row in rows}
    base = by_mode.get("colocated") or by_mode.get("sync")
    for row in rows:
        if base is not None:
            row.speedup = base.step_s / row.step_s
            row.allowed = (base.generate_s + base.train_s) / row.ideal_s


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| mode | steps | step (s) | ideal (s) | generate (s) | train (s) | engines idle | trainer idle | transfer (s) "
        "| reward first, last third | speed-up | allowed |",
        "|---" * 12 + "|",
    ]
    for r in rows:
        lines.append(
            f"| {r.mode} | {r.steps} | {r.step_s:.2f} | {r.ideal_s:.2f} | {r.generate_s:.2f} | {r.train_s:.2f} "
            f"| {r.engine_idle:.0%} | {r.trainer_idle:.0%} | {r.transfer_s:.2f} "
            f"| {r.reward_first:.3f}, {r.reward_last:.3f} "
            f"| {_number(r.speedup)} | {_number(r.allowed)} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["sync", "streaming", "one-step"], choices=list(STREAM))
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to use; 0: CPUs")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIRECTORY",
        help="with --gpus: a Hugging Face directory; random weights by default",
    )
    parser.add_argument(
        "--direct",
        action="store_true",
        help="with --gpus: weights by NCCL, or CUDA IPC where colocated, where that can be; else by the store",
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=8, help="responses to each")
    parser.add_argument("--median", type=float, default=24.0, help="of response lengths, tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of their logarithm")
    parser.add_argument("--longest", type=int, default=256, help="tokens")
    parser.add_argument("--seats", type=int, default=64, help="samples that an engine computes at once")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="see stream.chunk_tokens")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for each run")
    parser.add_argument("--keep", type=Path, help="directory for the runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="latency profile; engines' steps are compared with it, for --rows")
    parser.add_argument("--rows", type=Path, help="write rows for scripts/bench_stream.py --real")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        directory = (arguments.keep or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        for mode in arguments.modes:
            rows.append(train(mode, arguments, directory))
            judge(rows)
            print(table(rows[-1:]), flush=True)
            if arguments.json:
                write(arguments, rows)
        if arguments.rows:
            found = [
                simulator_row(row, arguments, directory) for row in rows if arguments.gpus or row.mode != "colocated"
            ]
            arguments.rows.write_text(json.dumps({"rows": found}))
    print(f"\nMeasured, {arguments.gpus or 'no'} GPUs.\n" + table(rows))
    missed = False
    for row in rows if arguments.gpus else ():
        if row.mode.startswith("one-step") and row.speedup is not None and row.allowed is not None:
            share = row.speedup / row.allowed
            missed |= share < BAR
            verdict = "kept" if share >= BAR else "MISSED"
            print(f"{row.mode}: {share:.2f} of the speed-up that is allowed, bar {BAR}: {verdict}")
    return int(missed)


def write(arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    from rl.versions import collect

    document: Mapping[str, Any] = {
        "measured": True,
        "hardware": hardware(),
        "versions": collect(),
        # Where files lie is this machine's business.
        "settings": {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(arguments).items()},
        "rows": [asdict(row) for row in rows],
    }
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
