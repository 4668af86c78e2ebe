import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_ultraep.pipeline import search
from megatron_ultraep.pipeline.baselines import concatenated, random_schedule, serial_makespan, serial_peak_memory
from megatron_ultraep.pipeline.exact import optimal_makespan
from megatron_ultraep.pipeline.greedy import Drawer, apply, greedy
from megatron_ultraep.pipeline.problem import PipelineModel, Problem
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.pipeline.solve import solve
from megatron_ultraep.pipeline.tables import Tables
from tests.megatron_ultraep.pipeline.cases import random_problem
from tests.megatron_ultraep.pipeline.test_bound import two

MEDIUM = two(4, (4, 4, 5), (2, 2, 4))


@pytest.mark.parametrize("seed", range(10))
def test_tables_and_schedules_are_inverses(seed):
    problem = random_problem(seed)
    tables = Tables.of(problem)
    schedule = random_schedule(problem, seed)
    sequence = tables.sequence(schedule)
    assert sorted(sequence.tolist()) == list(range(len(tables.node)))
    assert tables.schedule(sequence) == schedule


@pytest.mark.parametrize("seed", range(20))
def test_compiled_times_are_those_of_the_simulator(seed):
    """The compiled simulation through annealing of no steps: energy is the makespan, in its units, and the excess."""
    problem = random_problem(seed)
    tables = Tables.of(problem)
    schedule = random_schedule(problem, seed)
    sequence = tables.sequence(schedule)
    state, best = np.ones(1, dtype=np.uint64), np.zeros_like(sequence)
    for cap, weight in ((1e300, 1.0), (1.5, 0.25)):
        energy = search.anneal(
            tables.arrays(), np.full(problem.nodes, cap), 0.0, (1.0, weight), (1.0, 1.0), 0, state, sequence, best
        )
        timeline = simulate(schedule)
        excess = sum(float(np.maximum(0, memory - cap).sum()) for memory in timeline.memory)
        assert energy == pytest.approx(timeline.makespan + weight * excess)
        np.testing.assert_array_equal(best, sequence)


@pytest.mark.parametrize("seed", range(10))
def test_rules_make_valid_schedules_within_their_caps(seed):
    problem = random_problem(seed)
    tables, rng, state = Tables.of(problem), np.random.default_rng(seed), np.ones(1, dtype=np.uint64)
    drawer = Drawer(tables)
    made = 0
    for _ in range(10):
        makespan, sequence = apply(tables, drawer.draw(rng, 4.0), state)
        if makespan >= 0:
            timeline = simulate(tables.schedule(sequence))
            assert timeline.makespan <= makespan + 1e-9, "releases only delay"
            assert max(timeline.peak_memory) <= 4.0
            made += 1
    assert made


def test_greedy_is_the_published_start():
    makespans = [
        simulate(greedy(two(nodes, large, small))).makespan
        for nodes, large, small in (
            (8, (8, 32, 5), (4, 16, 4)),
            (8, (8, 8, 5), (4, 4, 4)),
            (8, (8, 8, 5), (8, 8, 2)),
            (16, (16, 32, 2), (8, 16, 2)),
            (16, (16, 64, 2), (16, 64, 1)),
            (16, (16, 16, 2), (16, 16, 1)),
        )
    ]
    assert makespans == [741, 239, 225, 366, 651, 219]


@pytest.mark.parametrize("seed", range(25))
def test_small_problems_are_solved_to_the_optimum(seed):
    problem = random_problem(seed)
    found = solve(problem, rounds=2, memory_rounds=1)
    assert found.makespan >= found.bound
    assert found.peak_memory >= found.memory_bound - 1e-9
    try:
        best = optimal_makespan(problem, found.makespan + 1e-6, most=20_000)
    except TimeoutError:
        pytest.skip("too large for brute force")
    assert found.makespan <= best + 1e-6


def test_fusing_hides_the_small_model_and_costs_no_memory():
    found = solve(MEDIUM, seconds=60, memory_rounds=30, memory_seconds=60)
    assert found.makespan == found.bound < serial_makespan(MEDIUM)
    assert found.makespan < simulate(concatenated(MEDIUM)).makespan
    assert found.peak_memory <= serial_peak_memory(MEDIUM)
    assert simulate(found.schedule).makespan == found.makespan


def test_the_same_seed_and_rounds_give_the_same_schedule():
    digests = [
        solve(random_problem(9), seed, rounds=1, memory_rounds=1, seconds=600, memory_seconds=600).schedule.digest()
        for seed in (0, 0, 0)
    ]
    assert len(set(digests)) == 1


def test_caps_of_the_problem_are_kept():
    """The tightest caps that are possible at all: one micro-batch of one model at a time."""
    problem = random_problem(8)
    largest = max(max(model.activation) for model in problem.models)
    free = solve(problem, rounds=1, memory_rounds=0)
    capped = solve(replace(problem, memory_cap=(float(largest),) * problem.nodes), rounds=1, memory_rounds=0)
    assert max(capped.timeline.peak_memory) <= largest
    assert capped.makespan >= free.makespan


def test_a_forward_only_partner_fills_bubbles():
    large = PipelineModel.uniform("actor", stages=4, microbatches=4, forward=1, backward=2, activation=1)
    reference = PipelineModel.uniform(
        "reference",
        stages=4,
        microbatches=4,
        forward=1,
        backward=0,
        activation=1,
        reversed=True,
        forward_only=True,
    )
    problem = Problem(4, (large, reference))
    found = solve(problem, rounds=2, memory_rounds=0)
    assert found.makespan < serial_makespan(problem)


def test_stopping_gives_the_best_so_far():
    calls = itertools.count()
    stopped = solve(two(8, (8, 16, 5), (4, 8, 4)), stop=lambda: next(calls) > 3)
    assert stopped.interrupted
    assert simulate(stopped.schedule).makespan == stopped.makespan
    none = solve(MEDIUM, seconds=0.0, memory_seconds=0.0)
    assert none.makespan <= simulate(greedy(MEDIUM)).makespan, "rules without a round"


def test_ctrl_c_gives_the_best_so_far(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "anneal", interrupted)
    found = solve(random_problem(9), seconds=600, memory_seconds=600)
    assert found.interrupted
    simulate(found.schedule)


def test_what_cannot_be_measured_does_not_divide_by_zero():
    model = PipelineModel.uniform("a", stages=2, microbatches=2, forward=0, backward=0, activation=0)
    found = solve(Problem(2, (model,)), rounds=1, memory_rounds=1)
    assert found.makespan == 0
    assert json.loads(found.schedule.to_json())["orders"]
