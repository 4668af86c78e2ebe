"""The Ray that a run uses: a private local instance by default, or a cluster given explicitly."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray


@contextlib.contextmanager
def ray_instance(
    *,
    address: str | None,
    num_cpus: int,
    num_gpus: int,
    object_store_mib: int,
    temp_dir: Path | None,
    logs: Path,
) -> Iterator[None]:
    """Start a private instance (own ports and files, no dashboard), or join a cluster; leave it at the end.

    A private instance never joins one that it finds running, and ends with this process, however that ends.

    Args:
        address: of a cluster to join; None for a private instance.
        num_cpus, num_gpus: what the private instance offers to actors; tokens, not cores.
        object_store_mib: MiB of its object store.
        temp_dir: where it keeps its files; None: a fresh directory, removed at the end.
        logs: directory that gets what the actors of a private instance printed.
    """
    # Engines and ranks print hundreds of lines; errors reach us as exceptions, the rest goes to files.
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Ray's sockets live below it, and their paths must stay under 108 bytes.
    directory = temp_dir or Path(tempfile.mkdtemp(prefix="ultraep-", dir="/tmp"))
    # Usage reports would be sent from machines that may have no way out, at the cost of a time-out.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # When we are killed, Ray's agents report it to the server that died with us, and try for this long (default 60).
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        object_store_memory=object_store_mib << 20,
        include_dashboard=False,
        _temp_dir=str(directory.absolute()),
        **quiet,
    )
    try:
        yield
    finally:
        ray.shutdown()
        _keep_logs(directory, logs)
        if temp_dir is None:
            shutil.rmtree(directory, ignore_errors=True)


def _keep_logs(directory: Path, logs: Path) -> None:
    """Copy what workers printed, named by process id; files of an earlier session of the run are replaced."""
    printed = [p for p in directory.glob("session_*/logs/worker-*") if p.is_file() and p.stat().st_size]
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    for path in printed:
        # worker-<worker id>-<job id>-<pid>.out or .err
        shutil.copyfile(path, logs / f"worker-{path.stem.rsplit('-', 1)[-1]}{path.suffix}")
