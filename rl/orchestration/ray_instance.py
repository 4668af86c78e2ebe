"""The Ray that a run uses: a private local instance by default, or a cluster given explicitly."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray

from rl.orchestration import reaper


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
        temp_dir: where it keeps its files, in a fresh directory that is removed at the end; None: ``/tmp``.
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
    directory = Path(tempfile.mkdtemp(prefix="ultraep-", dir=temp_dir or "/tmp")).absolute()
    # Usage reports would be sent from machines that may have no way out, at the cost of a time-out.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    watcher = reaper.start(directory, logs.absolute())
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        object_store_memory=object_store_mib << 20,
        include_dashboard=False,
        _temp_dir=str(directory),
        **quiet,
    )
    try:
        yield
    finally:
        ray.shutdown()
        reaper.keep_logs(directory, logs)
        shutil.rmtree(directory, ignore_errors=True)
        assert watcher.stdin is not None
        watcher.stdin.close()
