"""Which schedules fused steps run, and when they are solved anew; the search itself is tested where it lives."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.pipeline.baselines import concatenated, one_at_a_time, random_schedule
from megatron_ultraep.pipeline.solve import solve
from rl.orchestration import fused_schedules
from rl.orchestration.fused_memory import StepMemory
from rl.orchestration.fused_schedules import FusedModel, FusedSchedules
from rl.training.fused import StageSeconds

ACTOR = ParallelLayout(world=4, pp=4)
COUNTS = {"actor": 4, "critic": 4}


class Pool:
    """Solves at once, and counts."""

    def __init__(self, *_, **__):
        self.solved, self.error = [], None

    def submit(self, solve, problem, seconds):
        self.solved.append(problem)
        future = Future()
        if self.error is None:
            future.set_result(concatenated(problem))
        else:
            future.set_exception(self.error)
        return future


@pytest.fixture
def schedules(monkeypatch):
    monkeypatch.setattr(fused_schedules, "ProcessPoolExecutor", Pool)
    models = {
        "actor": FusedModel(ACTOR, layers=8, hidden=64),
        "critic": FusedModel(ParallelLayout(world=4, pp=2).opposed(4), layers=4, hidden=64),
    }
    return FusedSchedules(models, solve_s=1.0, drift=0.2, timeout_s=5.0)


def test_the_first_problem_goes_by_sizes(schedules):
    actor, critic = schedules.problem(COUNTS).models
    assert (actor.nodes, critic.nodes) == (((0, 1, 2, 3),), ((1, 0), (3, 2)))
    assert actor.forward == (128.0,) * 4
    assert critic.backward == (256.0,) * 2
    assert schedules.get(COUNTS).guessed


def times(actor, critic):
    return {
        "actor": [StageSeconds(t, 2 * t) for t in actor],
        "critic": [StageSeconds(t, 2 * t) for t in critic],
    }


def test_measured_times_are_what_is_predicted_with(schedules):
    first = schedules.get(COUNTS)
    # The same in other units: the schedule stays, its times are in seconds now.
    schedules.observe(times([0.128] * 4, [0.128] * 2))
    second = schedules.get(COUNTS)
    assert len(schedules._pool.solved) == 1
    assert not second.guessed
    assert second.makespan == pytest.approx(first.makespan / 1000)
    assert second.bound <= second.makespan <= second.serial
    assert second.schedule.digest() == first.schedule.digest()
    metrics = second.metrics(0.5)
    assert metrics["fuse/training/makespan"] == 0.5
    assert metrics["fuse/training/predicted"] == second.makespan
    assert "fuse/training/predicted" not in first.metrics(0.5)


def test_a_schedule_is_solved_anew_when_times_drift_or_counts_change(schedules):
    schedules.get(COUNTS)
    schedules.observe(times([1.0] * 4, [1.0] * 2))
    schedules.get(COUNTS)
    schedules.observe(times([1.1] * 4, [1.0] * 2))
    schedules.get(COUNTS)
    assert len(schedules._pool.solved) == 1
    schedules.observe(times([3.0] * 4, [1.0] * 2))
    schedules.get(COUNTS)
    assert len(schedules._pool.solved) == 2
    schedules.begin({"actor": 5, "critic": 4})
    schedules.get({"actor": 5, "critic": 4})
    assert [p.models[0].microbatches for p in schedules._pool.solved] == [4, 4, 5]


def test_a_solver_that_is_gone_is_named_with_what_to_do(schedules):
    schedules._pool.error = BrokenProcessPool("it was killed")
    with pytest.raises(RuntimeError, match=r"'actor': 4.*BrokenProcessPool.*fuse.training.mode to off"):
        schedules.get(COUNTS)


def test_the_schedule_before_runs_until_the_new_one_is_there(schedules):
    first = schedules.get(COUNTS)
    slow = [Future(), Future()]
    waiting = iter(slow)
    schedules._pool.submit = lambda solve, problem, seconds: next(waiting)
    schedules.observe(times([1.0] * 4, [3.0] * 2))
    drifted = schedules.get(COUNTS)
    assert drifted.schedule.orders == first.schedule.orders
    assert not drifted.guessed
    # Drifted again before it was solved: the first search is called off, and what runs is still the schedule before.
    schedules.observe(times([9.0] * 4, [1.0] * 2))
    assert schedules.get(COUNTS).schedule.orders == first.schedule.orders
    assert slow[0].cancelled()
    found = random_schedule(schedules.problem(COUNTS), seed=0)
    slow[1].set_result(found)
    assert schedules.get(COUNTS).schedule.orders == found.orders != first.schedule.orders


def test_a_solver_that_died_before_is_named_too(schedules):
    def broken(*_):
        raise BrokenProcessPool("it was killed")

    schedules._pool.submit = broken
    with pytest.raises(RuntimeError, match=r"'critic': 4.*BrokenProcessPool.*fuse.training.mode to off"):
        schedules.begin(COUNTS)


def memory(free, *, actor=100.0, measured=True):
    """Micro-batches of the critic hold half of the actor's; nothing passes on the first node, 10 on the others."""
    activations = {"actor": (actor,) * 4, "critic": (actor / 2,) * 2}
    return StepMemory(activations, (0.0, 10.0, 10.0, 10.0), (free,) * 4, measured)


