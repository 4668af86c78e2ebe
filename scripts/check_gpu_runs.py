#!/usr/bin/env python3
"""Whether every combination of the support table trains on this machine's GPUs: whole runs, several at once.

    scripts/check_gpu_runs.py [--cases NAME ...] [--at-once 4] [--json FILE]
    scripts/check_gpu_runs.py --cpu --cases qwen3_moe               # the same runs on CPUs

Each case is ``ultraep-rl train`` of a few steps on a tiny random model: vLLM, Ray, Megatron-core with Transformer
Engine, bfloat16, with a reward that differs between samples. Cases share the GPUs, so times mean nothing here. A case
passes when the run ends with code 0, every step has a finite loss and some gradient, and log-probs of rollout and
trainer differ by less than ``BAR`` in the mean over a step's tokens.

Exit code 1: a case failed. Measured, not simulated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.ledger import Ledger  # noqa: E402
from rl.metrics import read_metrics  # noqa: E402
from scripts.machine import hardware  # noqa: E402

BAR = 0.05  # nats a token, in bfloat16
STEPS = 3
TRIES = 3
# vLLM's own check that sleeping freed memory: it looks at the whole GPU, on which other cases allocate meanwhile.
OF_OTHERS = "Memory usage increased after sleeping"
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
ALONE: dict[str, Any] = {"trainer__ranks": 1, "trainer__parallel": {}, "stream__colocated": True}
PAIR: dict[str, Any] = {"trainer__ranks": 2, "stream__colocated": True, "rollout__engines": 2}
APART: dict[str, Any] = {"trainer__ranks": 1, "trainer__parallel": {}}
BALANCED = {"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0}
PPO: dict[str, Any] = {"algorithm__advantage": "gae", "critic": {"optimizer": {"lr": 1e-3}, "warmup_steps": 1}}
REFERENCE: dict[str, Any] = {"algorithm__kl__coef": 0.1, "algorithm__mini_batches": 2}


def reward(sample: Any, args: Mapping[str, Any]) -> float:
    """From 0 to 1, by the response's tokens: samples of any model differ."""
    return int(sample.response_tokens.sum()) % 7 / 6


@dataclass(frozen=True)
class Case:
    """One run: GPUs that it takes, changes to :func:`base` (``a__b`` is ``a.b``), what its metrics must hold."""

    name: str
    gpus: int
    changes: Mapping[str, Any]
    metrics: tuple[str, ...] = ("train/loss",)


@dataclass
class Row:
    """How a case went; ``difference`` in nats a token, ``path`` how weights travelled."""

    case: str
    gpus: int
    passed: bool
    seconds: float
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    difference: float | None = None
    path: str = ""
    error: str = ""
    of_others: bool = False


def _family(name: str, gpus: int = 1, **args: Any) -> Case:
    changes = (ALONE if gpus == 1 else PAIR | {"trainer__parallel": {"ep": 2}, "balance": BALANCED}) | {
        "model__create": f"rl.models.tiny:{name}",
        "model__create_args": args,
    }
    return Case(f"{name}, EP {gpus}", gpus, changes)


def cases() -> list[Case]:
    """All; those of one GPU first."""
    deepseek = {"layers": 3, "hidden": 256, "heads": 16, "kv_rank": 512, "rotary_dim": 64, "plain_dim": 128,
                "value_dim": 128, "initializer_range": 0.05, "q_rank": 128}  # fmt: skip
    glm = {"layers": 3, "topk": 4, "groups": 4, "chosen_groups": 2, "head_dim": 64}
    pipeline = {"trainer__parallel": {"pp": 2}}
    found = [
        _family("qwen3_moe", layers=2, head_dim=64),
        _family("mixtral", layers=2, hidden=128, heads=2, kv_heads=1),
        _family("qwen2_moe", layers=3, hidden=128, mlp_only_layers=[1]),
        _family("olmoe", layers=2, hidden=128),
        _family("glm4_moe", **glm),
        _family("deepseek_v3", **deepseek),
        Case("ppo", 1, ALONE | PPO, ("train/loss", "critic/loss")),
        Case("reference", 1, ALONE | REFERENCE, ("train/loss", "train/kl")),
        Case("profile", 1, ALONE | {"profile": {"steps": [2]}}),
        Case("ipc", 1, ALONE | {"stream__transfer": "ipc"}),
        Case("store", 1, ALONE | {"stream__transfer": "store"}),
        *(
            Case(preset, 1, ALONE | {"algorithm__preset": preset})
            for preset in ("dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++")
        ),
        _family("qwen3_moe", 2, layers=2, head_dim=64),
        _family("glm4_moe", 2, **glm),
        _family("deepseek_v3", 2, **deepseek),
        Case(
            "overlapped, fused kernels",
            2,
            PAIR
            | {"trainer__parallel": {"ep": 2}, "balance": BALANCED, "trainer__overlap": True}
            | {"trainer__fuse_gradients": True, "trainer__permute_fusion": True},
        ),
        Case("ipc, staged", 2, PAIR | {"trainer__parallel": {"ep": 2}, "stream__transfer": "ipc"}),
        Case("nccl", 2, APART | {"stream__transfer": "nccl"}),
        Case(
            "nccl, one step ahead",
            2,
            APART | {"stream": {"transfer": "nccl", "staleness": 1, "in_flight": "continue", "pipelining": True}},
        ),
        Case("unequal stages", 2, PAIR | pipeline | {"model__create_args__layers": 3}),
        Case(
            "fused, critic",
            2,
            PAIR | pipeline | PPO | {"fuse__training": {"mode": "on", "solve_s": 1.0}},
            ("critic/loss", "fuse/training/makespan"),
        ),
        Case(
            "fused, reference",
            2,
            PAIR | pipeline | REFERENCE | {"fuse__training": {"mode": "on", "solve_s": 1.0}},
            ("train/kl", "fuse/training/makespan"),
        ),
        Case("tail, samples move", 2, PAIR | {"trainer__parallel": {}, "fuse__tail": {"enabled": True,
             "threshold": 4}, "algorithm__old_logprobs": "recompute", "sampling__max_tokens": 64}),
        Case("engine of 2 ranks", 3, APART | {"rollout__tensor_parallel": 2}),
    ]  # fmt: skip
    return found


