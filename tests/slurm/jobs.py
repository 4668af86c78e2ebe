"""Jobs on a local Slurm cluster, for tests: submit, wait, and look at what their runs did."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rl.ledger import Ledger
from scripts.slurm.local_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
HEADER = """\
#!/usr/bin/env bash
#SBATCH --job-name=test
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
"""


@dataclass
class Job:
    """A submitted job.

    Attributes:
        directory: holds its output, logs and run.
    """

    cluster: Cluster
    number: int
    directory: Path

    @classmethod
    def submit(
        cls, cluster: Cluster, directory: Path, script: Path, *arguments: str, options: tuple[str, ...] = ()
    ) -> Job:
        """By ``scripts/slurm/submit.sh``."""
        output = f"--output={directory}/job.out"
        command = [str(ROOT / "scripts/slurm/submit.sh"), output, *options, str(script), *arguments]
        result = subprocess.run(
            [*command, "--logs", str(directory / "logs")],
            env=cluster.environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return cls(cluster, int(re.findall(r"\d+", result.stdout)[-1]), directory)

    @property
    def output(self) -> str:
        """Of the launcher and of every node, for messages."""
        files = [self.directory / "job.out", *sorted(self.directory.glob("logs/*/attempt-*/n?.log"))]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.is_file())

    @property
    def launcher_output(self) -> str:
        file = self.directory / "job.out"
        return file.read_text() if file.is_file() else ""

    @property
    def steps(self) -> int:
        file = self.directory / "run" / "steps.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    @property
    def state(self) -> str:
        """As Slurm names it, with the exit code: ``"COMPLETED 0:0"``."""
        shown = self.command("scontrol", "show", "job", str(self.number))
        found = re.search(r"JobState=(\S+)", shown), re.search(r"ExitCode=(\S+)", shown)
        return " ".join(match[1] if match else "?" for match in found)

    def command(self, *command: str, limit_s: float = 120) -> str:
        """What a command prints in the cluster's environment; errors included."""
        result = subprocess.run(
            command,
            env=self.cluster.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )
        return result.stdout

    def attach(self, *command: str) -> str:
        return self.command(
            "scripts/slurm/attach.sh", "--logs", str(self.directory / "logs"), str(self.number), *command
        )

    def until(self, condition: Callable[[], bool], what: str, limit_s: float = 900) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}; job {self.state}\n{self.output}"
            time.sleep(0.5)

    def end(self, limit_s: float = 1200) -> str:
        """Its state, once it is over."""
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.state.startswith(over), "the job to end", limit_s)
        return self.state


def launcher_script(directory: Path, config: Path, *lines: str) -> Path:
    """An sbatch file for a configuration, with further #SBATCH lines."""
    script = directory / "job.sbatch"
    signal = () if any("--signal" in line for line in lines) else ("#SBATCH --signal=B:USR1@60",)
    text = HEADER + "\n".join([*signal, *lines]) + f'\nexec scripts/slurm/launch.sh {config} "$@"\n'
    script.write_text(text)
    return script


def sessions(run: Path) -> list[str | None]:
    """How each session of a run ended; None for one that was killed."""
    return [session.get("outcome") for session in Ledger.read(run).run["sessions"]]


def prompts_in_order(run: Path, prompts: int, steps: int, per_step: int) -> None:
    """No prompt is lost or repeated: steps consumed just what a run that nothing happened to would have consumed.

    Args:
        run: its directory.
        prompts: of an epoch.
        steps: of the whole run.
        per_step: prompts of each.
    """
    records = Ledger.read(run).records
    assert [record.step for record in records] == list(range(1, steps + 1))
    consumed = [sorted(record.consumed) for record in records]
    order = [divmod(i, prompts) for i in range(steps * per_step)]
    assert consumed == [sorted(order[i * per_step : (i + 1) * per_step]) for i in range(steps)]
    trained = [sample for record in records for sample in record.sample_ids]
    assert len(trained) == len(set(trained))