@pytest.fixture
def searched(schedules):
    """The same with the search itself, in this process: as many rounds on every machine."""

    def submit(_, problem, seconds):
        schedules._pool.solved.append(problem)
        future = Future()
        future.set_result(solve(problem, seconds=60, memory_seconds=60, rounds=1, memory_rounds=1).schedule)
        return future

    schedules._pool.submit = submit
    return schedules


def test_a_cap_that_binds_holds_fewer_micro_batches(searched):
    wide = searched.get(COUNTS, memory(5000.0))
    assert wide.schedule.problem.memory_cap == (5000.0, 4990.0, 4990.0, 4990.0)
    assert wide.peaks[0] >= 400.0  # as 1F1B of the actor alone
    tight = searched.get(COUNTS, memory(260.0))
    assert len(searched._pool.solved) == 2
    assert max(tight.peaks) <= 260.0
    assert tight.makespan >= wide.makespan
    metrics = tight.metrics(1.0, [3 * 2**30, 2**30])
    assert metrics["fuse/training/planned_peak_gib"] == max(tight.peaks) / 2**30
    assert metrics["fuse/training/peak_gib"] == 3
    # It serves as long as it fits; a little more room is no reason to search.
    searched.get(COUNTS, memory(300.0))
    assert len(searched._pool.solved) == 2
    searched.get(COUNTS, memory(500.0))
    assert len(searched._pool.solved) == 3


def test_a_kept_schedule_is_searched_again_when_micro_batches_hold_more(searched):
    first = searched.get(COUNTS, memory(400.0))
    assert max(first.peaks) > 300.0
    second = searched.get(COUNTS, memory(400.0, actor=180.0))
    assert len(searched._pool.solved) == 2
    assert max(second.peaks) <= 400.0


def test_what_was_measured_replaces_what_was_counted(schedules):
    schedules.get(COUNTS, memory(5000.0, measured=False))
    schedules.get(COUNTS, memory(5000.0))
    schedules.get(COUNTS, memory(5000.0))
    assert len(schedules._pool.solved) == 2


def test_a_search_for_more_room_than_there_is_is_made_again(schedules):
    too_full, fitting = Future(), Future()
    waiting = iter((too_full, fitting))
    schedules._pool.submit = lambda solve, problem, seconds: next(waiting)
    schedules.begin(COUNTS, memory(5000.0))
    now = schedules.problem(COUNTS, memory(150.0))
    too_full.set_result(concatenated(now))
    fitting.set_result(one_at_a_time(now))
    assert schedules.get(COUNTS, memory(150.0)).schedule.orders == one_at_a_time(now).orders


def test_on_cpus_there_is_no_cap(schedules):
    chosen = schedules.get(COUNTS)
    assert chosen.schedule.problem.memory_cap is None
    assert chosen.peaks is None
    assert not any("peak" in name for name in chosen.metrics(1.0))