def base(directory: Path, cpu: bool) -> dict[str, Any]:
    """A run of seconds a step."""
    config: dict[str, Any] = {
        "run": {"name": "t", "output_dir": str(directory / "run"), "seed": 1, "steps": STEPS},
        "model": {
            "path": str(directory / "model"),
            "create": "rl.models.tiny:qwen3_moe",
            "create_args": {"layers": 2, "hidden": 128, "head_dim": 64},
            "dtype": "float32" if cpu else "bfloat16",
        },
        "data": {
            "train": {"reasoning_gym": "chain_sum", "args": TASK, "size": 256, "seed": 0},
            "eval": {"reasoning_gym": "chain_sum", "args": TASK, "size": 16, "seed": 100000},
            "prompts_per_step": 8,
            "samples_per_prompt": 4,
            "max_prompt_tokens": 128,
        },
        "reward": {"path": "scripts.check_gpu_runs:reward"},
        "sampling": {"max_tokens": 24},
        "rollout": {"max_model_len": 256, "kv_cache_gib": 0.125 if cpu else 1.0},
        "trainer": {"tokens_per_micro_batch": 512, "optimizer": {"lr": 1e-4}},
        "evaluation": {"prompts": 8},
        "checkpoint": {"every": 2},
        "logging": {"wandb": "off", "tensorboard": False},
    }
    if not cpu:
        config["rollout"]["device"] = "cuda"
        config["trainer"]["backend"] = "nccl"
    return config


