"""Ranks on GPUs for check scripts: one process per GPU, NCCL, up until they are stopped.

pools = GpuPools()
pools(2).run(function, *arguments)      # results by rank; the same interface as tests.ranks
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def _rank(connection: Connection, rank: int, world: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    # As launchers bind ranks: a share of the cores each, so that the scheduler moves none of their threads far.
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // world
    if share:
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])
    torch.cuda.set_device(rank)
    for run in itertools.count():
        try:
            function, arguments, keywords = connection.recv()
        except EOFError:
            break
        try:
            # Fresh groups for every run: communicators take device memory, and models leave theirs behind.
            device = torch.device("cuda", rank)
            dist.init_process_group(
                "nccl", init_method=f"file://{store}-{run}", rank=rank, world_size=world, device_id=device
            )
            connection.send((True, function(*arguments, **keywords)))
        except Exception:
            connection.send((False, traceback.format_exc()))
        gc.collect()
        torch.cuda.empty_cache()
        dist.destroy_process_group()


class GpuPool:
    """``size`` ranks of one NCCL group."""

    def __init__(self, size: int) -> None:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # Transformer Engine multiplies float32 in TF32, whose 10 bits turn a difference of 1e-7 into one of 1e-3.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        store = os.path.join(tempfile.mkdtemp(prefix="ultraep-gpu-"), "store")
        self._connections = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, rank, size, store), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0, **keywords: Any) -> list[Any]:
        """Call a module-level function on every rank; results in rank order.

        Raises:
            RuntimeError: a rank raised, or did not answer in time; the pool is of no use then.
        """
        for connection in self._connections:
            connection.send((function, arguments, keywords))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(timeout):
                raise RuntimeError(f"rank {rank} did not answer within {timeout:.0f} s")
            good, value = connection.recv()
            if not good:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()


class GpuPools:
    """Pools by size, made when first asked for; a failed one is replaced by :meth:`renew`."""

    def __init__(self) -> None:
        self._pools: dict[int, GpuPool] = {}

    def __call__(self, size: int) -> GpuPool:
        if size not in self._pools:
            self._pools[size] = GpuPool(size)
        return self._pools[size]

    def renew(self) -> None:
        """Stop all ranks; the next call starts fresh ones."""
        for pool in self._pools.values():
            pool.stop()
        self._pools.clear()

    def stop(self) -> None:
        self.renew()
