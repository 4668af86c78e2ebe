"""The multi-process fixture: order, errors, time-outs, recovery, cost, isolation, and that nothing stays behind."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, RankPools, RankTimeoutError

ROOT = Path(__file__).resolve().parent.parent


def rank_and_sum(offset, scale=1):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), scale * int(total)


def echo(value):
    return value


def raise_on_rank(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like it")
    dist.barrier()  # the others wait for a rank that will not come


def die_on_rank(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_on_rank(rank):
    if dist.get_rank() == rank:
        time.sleep(600)
    return dist.get_rank()


def return_a_lambda():
    return lambda: None


def leave_traces():
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    torch.set_default_dtype(torch.float64)
    torch.rand(3)
    return len(dist.distributed_c10d._world.pg_map)


def state_at_start():
    from megatron.core import parallel_state

    return (
        parallel_state.is_initialized(),
        len(dist.distributed_c10d._world.pg_map),
        str(torch.get_default_dtype()),
        torch.rand(2).tolist(),
        random.random(),
        float(np.random.rand()),
    )


def what_is_preloaded():
    return os.getpid(), [name for name in ("megatron.core.models.gpt.gpt_model", "vllm", "ray") if name in sys.modules]


def threads():
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["WORLD_SIZE"]


def test_results_come_in_rank_order(ranks):
    assert ranks(2).run(rank_and_sum, 10, scale=2) == [(0, 42), (1, 42)]
    assert ranks(4).run(rank_and_sum, 0) == [(0, 6), (1, 6), (2, 6), (3, 6)]
    assert ranks(1).run(rank_and_sum, 5) == [(0, 5)]


def test_the_mark_is_set_by_using_the_fixture(ranks, request):
    assert request.node.get_closest_marker("multiproc") is not None


def test_ranks_are_forked_after_the_imports_and_not_from_pytest(ranks):
    answers = ranks(2).run(what_is_preloaded)
    assert [modules for _, modules in answers] == [["megatron.core.models.gpt.gpt_model"]] * 2
    assert [pid for pid, _ in answers] == ranks(2).pids
    assert psutil.Process(answers[0][0]).ppid() not in (os.getpid(), 1)
    assert ranks(2).run(threads) == [(1, "1", "2")] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_tensors_travel_by_value(ranks, dtype):
    sent = {"weights": torch.arange(100_000).to(dtype).reshape(100, 1000), "array": np.arange(5)}
    received = ranks(2).run(echo, sent)
    ranks(2).stop()  # a handle of shared memory would die here
    for answer in received:
        assert torch.equal(answer["weights"], sent["weights"])
        assert answer["weights"].dtype == dtype
        assert np.array_equal(answer["array"], sent["array"])


READER = """
import sys, torch
from tests.ranks import RankPools
from tests.test_ranks import echo
parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
(answer,) = RankPools()(1).run(echo, parameter.t())
assert torch.equal(answer, parameter.t()) and answer.stride() == (1, 3)
assert "megatron.core" not in sys.modules
"""


@pytest.mark.multiproc
def test_reading_a_tensor_imports_nothing():
    subprocess.run([sys.executable, "-c", READER], cwd=ROOT, check=True, timeout=120)


def test_an_exception_brings_its_traceback_and_the_pool_recovers(ranks):
    pool = ranks(2)
    before = [pid for pid, _ in pool.run(what_is_preloaded)]
    with pytest.raises(RankError, match="rank 1 of 2 failed") as caught:
        pool.run(raise_on_rank, 1)
    message = str(caught.value)
    assert "in raise_on_rank" in message
    assert "ValueError: rank 1 does not like it" in message
    after = [pid for pid, _ in pool.run(what_is_preloaded)]
    assert not set(before) & set(after)
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert pool.run(rank_and_sum, 0) == [(0, 1), (1, 1)]


def test_a_time_out_names_the_ranks_and_where_they_are_and_the_pool_recovers(ranks):
    started = time.monotonic()
    with pytest.raises(RankTimeoutError, match=r"no answer within 1 s from rank 2 of 4") as caught:
        ranks(4).run(sleep_on_rank, 2, timeout=1)
    assert time.monotonic() - started < 30
    assert "in sleep_on_rank" in str(caught.value)
    assert ranks(4).run(rank_and_sum, 0) == [(rank, 6) for rank in range(4)]


def test_a_rank_that_dies_is_named_with_its_exit_code(ranks):
    with pytest.raises(RankError, match=r"(?s)rank \d of 2 failed.*ended without an answer \(exit code 7\)"):
        ranks(2).run(die_on_rank, 1)
    ranks(2).run(rank_and_sum, 0)
    os.kill(ranks(2).pids[0], signal.SIGKILL)  # between two runs
    with pytest.raises(RankError, match=r"exit code -9"):
        ranks(2).run(rank_and_sum, 0)
    assert ranks(2).run(rank_and_sum, 0) == [(0, 1), (1, 1)]


def test_what_cannot_be_pickled_is_refused_with_what_to_do(ranks):
    with pytest.raises(TypeError, match="module-level function"):
        ranks(1).run(lambda: None)
    with pytest.raises(RankError, match="the result cannot be pickled"):
        ranks(1).run(return_a_lambda)
    with pytest.raises(ValueError, match="1 to 8 ranks expected, got 9"):
        ranks(9)


def test_a_run_sees_nothing_of_the_run_before(ranks):
    ranks(2).run(rank_and_sum, 0)
    fresh = ranks(2).run(state_at_start)
    assert fresh[0][:3] == (False, 1, "torch.float32")
    assert ranks(2).run(leave_traces)[0] > 1
    assert ranks(2).run(state_at_start) == fresh


def test_a_warm_run_costs_less_than_a_second(ranks):
    pool = ranks(2)
    pool.run(rank_and_sum, 0)
    costs = []
    for _ in range(5):
        started = time.monotonic()
        pool.run(rank_and_sum, 0)
        costs.append(time.monotonic() - started)
    assert sorted(costs)[2] < 1.0, costs


def test_the_pool_unused_for_longest_makes_room(ranks):
    pools = RankPools(max_processes=3)
    try:
        pools(1).run(rank_and_sum, 0)
        pools(2).run(rank_and_sum, 0)
        pools(1).run(rank_and_sum, 0)
        kept, evicted = pools(1).pids, pools(2).pids
        pools(1)
        pools(2)
        assert pools(1).pids == kept
        assert pools(2).pids == evicted
        pools(3).run(rank_and_sum, 0)
        assert not any(psutil.pid_exists(pid) for pid in kept + evicted)
        assert len(pools(3).pids) == 3
    finally:
        pools.stop()


DRIVER = """
import sys, time
from tests.ranks import RankPools
from tests.test_ranks import sleep_on_rank, what_is_preloaded
pools = RankPools()
print(*[pid for pid, _ in pools(2).run(what_is_preloaded)], flush=True)
pools(2).run(sleep_on_rank, 0)
"""


@pytest.mark.multiproc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_its_driver(how):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        driver.send_signal(how)
        assert driver.wait(20) != 0
        deadline = time.monotonic() + 10
        while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