def configured(case: Case, directory: Path, cpu: bool) -> Path:
    """The case's YAML."""
    config = base(directory, cpu)
    for name, value in case.changes.items():
        *sections, last = name.split("__")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    if config.get("algorithm", {}).get("preset") == "ppo":
        config["critic"] = {}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Running:
    """A case under way, on some of the GPUs."""

    def __init__(self, case: Case, gpus: Sequence[int], directory: Path, cpu: bool) -> None:
        self.case, self.gpus, self.directory, self.began = case, gpus, directory, time.monotonic()
        directory.mkdir(parents=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with (directory / "output.txt").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rl.cli", "train", str(configured(case, directory, cpu)), "--allow-untested"],
                cwd=ROOT, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def ended(self, limit_s: float) -> Row | None:
        """The row, once there is one."""
        seconds = time.monotonic() - self.began
        code = self.process.poll()
        if code is None and seconds < limit_s:
            return None
        if code is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        row = Row(self.case.name, self.case.gpus, False, seconds)
        self._judge(row, f"not done after {limit_s:g} s" if code is None else "" if code == 0 else f"code {code}")
        row.passed = not row.error
        return row

    def _judge(self, row: Row, error: str) -> None:
        run = self.directory / "run"
        try:
            steps = list(read_metrics(run).values())
            row.loss = [m["train/loss"] for m in steps if "train/loss" in m]
            row.grad_norm = [m["train/grad_norm"] for m in steps if "train/grad_norm" in m]
            differences = [m["train/rollout_logprob_abs_diff"] for m in steps if "train/rollout_logprob_abs_diff" in m]
            row.difference = max(differences, default=None)
            row.path = transfer_path(run)
            lacking = [name for name in self.case.metrics if not any(name in m for m in steps)]
            lines = len(Ledger.read(run).records)
        except Exception as problem:
            row.error = error or f"{type(problem).__name__}: {problem}"
        else:
            norms = row.grad_norm + [m["critic/grad_norm"] for m in steps if "critic/grad_norm" in m]
            if not error and lines < STEPS:
                error = f"{lines} steps of {STEPS}"
            if not error and lacking:
                error = f"no {', '.join(lacking)}"
            if not error and not all(map(math.isfinite, row.loss + norms)):
                error = "a loss or gradient that is not finite"
            if not error and not max(norms, default=0.0) > 0:
                error = "no gradient"
            if not error and not (row.difference is not None and row.difference < BAR):
                error = f"log-probs differ by {row.difference}"
            row.error = error
        if row.error:
            # Where files lie is this machine's business.
            said = (self.directory / "output.txt").read_text(errors="replace").replace(f"{self.directory}/", "")
            text = said.strip().splitlines()
            row.error += ": " + " | ".join(line[:200] for line in text[-3:])
            row.of_others = any(OF_OTHERS in line for line in text)


def transfer_path(run: Path) -> str:
    """How weights travelled, by the time line; several paths where a direct one fell back."""
    from rl.timeline import read_timeline

    found = {e["args"]["path"] for e in read_timeline(run / "timeline.json") if "path" in e.get("args", {})}
    return ", ".join(sorted(found))


def run_all(wanted: Sequence[Case], gpus: int, at_once: int, limit_s: float, keep: Path, cpu: bool) -> list[Row]:
    """At most ``at_once`` cases on a GPU; the emptiest GPUs first."""
    waiting, running, rows = list(wanted), list[Running](), list[Row]()
    tries = Counter[str]()
    while waiting or running:
        load = [sum(g in r.gpus for r in running) for g in range(gpus)]
        for case in list(waiting):
            free = sorted((g for g in range(gpus) if load[g] < at_once), key=lambda g: (load[g], g))
            if (cpu and len(running) >= at_once) or (not cpu and len(free) < case.gpus):
                continue
            waiting.remove(case)
            taken = [] if cpu else sorted(free[: case.gpus])
            for g in taken:
                load[g] += 1
            tries[case.name] += 1
            name = "".join(c if c.isalnum() else "-" for c in case.name) + f"-{tries[case.name]}"
            running.append(Running(case, taken, keep / name, cpu))
        time.sleep(0.5)
        for one in list(running):
            row = one.ended(limit_s)
            if row is not None:
                running.remove(one)
                if row.of_others and tries[row.case] < TRIES:
                    waiting.append(one.case)
                    continue
                rows.append(row)
                print(line(row), flush=True)
    return rows


HEADER = "| case | GPUs | passed | seconds | loss | gradient norm | log-probs differ | weights by | error |"


def line(row: Row) -> str:
    def numbers(values: Sequence[float]) -> str:
        return " ".join(f"{value:.3g}" for value in values)

    difference = "" if row.difference is None else f"{row.difference:.2g}"
    return (
        f"| {row.case} | {row.gpus} | {'yes' if row.passed else 'NO'} | {row.seconds:.0f} | {numbers(row.loss)} "
        f"| {numbers(row.grad_norm)} | {difference} | {row.path} | {row.error} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these; all that fit on the GPUs by default")
    parser.add_argument("--max-gpus", type=int, metavar="N", help="only cases of at most N GPUs")
    parser.add_argument("--min-gpus", type=int, default=0, metavar="N", help="only cases of at least N GPUs")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="cases on a GPU (or on the CPUs) at once")
    parser.add_argument("--limit", type=float, default=400.0, metavar="S", help="of each case, seconds")
    parser.add_argument("--cpu", action="store_true", help="on CPUs, float32, gloo")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep the runs there; it must not exist")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    present = hardware()
    gpus = 0 if arguments.cpu else len(present["gpus"])
    if not arguments.cpu and not gpus:
        parser.error("expected GPUs, this machine shows none; --cpu runs the cases on CPUs")
    known = {case.name: case for case in cases()}
    unknown = sorted(set(arguments.cases or ()) - set(known))
    if unknown:
        parser.error(f"unknown cases {unknown}; expected some of {list(known)}")
    most = min(arguments.max_gpus or math.inf, gpus or math.inf)
    wanted = [
        case
        for case in known.values()
        if (not arguments.cases or case.name in arguments.cases) and arguments.min_gpus <= case.gpus <= most
    ]
    left_out = [c.name for c in known.values() if not arguments.cpu and c.gpus > gpus]
    if left_out:
        print(f"need more than {gpus} GPUs, left out: {', '.join(left_out)}")
    print(HEADER + "\n" + "|---" * 9 + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        keep = (arguments.keep or Path(temporary) / "runs").absolute()
        rows = run_all(wanted, gpus, arguments.at_once, arguments.limit, keep, arguments.cpu)
    if arguments.json:
        from rl.versions import collect

        document = {
            "measured": True,
            "hardware": present,
            "versions": collect(),
            "bar": BAR,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = [row.case for row in rows if not row.passed]
    print(
        f"\n{len(rows) - len(failed)} of {len(rows)} cases passed" + (f"; failed: {', '.join(failed)}" * bool(failed))
    )
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    raise SystemExit(main())
