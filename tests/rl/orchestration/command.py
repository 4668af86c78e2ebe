"""Runs ``ultraep-rl train`` as a user does, in a process of its own, and finds the processes that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[3]
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def tiny_config(directory: Path, **changes: Any) -> Path:
    """A run that takes seconds a step: 32 prompts in 16 steps on two ranks and one engine. ``a__b=c`` sets ``a.b``."""
    config: dict[str, Any] = {
        "run": {"name": "t", "output_dir": str(directory / "run"), "seed": 1},
        "model": {
            "path": str(directory / "model"),
            "create": "rl.models.tiny:qwen3_moe",
            "create_args": {"layers": 2, "hidden": 32},
            "dtype": "float32",
        },
        "data": {
            "train": {"reasoning_gym": "chain_sum", "args": TASK, "size": 32, "seed": 0},
            "eval": {"reasoning_gym": "chain_sum", "args": TASK, "size": 16, "seed": 100000},
            "prompts_per_step": 2,
            "samples_per_prompt": 4,
        },
        "reward": {"path": "rl.rewards.builtin:reasoning_gym"},
        "sampling": {"max_tokens": 4},
        "rollout": {"max_model_len": 640, "kv_cache_gib": 0.125},
        "trainer": {
            "ranks": 2,
            "parallel": {"ep": 2},
            "tokens_per_micro_batch": 1024,
            "optimizer": {"lr": 1e-3},
        },
        "evaluation": {"prompts": 8},
        "checkpoint": {"every": 2},
        "logging": {"wandb": "off", "tensorboard": False},
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Command:
    """A running ``ultraep-rl train``.

    Args:
        config: of the run.
        arguments: that follow it.
        module: run in place of ``rl.cli``.
    """

    def __init__(self, config: Path, *arguments: str, module: str = "rl.cli") -> None:
        self.run_directory = config.parent / "run"
        self.output_path = config.parent / "output.txt"
        with self.output_path.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "train", str(config), *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def descendants(self) -> list[psutil.Process]:
        """Processes started by the command so far and still there; remembered for :meth:`orphans`."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen |= {p.pid: p for p in children}
        return children

    def actors(self, kind: str) -> list[psutil.Process]:
        """Ray actors of a class, by pid; Ray names the process ``ray::<class>...``."""
        found = []
        for process in self.descendants():
            try:
                if f"ray::{kind}" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda p: p.pid)

    def steps(self) -> int:
        """Completed steps in the ledger."""
        path = self.run_directory / "steps.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def wait_for(self, condition: Any, limit_s: float, what: str) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{self.output()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {limit_s} s for {what}:\n{self.output()[-3000:]}"
            self.descendants()
            time.sleep(0.05)

    def end(self, limit_s: float = 120.0) -> int:
        """Exit code."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end within {limit_s} s:\n{self.output()[-3000:]}") from None

    def orphans(self, limit_s: float = 30.0) -> list[str]:
        """What is left of the processes that the command started, after at most ``limit_s``."""
        _, alive = psutil.wait_procs([p for p in self.seen.values() if p.is_running()], timeout=limit_s)
        return [" ".join(p.cmdline())[:120] for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        self.descendants()
        for process in [*self.seen.values()]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def ledger_lines(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "steps.jsonl").read_text().splitlines()]
