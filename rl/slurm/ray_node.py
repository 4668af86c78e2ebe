"""Ray's processes on one node of a job, started by us and ended by us: nothing of anybody else's is touched.

``ray stop`` would end every Ray of this user on the node, other jobs' included. So ``ray start --block`` runs as our
child, and what it leaves behind is found by its files: they are all below one directory that only this job uses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from rl.orchestration import reaper
from rl.slurm import network

_UP_S, _STOP_S = 300.0, 20.0
_TRIES = 5


class RayStartError(RuntimeError):
    """Ray did not start; the message holds the end of what it printed."""


@dataclass(frozen=True)
class NodeSettings:
    """What this node offers to Ray.

    Attributes:
        address: IPv4 address of the interface that is used.
        directory: of Ray's files, on this node's own disk.
        log: file for what ``ray start`` prints.
        cpus: CPU tokens.
        object_store_mib: MiB; None: Ray's choice, a third of memory.
    """

    address: str
    directory: Path
    log: Path
    cpus: int
    object_store_mib: int | None = None


class RayNode:
    """A running ``ray start``.

    Attributes:
        port: of the cluster's store, on the head.
    """

    def __init__(self, settings: NodeSettings, port: int, process: subprocess.Popen[bytes]) -> None:
        self.settings = settings
        self.port = port
        self._process = process
        self._stopped = False

    @classmethod
    def head(cls, settings: NodeSettings, job: int) -> RayNode:
        """Start a new cluster, on a port of the job.

        Raises:
            RayStartError: it did not come up, on several ports.
        """
        for attempt in range(_TRIES):
            # Between looking for a free port and listening on it, somebody else may take it: then the next ones.
            port, client = (network.free_port(job, settings.address, skip=2 * attempt + i) for i in range(2))
            prepare(settings)
            ports = (f"--port={port}", f"--ray-client-server-port={client}")
            node = cls(settings, port, _start(settings, "--head", *ports, "--include-dashboard=false"))
            if node._came_up():
                return node
            node.stop()
        raise RayStartError(f"Ray's head did not start on {settings.address}:\n{_tail(settings.log)}")

    @classmethod
    def worker(cls, settings: NodeSettings, head: str) -> RayNode:
        """Join the job's cluster at ``head``, ``"address:port"``.

        Raises:
            RayStartError: it did not come up.
        """
        prepare(settings)
        node = cls(settings, int(head.rpartition(":")[2]), _start(settings, f"--address={head}"))
        if not node._came_up():
            node.stop()
            raise RayStartError(
                f"Ray did not start on {settings.address} for the head at {head}:\n{_tail(settings.log)}"
            )
        return node

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, keep_logs: Path | None = None, grace_s: float = _STOP_S) -> None:
        """End all of it and remove its files; calling it again does nothing.

        Args:
            keep_logs: directory that gets what workers printed; None: it is not kept.
            grace_s: for Ray to end by itself.
        """
        if self._stopped:
            return
        self._stopped = True
        directory = self.settings.directory
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        end_users(directory)
        self._process.kill()
        self._process.wait()
        if keep_logs is not None:
            reaper.keep_logs(directory, keep_logs)
        shutil.rmtree(directory, ignore_errors=True)

    def _came_up(self) -> bool:
        """Wait until it says so, or has ended."""
        deadline = time.monotonic() + _UP_S
        while self.running and time.monotonic() < deadline:
            if "Ray runtime started." in _tail(self.settings.log):
                return True
            time.sleep(0.2)
        return False


def prepare(settings: NodeSettings) -> None:
    """An empty directory for Ray, for our eyes only, and an empty log."""
    end_users(settings.directory)
    shutil.rmtree(settings.directory, ignore_errors=True)
    settings.directory.mkdir(parents=True, mode=0o700)
    settings.log.parent.mkdir(parents=True, exist_ok=True)
    settings.log.write_bytes(b"")


def end_users(directory: Path) -> None:
    """End every process that has a file of this directory open: what is left of Ray there."""
    left = reaper.users(directory) if directory.exists() else []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_STOP_S)


def _start(settings: NodeSettings, *arguments: str) -> subprocess.Popen[bytes]:
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
        *arguments,
        f"--node-ip-address={settings.address}",
        f"--num-cpus={settings.cpus}",
        f"--temp-dir={settings.directory}",
        "--disable-usage-stats",
        # Ray's own defaults are numbers that two jobs on a node would fight for; 0 is any that is free.
        *(f"--{name}-port=0" for name in ("object-manager", "node-manager", "min-worker", "max-worker")),
        *(f"--{name}-port=0" for name in ("metrics-export", "runtime-env-agent")),
        *(f"--dashboard-agent-{name}-port=0" for name in ("listen", "grpc")),
    ]
    if settings.object_store_mib is not None:
        command.append(f"--object-store-memory={settings.object_store_mib << 20}")
    with open(settings.log, "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""
