import pytest

from megatron_ultraep.pipeline.baselines import concatenated, one_at_a_time, one_f_one_b, random_schedule
from megatron_ultraep.pipeline.bound import lower_bound, memory_bound
from megatron_ultraep.pipeline.exact import optimal_makespan
from megatron_ultraep.pipeline.problem import PipelineModel, Problem
from megatron_ultraep.pipeline.simulate import simulate
from tests.megatron_ultraep.pipeline.cases import random_problem


def two(nodes, large, small):
    """Models given as (stages, micro-batches, forward); backward takes twice as long, the small one is reversed."""
    made = []
    for name, (stages, microbatches, forward) in (("large", large), ("small", small)):
        made.append(
            PipelineModel.uniform(
                name,
                stages=stages,
                microbatches=microbatches,
                forward=forward,
                backward=2 * forward,
                activation=1,
                replicas=nodes // stages,
                reversed=name == "small",
            )
        )
    return Problem(nodes, tuple(made))


def published_formula(nodes, large, small):
    """RLHFuse's bound of two uniform models, the small one reversed on consecutive segments."""
    (p0, m0, f0), (p1, m1, f1) = large, small
    work = 3 * (m0 * f0 + m1 * f1)
    ways = []
    for n in range(nodes):
        d = p1 - 1 - n % p1
        ways.append(min(n * f0, d * f1) + work + min(2 * n * f0, 2 * d * f1))
    return max(3 * f0 * (m0 + p0 - 1), work, *ways)


@pytest.mark.parametrize(
    ("nodes", "large", "small", "bound"),
    [
        (8, (8, 32, 5), (4, 16, 4), 708),
        (8, (8, 8, 5), (4, 4, 4), 225),
        (8, (8, 8, 5), (8, 8, 2), 225),
        (16, (16, 32, 2), (8, 16, 2), 330),
        (16, (16, 64, 2), (16, 64, 1), 606),
        (16, (16, 16, 2), (16, 16, 1), 186),
    ],
)
def test_published_bounds(nodes, large, small, bound):
    assert published_formula(nodes, large, small) == bound
    assert lower_bound(two(nodes, large, small)) == bound


@pytest.mark.parametrize("seed", range(60))
def test_never_above_the_optimum(seed):
    problem = random_problem(seed)
    upper = simulate(concatenated(problem)).makespan
    try:
        best = optimal_makespan(problem, upper + 1e-6, most=20_000)
    except TimeoutError:
        pytest.skip("too large for brute force")
    best = min(best, upper)
    assert lower_bound(problem) <= best + 1e-9
    for schedule in (concatenated(problem), one_at_a_time(problem), *(random_schedule(problem, s) for s in range(3))):
        timeline = simulate(schedule)
        assert timeline.makespan >= best - 1e-9
        assert max(timeline.peak_memory) >= memory_bound(problem, timeline.makespan) - 1e-9


def test_is_reached_by_1f1b_alone():
    model = PipelineModel.uniform("a", stages=4, microbatches=6, forward=1, backward=2, activation=1, delay=0.0)
    problem = Problem(4, (model,))
    assert lower_bound(problem) == simulate(one_f_one_b(problem, 0)).makespan == optimal_makespan(problem)
