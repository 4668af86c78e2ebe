"""Schedules run on four ranks: every message arrives where it should, and what cannot run is refused or ends."""

import dataclasses
import os
import random
import re
import time

import pytest
import torch

from megatron_ultraep.pipeline.agreement import ScheduleMismatch, share_schedule
from megatron_ultraep.pipeline.baselines import concatenated, one_f_one_b, random_schedule
from megatron_ultraep.pipeline.communication import Links
from megatron_ultraep.pipeline.executor import FusedExecutor
from megatron_ultraep.pipeline.problem import InvalidSchedule, PipelineModel, Problem, Schedule
from megatron_ultraep.pipeline.watchdog import ExecutionError
from tests.megatron_ultraep.pipeline.test_memory import Device
from tests.megatron_ultraep.pipeline.trivial import SIZE, Counting
from tests.ranks import RankError

NODES = 4
CPU = torch.device("cpu")  # where Counting works
# What the small model may look like on four nodes: (stages, replicas, reversed).
SHAPES = ((4, 1, True), (4, 1, False), (2, 2, True), (2, 2, False), (1, 4, False), (2, 1, True))


def random_problem(seed, small=None):
    """A large model over all nodes and a small one of some shape, of random durations."""
    rng = random.Random(seed)
    stages, replicas, backwards = small or rng.choice(SHAPES)

    def model(name, stages, replicas, backwards, forward_only):
        return PipelineModel.uniform(
            name, stages=stages, replicas=replicas, reversed=backwards, microbatches=rng.randint(1, 6),
            forward=rng.uniform(0.5, 2), backward=0.0 if forward_only else rng.uniform(0.5, 3), activation=1.0,
            delay=rng.choice([0.0, 0.3]), forward_only=forward_only,
        )  # fmt: skip

    return Problem(
        NODES,
        (model("actor", NODES, 1, False, False), model("critic", stages, replicas, backwards, rng.random() < 0.2)),
    )


def run_random(seeds, small):
    """Run one random schedule per seed on one set of links; how many operations this rank ran."""
    links = Links.of_models(random_problem(0, small).models, NODES, timeout_s=20, device=CPU)
    ran = 0
    for seed in seeds:
        schedule = random_schedule(random_problem(seed, small), seed)
        works = Counting.of(schedule, links.node)
        report = FusedExecutor(schedule, links).run(works)
        assert [m.operation for m in report.measured] == schedule.operations(links.node)
        for work, kept in zip(works, report.kept, strict=True):
            assert len(kept) == (0 if work is None else work.model.microbatches * len(work.model.directions))
        ran += len(report.measured)
    return ran


def check_random(ranks, seeds):
    """Every schedule, those of one shape together because links are made for a shape."""
    by_shape = [list(seeds)[i :: len(SHAPES)] for i in range(len(SHAPES))]
    for shape, some in zip(SHAPES, by_shape, strict=True):
        expected = [
            sum(sum(random_problem(seed, shape).count(node).values()) for seed in some) for node in range(NODES)
        ]
        assert ranks(NODES).run(run_random, some, shape) == expected


def test_random_schedules_run_to_their_ends(ranks):
    check_random(ranks, range(100))


@pytest.mark.slow
def test_a_thousand_random_schedules_run_to_their_ends(ranks):
    check_random(ranks, range(1000, 2000))


def broken_schedules(seed):
    """A valid schedule and what random damage makes of it, where that is another one."""
    rng = random.Random(seed)
    schedule = random_schedule(random_problem(seed), seed)

    def damaged(change):
        orders = [list(order) for order in schedule.orders]
        change(orders[rng.randrange(NODES)])
        return Schedule(schedule.problem, tuple(map(tuple, orders)))

    def swap(order):
        i, j = rng.randrange(len(order)), rng.randrange(len(order))
        order[i], order[j] = order[j], order[i]

    yield "dropped", damaged(lambda order: order.pop(rng.randrange(len(order))))
    yield "doubled", damaged(lambda order: order.insert(rng.randrange(len(order)), rng.choice(order)))
    yield "swapped", damaged(swap)
    yield "reversed", damaged(lambda order: order.reverse())


def try_broken(seeds):
    """What became of each broken schedule on this rank: the error's type, or "ran"."""
    links = {}
    found = []
    for seed in seeds:
        for kind, schedule in broken_schedules(seed):
            placements = tuple(m.nodes for m in schedule.problem.models)
            if placements not in links:
                links[placements] = Links(placements, NODES, timeout_s=20, device=CPU)
            try:
                FusedExecutor(schedule, links[placements]).run(Counting.of(schedule, links[placements].node))
                found.append((kind, "ran"))
            except InvalidSchedule:
                found.append((kind, "InvalidSchedule"))
    return found


