import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_ultraep.pipeline import InvalidSchedule, Operation, PipelineModel, Problem, Schedule, Task
from megatron_ultraep.pipeline.baselines import concatenated, random_schedule
from tests.megatron_ultraep.pipeline.cases import random_problem

INSTANCE = {
    "name": "one",
    "nodes": 8,
    "large": {"stages": 8, "microbatches": 8, "forward": 5, "backward": 10, "activation": 1.95},
    "small": {
        "stages": 4,
        "microbatches": 4,
        "replicas": 2,
        "forward": 4,
        "backward": 8,
        "activation": 2,
        "direction": "reversed on each segment",
    },
}


def test_an_instance_places_reversed_replicas_on_segments():
    problem = Problem.of_instance(INSTANCE)
    large, small = problem.models
    assert large.nodes == (tuple(range(8)),)
    assert small.nodes == ((3, 2, 1, 0), (7, 6, 5, 4))
    assert small.place(6) == (1, 1)
    assert problem.count(0) == {Task(m, b): n for m, n in ((0, 8), (1, 4)) for b in (False, True)}
    with pytest.raises(ValueError, match="'one': expected the key 'small'"):
        Problem.of_instance({k: v for k, v in INSTANCE.items() if k != "small"})


@pytest.mark.parametrize("seed", range(5))
def test_json_gives_back_problem_and_schedule(seed):
    problem = random_problem(seed)
    capped = replace(problem, memory_cap=(100.0,) * problem.nodes)
    for one in (problem, capped):
        assert Problem.from_json(one.to_json()) == one
        schedule = random_schedule(one, seed)
        again = Schedule.from_json(schedule.to_json())
        assert again == schedule
        assert again.digest() == schedule.digest()


@pytest.mark.parametrize("text", ["{}", "[]", '{"nodes": 2}', '{"nodes": 1, "models": [{"nodes": [[0]]}]}', "no"])
def test_what_is_no_problem_is_refused(text):
    with pytest.raises(ValueError):
        Problem.from_json(text)
    with pytest.raises(ValueError):
        Schedule.from_json(text)


def test_operations_number_micro_batches_in_order():
    problem = Problem.of_instance(INSTANCE)
    schedule = concatenated(problem)
    operations = schedule.operations(5)
    of_small = [o for o in operations if o.model == 1]
    assert of_small[0] == Operation(1, 1, 2, 0, False)
    for backward in (False, True):
        assert [o.microbatch for o in of_small if o.backward == backward] == [0, 1, 2, 3]


def test_the_digest_is_of_orders_and_shape_not_of_durations():
    problem = random_problem(3)
    schedule = concatenated(problem)
    slower = replace(problem.models[0], forward=tuple(2.0 * f for f in problem.models[0].forward))
    measured = replace(problem, models=(slower, *problem.models[1:]))
    assert Schedule(measured, schedule.orders).digest() == schedule.digest()
    other = (tuple(reversed(schedule.orders[0])), *schedule.orders[1:])
    assert Schedule(problem, other).digest() != schedule.digest()
    renamed = replace(problem, models=(replace(problem.models[0], name="other"), *problem.models[1:]))
    assert Schedule(renamed, schedule.orders).digest() != schedule.digest()


def model(**changes):
    values = {"name": "a", "nodes": ((0, 1),), "microbatches": 2, "forward": (1.0, 1.0), "backward": (2.0, 2.0)}
    return PipelineModel(**values | {"activation": (1.0, 1.0)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": ()}, "at least one replica"),
        ({"nodes": ((0, 0),)}, r"nodes \[0\] have more"),
        ({"nodes": ((0, 1), (2,))}, "as many stages"),
        ({"nodes": ((-1, 0),)}, "expected nodes from 0, got -1"),
        ({"microbatches": 0}, "at least 1 micro-batch"),
        ({"forward": (1.0,)}, "one forward for each of 2 stages, got 1"),
        ({"backward": (1.0, -1.0)}, "backward finite and 0 or more"),
        ({"activation": (float("inf"), 1.0)}, "activation finite"),
        ({"delay": -1.0}, "a delay finite"),
        ({"forward_only": True}, "backward must be all 0"),
    ],
)
def test_a_bad_model_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_a_bad_problem_says_what_is_wrong():
    with pytest.raises(ValueError, match="at least one model"):
        Problem(2, ())
    with pytest.raises(ValueError, match="different names"):
        Problem(2, (model(), model()))
    with pytest.raises(ValueError, match="lies on node 1, but there are nodes 0 to 0"):
        Problem(1, (model(),))
    with pytest.raises(ValueError, match="a memory cap for each of 2 nodes, got 1"):
        Problem(2, (model(),), (1.0,))
    with pytest.raises(ValueError, match=r"node 1: one micro-batch of 'a' holds 1, more than the cap of 0\.5"):
        Problem(2, (model(),), (1.0, 0.5))


def test_a_task_of_a_model_that_is_not_there():
    problem = Problem(2, (model(nodes=((0,),), forward=(1.0,), backward=(2.0,), activation=(1.0,)),))
    with pytest.raises(InvalidSchedule, match="node 1, position 0: task F0 is of a model that has no stage"):
        Schedule(problem, ((), (Task(0, False),))).operations(1)
    with pytest.raises(InvalidSchedule, match="an order for each of 2 nodes, got 1"):
        Schedule(problem, ((),))


@pytest.mark.parametrize("text", ["X0", "F", "F-1", ""])
def test_what_is_no_task_is_refused(text):
    with pytest.raises(ValueError, match="a task like F0 or B1"):
        Task.parse(text)


def test_planning_imports_no_torch():
    """The driver plans before any rank has started."""
    code = (
        "import sys, megatron_ultraep.pipeline.solve, megatron_ultraep.pipeline.gantt\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout.replace("'", '"')) == []
