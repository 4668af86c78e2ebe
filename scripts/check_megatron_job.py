#!/usr/bin/env python3
"""A job on `megatron.training`, its script unchanged, with the launcher beside without: losses, imbalance, time.

    scripts/check_megatron_job.py run [--json FILE] [--iterations N] [-- more of Megatron's arguments]
    scripts/check_megatron_job.py run --cpu    # the same on this machine's CPU, smaller: a check of this script

`run` starts `tests/megatron_ultraep/megatron/pretrain_mock.py` under torchrun on 2 GPUs, bf16, Transformer Engine,
distributed optimizer, once per row. `stock again` is what two equal runs differ by. `always` makes replicas wherever
they even out the load; `gated` is the default: only where they pay, which on a model this small may be nowhere.

Needs Python 3.12, megatron-core 0.19.2 from PyPI (its wheel holds `megatron/training`), Transformer Engine; no network,
no tokenizer files. Exits with 1 when a row's loss is off, or `always` made no replicas. Measured, not simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "tests" / "megatron_ultraep" / "megatron"
RANKS = 2
LIMIT = 280.0  # seconds, of one row

ROWS: tuple[tuple[str, list[str] | None], ...] = (
    ("stock", None),
    ("stock again", None),
    ("launcher, off", ["--no-ultraep-enabled"]),
    ("launcher, always", ["--no-ultraep-gate", "--ultraep-min-tokens", "1", "--ultraep-tolerance", "0"]),
    ("launcher, gated", []),
)
# Relative to stock. bf16 keeps 8 bits; experts see other batches, so their products are rounded otherwise.
FIRST_BAR, LAST_BAR = 1e-3, 1e-2

MODEL = """
--seq-length {length} --max-position-embeddings {length} --num-layers {layers} --hidden-size {hidden}
--num-attention-heads 8 --num-experts {experts} --moe-router-topk {topk} --moe-ffn-hidden-size {ffn}
--micro-batch-size 2 --global-batch-size 8 --train-iters {iterations} --lr 1e-4 --lr-decay-style constant --mock-data
--tokenizer-type NullTokenizer --vocab-size 8191 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3 --normalization RMSNorm --swiglu
--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
--hidden-dropout 0 --log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0
--no-gradient-accumulation-fusion
"""
GPU = "--transformer-impl transformer_engine --bf16 --moe-grouped-gemm --use-distributed-optimizer"
CPU = """
--transformer-impl local --distributed-backend gloo --disable-gloo-process-groups --use-cpu-initialization
--no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
"""
LARGE = {"length": 2048, "layers": 4, "hidden": 1024, "experts": 32, "topk": 4, "ffn": 1024}
SMALL = {"length": 64, "layers": 2, "hidden": 64, "experts": 8, "topk": 2, "ffn": 64}


def run_row(name: str, flags: list[str] | None, arguments: list[str], *, cpu: bool) -> dict[str, Any]:
    """Train once in fresh processes: losses, and what was printed about imbalance and time."""
    script = [str(JOB / "cpu_job.py") if cpu else str(Path(__file__).resolve()), *([] if cpu else ["job"])]
    launcher = [] if flags is None else ["-m", "megatron_ultraep.launch", *flags]
    with tempfile.TemporaryDirectory() as directory:
        losses = Path(directory, "losses")
        environment = os.environ | {
            "MOCK_LOSSES": str(losses),
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": "1" if cpu else "4",
            "PYTHONWARNINGS": "ignore",
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command = [*torchrun, *launcher, *script, str(JOB / "pretrain_mock.py"), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
        if result.returncode != 0:
            output = f"{result.stdout}{result.stderr}"[-8000:]
            sys.exit(f"{output}\n{name}: ended with code {result.returncode}, above; it ran {shlex.join(command)}")
        records = [json.loads(line) for line in losses.read_text().splitlines()]
    lines = [line for line in result.stdout.splitlines() if line.startswith(" ultraep iteration")]
    times = [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", result.stdout)]
    return {
        "row": name,
        "flags": flags,
        "losses": [record["lm loss"] for record in records],
        "imbalance_before": _numbers(lines, "imbalance before"),
        "imbalance_after": _numbers(lines, "after"),
        "replicas": _numbers(lines, "replicas"),
        "last_line": lines[-1] if lines else "",
        "ms": statistics.median(times[len(times) // 2 :]),
    }


def run(cpu: bool, iterations: int, more: list[str], json_file: Path | None) -> int:
    """Every row, as a table; 1 when a bar is missed."""
    sizes = SMALL if cpu else LARGE
    arguments = shlex.split(MODEL.format(iterations=iterations, **sizes) + (CPU if cpu else GPU)) + more
    rows: list[dict[str, Any]] = []
    header = f"{'row':18} {'first loss':>11} {'last loss':>11} {'d first':>8} {'d worst':>8} "
    print(header + f"{'before':>7} {'after':>7} {'replicas':>8} {'ms/iter':>8}", flush=True)
    failed = False
    for name, flags in ROWS:
        row = run_row(name, flags, arguments, cpu=cpu)
        rows.append(row)
        stock = rows[0]["losses"]
        differences = [abs(a - b) / b for a, b in zip(row["losses"], stock, strict=True)]
        row["first_difference"], row["worst_difference"] = differences[0], max(differences)
        off = row["first_difference"] > FIRST_BAR or row["worst_difference"] > LAST_BAR
        if flags is not None and "--no-ultraep-gate" in flags:
            off |= not row["replicas"] or min(row["replicas"]) == 0
            off |= statistics.mean(row["imbalance_after"] or [9]) >= statistics.mean(row["imbalance_before"] or [0])
        failed |= off
        print(
            f"{name:18} {row['losses'][0]:11.6f} {row['losses'][-1]:11.6f} {row['first_difference']:8.1e} "
            f"{row['worst_difference']:8.1e} {_mean(row['imbalance_before']):>7} {_mean(row['imbalance_after']):>7} "
            f"{_mean(row['replicas']):>8} {row['ms']:8.1f}{'  OFF' if off else ''}",
            flush=True,
        )
    for row in rows:
        if row["last_line"]:
            print(f"{row['row']}: {row['last_line'].strip()}")
    if json_file is not None:
        json_file.write_text(json.dumps({"arguments": arguments, "cpu": cpu, "rows": rows}, indent=1) + "\n")
    return int(failed)


def job(arguments: list[str]) -> None:
    """What each rank runs on a GPU machine: the script, on the Megatron-core of PyPI."""
    from megatron.core.datasets import utils

    # The wheel holds the dataset helpers compiled, but not the Makefile that Megatron runs at every start.
    utils.compile_helpers = lambda: None
    sys.argv = arguments
    sys.path.insert(0, str(JOB))
    runpy.run_path(arguments[0], run_name="__main__")


def _numbers(lines: list[str], words: str) -> list[float]:
    pattern = re.compile(rf"\| {words}: ([\d.]+)")
    return [float(match[1]) for line in lines if (match := pattern.search(line))]


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" if values else "-"


def main() -> int:
    if sys.argv[1:2] == ["job"]:
        job(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run",))
    parser.add_argument("--cpu", action="store_true", help="on this machine's CPU, float32, a smaller model")
    parser.add_argument("--iterations", type=int, default=20, metavar="N", help="training iterations (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("more", nargs="*", help="more of Megatron's arguments, after --")
    arguments = parser.parse_args()
    return run(arguments.cpu, arguments.iterations, arguments.more, arguments.json)


if __name__ == "__main__":
    # Under the launcher this file is a script that is run in the launcher's process: it must not end that process.
    code = main()
    if code:
        sys.exit(code)
