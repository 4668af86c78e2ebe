"""A step's plans are those of ``solve``, and a rank's tables and counts are those of the plans."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep.kernels import reroute as reroute_kernel
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import Costs, PlanSettings, solve
from megatron_ultraep.plan.foresight import Foreseer, StepPlan, solve_step
from megatron_ultraep.runtime import reroute
from megatron_ultraep.runtime.planning import splits_of
from tests.megatron_ultraep.plan.cases import problems, random_loads

ROOT = Path(__file__).resolve().parents[3]
GATE = Costs(token_ps=1000, copy_ps_per_kib=1024, replica_bytes=100, fixed_ps=5000)


@st.composite
def steps(draw):
    """Loads of a few micro-batches and layers, whose homes differ, and settings."""
    _, layout, options = draw(problems())
    microbatches, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layouts = [
        ExpertLayout(
            layout.experts,
            layout.ranks,
            tuple(rng.permutation(layout.experts).tolist()),
            layout.node_size,
            layout.slots,
        )
        for _ in range(layers)
    ]
    loads = np.stack(
        [np.stack([random_loads(rng, layout.ranks, layout.experts) for _ in layouts]) for _ in range(microbatches)]
    )
    gate = draw(st.sampled_from([None, GATE]))
    return loads, layouts, PlanSettings(options.min_tokens, options.tolerance_ppm, gate)


def some_step(costs=None):
    rng = np.random.default_rng(3)
    layouts = [ExpertLayout(16, 4, tuple(rng.permutation(16).tolist()), 2, 2) for _ in range(3)]
    loads = np.stack([np.stack([random_loads(rng, 4, 16) % 20_000 for _ in layouts]) for _ in range(2)])
    return loads, layouts, PlanSettings(min_tokens=10, costs=costs)


def every(loads):
    return [(m, n) for m in range(loads.shape[0]) for n in range(loads.shape[1])]


@settings(max_examples=80, deadline=None)
@given(steps())
def test_plans_are_those_of_solve(step):
    loads, layouts, options = step
    before = loads.copy()
    made = solve_step(loads, layouts, options)
    assert np.array_equal(loads, before)
    for m, n in every(loads):
        plan = solve(loads[m, n], layouts[n], options)
        assert made.plan(m, n).same_bits(plan)
        assert made.before[m, n] == plan.before.max()
        assert made.after[m, n] == plan.after.max()


@settings(max_examples=60, deadline=None)
@given(steps())
def test_a_rank_gets_the_tables_and_counts_of_its_plans(step):
    loads, layouts, options = step
    made = solve_step(loads, layouts, options)
    rank = int(loads.sum()) % layouts[0].ranks
    mine = made.for_rank(rank)
    most = (mine.table.shape[-1] - 3) // 2
    seen = 1
    for m, n in every(loads):
        plan = solve(loads[m, n], layouts[n], options)
        assert np.array_equal(mine.replica_expert[m, n], plan.replica_expert)
        assert np.array_equal(mine.splits[m, n], splits_of(plan, rank)[:-1])
        assert np.array_equal(mine.loads[m, n], loads[m, n, rank])
        assert mine.replicas[m, n] == len(plan.replicas)
        table, width = mine.table[m, n], plan.copies.shape[1]
        copies = (plan.copies >= 0).sum(axis=1)
        seen = max(seen, width)
        assert np.array_equal(table[:, 0], copies)
        assert np.array_equal(table[:, 1], np.maximum(1, loads[m, n, rank]))
        assert np.array_equal(table[:, 2], np.where(copies > 1, reroute.stride(loads[m, n, rank]), 1))
        assert np.array_equal(table[:, 3 : 3 + width], plan.until(rank))
        assert np.array_equal(table[:, 3 + most : 3 + most + width], plan.copies)
        assert (table[:, 3 + most + width :] == -1).all()
    assert most == seen
    assert [a.dtype for a in (mine.replica_expert, mine.table, mine.splits, mine.loads, mine.replicas)] == [
        np.int64, np.int32, np.int64, np.int32, np.int32,
    ]  # fmt: skip


def test_the_kernel_sends_tokens_where_the_plan_says():
    loads, layouts, options = some_step()
    mine = solve_step(loads, layouts, options).for_rank(1)
    rng = np.random.default_rng(0)
    for m, n in every(loads):
        plan = solve(loads[m, n], layouts[n], options)
        tokens = int(loads[m, n, 1].max(initial=1))
        routing_map = np.zeros((tokens, 16), dtype=bool)
        for expert, count in enumerate(loads[m, n, 1]):
            routing_map[rng.permutation(tokens)[:count], expert] = True
        routing_map = torch.from_numpy(routing_map)
        counts = reroute_kernel.count(routing_map)
        _, sent = reroute_kernel.reroute(
            routing_map.double(),
            routing_map,
            counts.before,
            torch.from_numpy(mine.table[m, n].copy()),
            plan.quota.shape[1],
        )
        assert np.array_equal(sent.sum(0).numpy(), plan.quota[1])


def test_immutable_and_small():
    loads, layouts, options = some_step()
    made = solve_step(loads, layouts, options)
    mine = made.for_rank(0)
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, StepPlan)
    assert again.plan(1, 2).same_bits(made.plan(1, 2))
    assert np.array_equal(pickle.loads(pickle.dumps(mine)).table, mine.table)
    assert made.nbytes < loads.nbytes
    assert mine.nbytes == sum(
        a.nbytes for a in (mine.replica_expert, mine.table, mine.splits, mine.loads, mine.replicas)
    )
    with pytest.raises(ValueError, match="read-only"):
        mine.table[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        made.replica_quota[0] = 0


def test_large_loads_keep_their_bits():
    loads, layouts, options = some_step()
    loads = loads * 100
    assert loads.max() > 2**16
    made = solve_step(loads, layouts, options)
    assert made.plan(0, 0).same_bits(solve(loads[0, 0], layouts[0], options))


def test_threads_do_not_matter():
    loads, layouts, options = some_step(GATE)
    one, three = (solve_step(loads, layouts, options, threads=t) for t in (1, 3))
    assert all(one.plan(m, n).same_bits(three.plan(m, n)) for m, n in every(loads))


def test_what_does_not_fit_is_refused():
    loads, layouts, options = some_step()
    with pytest.raises(ValueError, match=r"int64 loads .* got int32 \[2, 3, 4, 16\]"):
        solve_step(loads.astype(np.int32), layouts, options)
    with pytest.raises(ValueError, match="got 2 layouts for 3 layers"):
        solve_step(loads, layouts[:2], options)
    with pytest.raises(ValueError, match="layouts of one shape"):
        solve_step(loads, [*layouts[:2], ExpertLayout(16, 4)], options)
    with pytest.raises(ValueError, match=r"\[4, 16\], got \[2, 16\]"):
        solve_step(loads[:, :, :2], layouts, options)
    with pytest.raises(ValueError, match="rank from 0 to 3, got 4"):
        solve_step(loads, layouts, options).for_rank(4)
    loads[1, 2, 3, 4] = -5
    with pytest.raises(ValueError, match="micro-batch 1, MoE layer 2: expected loads >= 0, got -5 from source rank 3"):
        solve_step(loads, layouts, options)


def test_a_process_plans_in_the_background():
    loads, layouts, options = some_step()
    with Foreseer() as foreseer:
        handle = foreseer.submit(loads, layouts, options)
        with pytest.raises(TimeoutError, match="the plans of 2 micro-batches x 3 MoE layers"):
            handle.result(0.0)
        made = handle.result(120.0)
        assert handle.done()
        assert all(made.plan(m, n).same_bits(solve(loads[m, n], layouts[n], options)) for m, n in every(loads))
        wrong = loads.copy()
        wrong[0, 1, 0, 0] = -1
        with pytest.raises(ValueError, match="micro-batch 0, MoE layer 1: expected loads >= 0"):
            foreseer.submit(wrong, layouts, options).result(120.0)
    with pytest.raises(RuntimeError, match="has ended or was closed"):
        foreseer.submit(loads, layouts, options)


def test_a_killed_parent_leaves_no_planning_process(tmp_path):
    script = tmp_path / "plans.py"
    script.write_text(
        """
import time
from megatron_ultraep.plan.foresight import Foreseer

if __name__ == "__main__":
    foreseer = Foreseer()
    foreseer._pool.submit(int).result()  # it runs
    print(*foreseer._pool._processes, flush=True)
    time.sleep(60)
"""
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 1
    assert not alive