def check_broken(ranks, seeds):
    answers = ranks(NODES).run(try_broken, seeds)
    assert all(answer == answers[0] for answer in answers)
    outcomes = set(answers[0])
    # A dropped or doubled task is always wrong. A swap may be harmless: then it runs, which is as good a proof.
    assert {o for o in outcomes if o[0] in ("dropped", "doubled")} == {
        ("dropped", "InvalidSchedule"),
        ("doubled", "InvalidSchedule"),
    }
    assert {("swapped", "InvalidSchedule"), ("swapped", "ran"), ("reversed", "InvalidSchedule")} <= outcomes


def test_broken_schedules_are_refused_before_anything_is_sent(ranks):
    check_broken(ranks, range(25))


@pytest.mark.slow
def test_a_thousand_broken_schedules_are_refused(ranks):
    check_broken(ranks, range(1000, 1250))


def problem_of(**critic):
    settings = {"stages": 2, "replicas": 2, "reversed": True, "microbatches": 3, "forward": 0.5, "backward": 1.0}
    return Problem(
        NODES,
        (
            PipelineModel.uniform("actor", stages=4, microbatches=4, forward=1, backward=2, activation=1),
            PipelineModel.uniform("critic", activation=1, **(settings | critic)),
        ),
    )


def run_many(schedules):
    """Several schedules on links that serve them all."""
    links = Links.of_models(schedules[0].problem.models, NODES, timeout_s=20, device=CPU)
    reports = [FusedExecutor(schedule, links).run(Counting.of(schedule, links.node)) for schedule in schedules]
    return [[(m.operation, m.start, m.end) for m in report.measured] for report in reports]


def test_links_serve_schedules_of_different_counts_and_orders(ranks):
    problems = [problem_of(), problem_of(microbatches=6), problem_of(forward_only=True, backward=0.0)]
    schedules = [concatenated(problems[0]), random_schedule(problems[1], 3), concatenated(problems[2])]
    for node, answer in enumerate(ranks(NODES).run(run_many, schedules)):
        for schedule, measured in zip(schedules, answer, strict=True):
            assert [operation for operation, _, _ in measured] == schedule.operations(node)
            times = [t for _, start, end in measured for t in (start, end)]
            assert times == sorted(times)
            assert times[0] >= 0


def run_alone():
    schedule = one_f_one_b(problem_of(), 0)
    links = Links.of_models(schedule.problem.models, NODES, timeout_s=20, device=CPU)
    return FusedExecutor(schedule, links).run(Counting.of(schedule, links.node)).kept


def test_one_model_alone_is_plain_1f1b(ranks):
    answers = ranks(NODES).run(run_alone)
    assert answers[3] == ([(0, False), (0, True), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)],)
    assert answers[0][0][:5] == [(0, False), (1, False), (2, False), (3, False), (0, True)]


@dataclasses.dataclass
class Holding(Counting):
    """Takes made-up memory: a forward of micro-batch i holds 100,000 + i bytes until its backward; some pass."""

    device: Device | None = None

    def forward(self, microbatch, received):
        self.device.take(100_000 + microbatch)
        self.device.spike(40_000)
        return super().forward(microbatch, received)

    def backward(self, microbatch, received):
        self.device.spike(70_000)
        self.device.take(-100_000 - microbatch)
        return super().backward(microbatch, received)


def run_counted(schedule):
    """What this rank's operations took, and the most at once; from the run's start, and from 1,000 bytes before."""
    device = Device(5000)
    links = Links.of_models(schedule.problem.models, 2, timeout_s=20, device=CPU)
    works = Holding.of(schedule, links.node, device=device)
    executor = FusedExecutor(schedule, links, memory=device.read)
    reports = [executor.run(works, allocated=allocated) for allocated in (None, 4000)]
    plain = FusedExecutor(schedule, links).run(works)
    assert (plain.memory, plain.peak) == (None, None)
    return [([m.operation for m in r.measured], r.memory, r.peak) for r in reports]


