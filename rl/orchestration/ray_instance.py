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
    *, address: str | None, num_cpus: int, num_gpus: int, object_store_mib: int, temp_dir: Path | None
) -> Iterator[None]:
    """Start a private instance (own ports and files, no dashboard), or join a cluster; leave it at the end.

    A private instance never joins one that it finds running, and ends with this process, however that ends.

    Args:
        address: of a cluster to join; None for a private instance.
        num_cpus, num_gpus: what the private instance offers to actors; tokens, not cores.
        object_store_mib: MiB of its object store.
        temp_dir: where it keeps its files; None: a fresh directory, removed at the end.
    """
    quiet = {"logging_level": "ERROR", "log_to_driver": True}
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
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
        if temp_dir is None:
            shutil.rmtree(directory, ignore_errors=True)
