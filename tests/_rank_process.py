"""What one rank of a `tests.ranks.RankPool` does. The pytest process imports it too, hence no heavy imports on top."""

import ctypes
import datetime
import faulthandler
import gc
import importlib
import importlib.util
import itertools
import os
import pickle
import random
import signal
import sys
import traceback
import warnings
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests import _pickling

OK, FAILED, CRASHED = "ok", "failed", "crashed"

GROUP_TIMEOUT = datetime.timedelta(seconds=60)
SEED = 1234
_PR_SET_PDEATHSIG = 1
_runs = itertools.count()


def rank_main(connection: Connection, rank: int, world_size: int, stack_file: str) -> None:
    """Join the group, then run whatever comes down the connection until it closes."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of the pytest process, which stops us
    stacks = Path(stack_file).open("w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    try:
        _join_group(connection, rank, world_size)
    except BaseException:
        _answer(connection, FAILED, traceback.format_exc())
        return
    _answer(connection, OK, None)
    while True:
        try:
            work = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        _answer(connection, *_run(work))


def _run(work: bytes) -> tuple[str, Any]:
    try:
        reset()
        function, args, kwargs = pickle.loads(work)
        return OK, function(*args, **kwargs)
    except BaseException:
        return FAILED, traceback.format_exc()


def _answer(connection: Connection, status: str, value: Any) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        data = _pickling.dumps((status, value))
    except Exception:
        data = pickle.dumps((FAILED, f"the result cannot be pickled: {value!r:.500}\n{traceback.format_exc()}"))
    connection.send_bytes(data)


def _die_with_parent() -> None:
    """The parent is the fork server, which in turn ends with the pytest process, however that one ends."""
    # The fork server lives as long as somebody holds this pipe, and hands it to every child; only pytest should.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it died before the line above
            os._exit(0)


def _join_group(connection: Connection, rank: int, world_size: int) -> None:
    importlib.import_module("tests._preload")  # done by the fork server; an import error there would pass in silence
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    _install_cpu_shims()
    host = "127.0.0.1"
    store = None
    if rank == 0:
        store = TCPStore(host, 0, world_size, is_master=True, timeout=GROUP_TIMEOUT, wait_for_workers=False)
        _answer(connection, OK, store.port)
    port = pickle.loads(connection.recv_bytes())
    if store is None:
        store = TCPStore(host, port, world_size, is_master=False, timeout=GROUP_TIMEOUT, wait_for_workers=False)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=host, MASTER_PORT=str(port),
    )  # fmt: skip
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)


def _install_cpu_shims() -> None:
    name = "megatron_ultraep.megatron.cpu"
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name).install()


def reset() -> None:
    """Undo what the last run left: process groups, Megatron's globals, random state, default dtype."""
    import numpy
    import torch

    _reset_megatron()
    _destroy_subgroups()
    gc.collect()
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)


def _reset_megatron() -> None:
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router_replay import RouterReplay

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    RouterReplay.clear_global_router_replay_instances()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of the shape of the first loss scale it was given
    if tensor_parallel_random._CUDA_RNG_STATE_TRACKER is not None:
        tensor_parallel_random._CUDA_RNG_STATE_TRACKER.reset()


def _destroy_subgroups() -> None:
    """Each gloo group holds threads and sockets. All ranks have answered by now: nobody waits in one of them."""
    import torch.distributed as dist

    default = dist.group.WORLD
    groups = dist.distributed_c10d._world.pg_map
    for group in list(groups):
        if group is not default:
            dist.destroy_process_group(group)
    # A group made with use_local_synchronization is named after its ranks: the next run must not find the addresses
    # that the last one left in the store under the same name.
    backend, store = groups[default]
    base = store.underlying_store if isinstance(store, dist.PrefixStore) else store
    groups[default] = (backend, dist.PrefixStore(f"run{next(_runs)}", base))
