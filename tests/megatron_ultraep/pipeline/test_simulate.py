"""The simulator against a definition of its own: longest paths over everything that must come before."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_ultraep.pipeline.baselines import concatenated, one_f_one_b, random_schedule, serial_makespan
from megatron_ultraep.pipeline.problem import InvalidSchedule, PipelineModel, Problem, Schedule, Task
from megatron_ultraep.pipeline.simulate import simulate
from tests.megatron_ultraep.pipeline.cases import random_problem

F, B = Task(0, False), Task(0, True)


def alone(stages=2, microbatches=2, **options):
    model = PipelineModel.uniform(
        "a", stages=stages, microbatches=microbatches, forward=1, backward=2, activation=1, **options
    )
    return Problem(stages, (model,))


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 2), (4, 8), (8, 3)])
def test_1f1b_takes_what_it_is_known_to_take(stages, microbatches):
    timeline = simulate(one_f_one_b(alone(stages, microbatches), 0))
    assert timeline.makespan == 3 * (microbatches + stages - 1)
    assert timeline.peak_memory == tuple(min(stages - s, microbatches) for s in range(stages))
    assert timeline.idle == (3 * (stages - 1),) * stages
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_a_delay_is_paid_on_every_hop_between_nodes():
    timeline = simulate(one_f_one_b(alone(3, 1, delay=0.5), 0))
    assert timeline.makespan == 3 * 3 + 4 * 0.5
    times = timeline.times()
    last = timeline.operations[2]
    assert times[2, last[1]][0] == times[2, last[0]][1], "none between a forward and its own backward"


@pytest.mark.parametrize("seed", range(40))
def test_times_are_longest_paths(seed):
    problem = random_problem(seed)
    schedule = random_schedule(problem, seed)
    timeline = simulate(schedule)
    times = {operation: span for (_, operation), span in timeline.times().items()}
    for n, operations in enumerate(timeline.operations):
        for position, operation in enumerate(operations):
            model = problem.models[operation.model]
            start, end = times[operation]
            earliest = [0.0]
            if position:
                earliest.append(times[operations[position - 1]][1])
            if not operation.backward and operation.stage:
                earliest.append(times[replace(operation, stage=operation.stage - 1)][1] + model.delay)
            if operation.backward:
                forward = times[replace(operation, backward=False)][1]
                assert start >= forward
                if operation.stage == model.stages - 1:
                    earliest.append(forward)
                else:
                    earliest.append(times[replace(operation, stage=operation.stage + 1)][1] + model.delay)
            assert start == max(earliest)
            assert end - start == (model.backward if operation.backward else model.forward)[operation.stage]
        held = np.zeros(len(operations))
        for model_index, model in enumerate(problem.models):
            mine = [o for o in operations if o.model == model_index]
            for i in range(model.microbatches):
                own = [operations.index(o) for o in mine if o.microbatch == i]
                if own:
                    held[min(own) : max(own) + 1] += model.activation[mine[0].stage]
        np.testing.assert_array_equal(timeline.memory[n], held)


def test_concatenated_is_not_longer_than_serial():
    for seed in range(20):
        problem = random_problem(seed)
        assert simulate(concatenated(problem)).makespan <= serial_makespan(problem)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (((F, F, B), (F, F, B, B)), "node 0: expected 2 times task B0 ('a'), got 1: micro-batch 1 is missing"),
        (((F, F, B, B, B), (F, F, B, B)), "node 0: expected 2 times task B0 ('a'), got 3: micro-batch 2 is one too"),
        (((F, F, B, B), (B, F, F, B)), "node 1, position 0: backward of 'a', micro-batch 0, stage 1 comes before"),
        (
            ((F, B, F, B), (F, F, B, B)),
            "deadlock: node 0's backward of 'a', micro-batch 0, stage 0 waits for backward of 'a', micro-batch 0, "
            "stage 1 on node 1; node 1's forward of 'a', micro-batch 1, stage 1 waits for forward of 'a', "
            "micro-batch 1, stage 0 on node 0",
        ),
    ],
)
def test_an_invalid_schedule_names_node_task_and_micro_batch(orders, message):
    with pytest.raises(InvalidSchedule, match=re.escape(message)):
        simulate(Schedule(alone(), orders))


def test_a_memory_cap_is_kept():
    problem = replace(alone(), memory_cap=(2.0, 1.0))
    assert simulate(Schedule(problem, ((F, F, B, B), (F, B, F, B)))).peak_memory == (2.0, 1.0)
    with pytest.raises(InvalidSchedule, match=r"node 1, position 1: forward of 'a', micro-batch 1.* hold 2, more than"):
        simulate(Schedule(problem, ((F, F, B, B), (F, F, B, B))))


def test_a_forward_only_model_holds_nothing_after_its_forward():
    model = PipelineModel.uniform(
        "reference", stages=2, microbatches=3, forward=1, backward=0, activation=5, forward_only=True
    )
    timeline = simulate(one_f_one_b(Problem(2, (model,)), 0))
    assert timeline.makespan == 4
    assert timeline.peak_memory == (5, 5)


@pytest.mark.parametrize("seed", range(30))
def test_random_orders_are_valid_or_named(seed):
    """Shuffled orders that respect counts: whatever is accepted must have come from an order without cycles."""
    problem = random_problem(seed)
    schedule = random_schedule(problem, seed)
    rng = random.Random(seed)
    orders = [list(order) for order in schedule.orders]
    rng.shuffle(orders[rng.randrange(len(orders))])
    message = ""
    try:
        timeline = simulate(Schedule(problem, tuple(map(tuple, orders))))
        assert sum(len(o) for o in timeline.operations) == sum(map(len, orders))
    except InvalidSchedule as error:
        message = str(error)
    assert not message or re.search(r"node \d+.*micro-batch \d+", message)


def test_random_schedules_differ_and_keep_caps():
    problem = random_problem(4)
    assert len({random_schedule(problem, seed).digest() for seed in range(10)}) > 5
    assert random_schedule(problem, 1) == random_schedule(problem, 1)
    peak = max(simulate(concatenated(problem)).peak_memory)
    capped = replace(problem, memory_cap=(peak,) * problem.nodes)
    for seed in range(5):
        simulate(random_schedule(capped, seed))