def test_operations_are_counted_where_memory_is_read(ranks):
    common = {"stages": 2, "microbatches": 3, "forward": 1, "backward": 2, "activation": 1}
    models = [PipelineModel.uniform(name, reversed=name == "critic", **common) for name in ("actor", "critic")]
    for reports in ranks(2).run(run_counted, concatenated(Problem(2, tuple(models)))):
        (operations, memory, peak), (_, above, higher) = reports
        for operation, counted in zip(operations, memory, strict=True):
            received = 4 * (SIZE + operation.microbatch) if operation.stage else 0
            assert counted.held == (0 if operation.backward else 100_000 + operation.microbatch + received)
            # Inputs come from outside the made-up memory: micro-batches in flight hold more than it knows of.
            assert counted.passing == pytest.approx(70_000 if operation.backward else 40_000, abs=100)
        assert peak == 100_001 + 100_002 + 70_000  # every node has the first stage of one model
        assert higher == peak + 1000
        assert [m.passing for m in above] == [m.passing + 1000 for m in memory]


def differing(how):
    """What a rank is told when ranks do not agree."""
    schedule = concatenated(problem_of())
    links = Links.of_models(schedule.problem.models, NODES, timeout_s=20, device=CPU)
    works = Counting.of(schedule, links.node)
    if how == "schedule" and links.rank == 2:
        schedule = random_schedule(problem_of(), 1)
    if how == "links":
        schedule = concatenated(problem_of(reversed=False))
    if how == "shared":
        schedule = share_schedule(schedule if links.rank == 1 else None, source=1)
    try:
        executor = FusedExecutor(schedule, links)
        if how == "work" and links.rank == 3:
            works[1] = None
        executor.run(works)
    except ScheduleMismatch as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("schedule", r"ranks hold different schedules \(ranks 0, 1, 3 \w{12}; rank 2 \w{12}\)"),
        ("links", r"ranks 0, 1, 2, 3: expected links for models on the nodes"),
        ("work", r"rank 3: model 'critic': expected work on node 3"),
        ("shared", "ran"),
    ],
)
def test_ranks_agree_before_anything_runs(ranks, how, message):
    answers = ranks(NODES).run(differing, how)
    assert len(set(answers)) == 1
    assert re.match(message, answers[0])


def stuck(how, timeout_s, who=2):
    """What each rank says, and after how long, when one of them does not go on."""
    schedule = concatenated(problem_of())
    links = Links.of_models(schedule.problem.models, NODES, timeout_s=20, device=CPU)
    works = Counting.of(schedule, links.node)
    if links.rank == who:
        if how == "sleeps":
            works[0] = dataclasses.replace(works[0], sleep_at=(1, True, 2.5 * timeout_s))
        if how == "fails":
            works[0] = dataclasses.replace(works[0], fail_at=(1, True))
        if how == "dies":
            works[0] = dataclasses.replace(works[0], fail_at=None)
            works[0].backward = lambda microbatch, received: os._exit(9)
    executor = FusedExecutor(schedule, links, timeout_s=timeout_s)
    started = time.monotonic()
    try:
        executor.run(works)
    except ExecutionError as error:
        seconds = time.monotonic() - started
        try:
            executor.run(works)
        except ExecutionError as again:
            return str(error), seconds, str(again)
    return None


def test_a_rank_that_sleeps_is_named_by_all_others(ranks):
    answers = ranks(NODES).run(stuck, "sleeps", 2.0)
    del answers[2]  # it found the others gone when it woke up, or had nothing more to do with them
    assert any("waiting for its input from rank 2" in said for said, _, _ in answers)
    for said, seconds, again in answers:
        assert said.startswith("rank ")
        assert "micro-batch" in said
        assert "waiting" in said
        assert seconds < 4.5
        assert "these links failed before" in again


def test_a_rank_that_fails_is_named_by_all_others(ranks):
    answers = ranks(NODES).run(stuck, "fails", 20)
    for said, seconds, _ in answers:
        assert "rank 2 (node 2), backward of 'actor', micro-batch 1, stage 2: computing: ValueError" in said
        assert "this stage was told to fail" in said
        assert seconds < 10


@pytest.mark.parametrize("who", [2, 0])  # rank 0 takes the store with it, in which ranks say why they failed
def test_a_rank_that_dies_ends_the_others(ranks, who):
    ranks(NODES).run(run_alone)  # the ranks are up
    started = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {who} of 4 failed|Rank {who} failed too") as caught:
        ranks(NODES).run(stuck, "dies", 20, who)
    assert "No answer" not in str(caught.value)  # the others ended by themselves
    assert time.monotonic() - started < 10
