"""Ends what a private Ray instance leaves behind when its driver is killed.

    python -m rl.orchestration.reaper DIRECTORY LOGS < pipe held by the driver

Ray's own processes follow a killed driver, but two of its agents take a minute to notice, and its files stay. This
process waits for the pipe to close, which happens however the driver ends, and then

1. kills every process that still has a file of the instance open;
2. copies what actors printed to LOGS and removes DIRECTORY.

After an orderly end there is nothing left to do.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_GRACE_S = 3.0  # for processes that end by themselves


def start(directory: Path, logs: Path) -> subprocess.Popen[bytes]:
    """Start the reaper of an instance; keep the result alive as long as the instance, then close its ``stdin``."""
    return subprocess.Popen(
        [sys.executable, "-m", "rl.orchestration.reaper", str(directory), str(logs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A signal to our terminal's group must not end it before its work is done.
        start_new_session=True,
    )


def keep_logs(directory: Path, logs: Path) -> None:
    """Copy what workers of the instance printed, named by process id; files of an earlier session are replaced."""
    printed = [p for p in directory.glob("session_*/logs/worker-*") if p.is_file() and p.stat().st_size]
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    for path in printed:
        # worker-<worker id>-<job id>-<pid>.out or .err
        shutil.copyfile(path, logs / f"worker-{path.stem.rsplit('-', 1)[-1]}{path.suffix}")


def users(directory: Path) -> list[psutil.Process]:
    """Processes other than this one with a file below the directory open."""
    prefix = f"{directory}/"
    found = []
    for process in psutil.process_iter():
        if process.pid == psutil.Process().pid:
            continue
        try:
            if any(file.path.startswith(prefix) for file in process.open_files()):
                found.append(process)
        except psutil.Error:  # gone, or another user's
            continue
    return found


def main(directory: Path, logs: Path) -> None:
    """Wait for the driver to end, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    if not directory.exists():
        return
    deadline = time.monotonic() + _GRACE_S
    while (left := users(directory)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=_GRACE_S)
    keep_logs(directory, logs)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
