"""Lower bounds: no valid schedule is shorter, or holds less.

Alone on its nodes, a model still has to fill and drain its pipeline, so each of its operations has a *head* (time
before it can start) and a *tail* (time that must follow its end). A node then is one machine with heads and tails, and
its preemptive schedule by longest tail (Jackson) is the shortest one; the longest of all nodes bounds the makespan. It
covers RLHFuse's bound: work of a node, plus the shorter of the two models' ways to it, and each model's own 1F1B.
"""

from __future__ import annotations

import heapq

from megatron_ultraep.pipeline.problem import PipelineModel, Problem


def lower_bound(problem: Problem) -> float:
    """A time that no valid schedule is below, in the problem's unit; memory caps are not looked at."""
    return max(_preemptive_makespan(_jobs(problem, node)) for node in range(problem.nodes))


def memory_bound(problem: Problem, makespan: float) -> float:
    """A peak (of the fullest node) that no valid schedule of this makespan is below.

    A micro-batch's activations on a node stay at least for its way to the last stage and back; what all of them hold
    over time, spread evenly over the makespan, is the bound of that node. One micro-batch alone is another.
    """
    least = 0.0
    for node in range(problem.nodes):
        area = 0.0
        for model in problem.models:
            place = model.place(node)
            if place is None:
                continue
            stage = place[1]
            least = max(least, model.activation[stage])
            stay = model.forward[stage]
            if not model.forward_only:
                hops = 2 * (model.stages - 1 - stage)
                stay = sum(model.forward[stage:]) + sum(model.backward[stage:]) + hops * model.delay
            area += model.microbatches * model.activation[stage] * stay
        if makespan > 0:
            least = max(least, area / makespan)
    return least


def _jobs(problem: Problem, node: int) -> list[tuple[float, float, float]]:
    """(head, duration, tail) of every operation on a node."""
    jobs = []
    for model in problem.models:
        place = model.place(node)
        if place is not None:
            jobs += [
                (head, duration, tail)
                for backward in model.directions
                for head, duration, tail in _of_direction(model, place[1], backward)
            ]
    return jobs


def _of_direction(model: PipelineModel, stage: int, backward: bool) -> list[tuple[float, float, float]]:
    """(head, duration, tail) by micro-batch of a model alone, forwards and backwards each in a line of their own.

    The i-th operation in a line of stages, one after the other, cannot start before the first has come through and the
    slowest stage on the way has run i times; the same backwards from the end.
    """
    line = list(model.forward)
    position = stage
    if not model.forward_only:
        line += reversed(model.backward)
        position = 2 * model.stages - 1 - stage if backward else stage
    hop = [0.0 if s == model.stages - 1 else model.delay for s in range(len(line) - 1)]  # after each place of the line
    before = sum(line[:position]) + sum(hop[:position])
    after = sum(line[position + 1 :]) + sum(hop[position:])
    # Alike micro-batches leave a line of stages at the rate of its slowest one.
    slowest_before, slowest_after = max(line[: position + 1]), max(line[position:])
    last = model.microbatches - 1
    return [(before + i * slowest_before, line[position], after + (last - i) * slowest_after) for i in range(last + 1)]


def _preemptive_makespan(jobs: list[tuple[float, float, float]]) -> float:
    """Of one machine, of all jobs that are there the one of the longest tail first, preemptively (Jackson)."""
    jobs = sorted(jobs)
    ready: list[tuple[float, float]] = []  # (-tail, what is left)
    clock, longest, i = 0.0, 0.0, 0
    while ready or i < len(jobs):
        if not ready:
            clock = max(clock, jobs[i][0])
        while i < len(jobs) and jobs[i][0] <= clock:
            heapq.heappush(ready, (-jobs[i][2], jobs[i][1]))
            i += 1
        tail, left = heapq.heappop(ready)
        until = jobs[i][0] if i < len(jobs) else clock + left
        if clock + left > until:
            heapq.heappush(ready, (tail, left - (until - clock)))
            clock = until
        else:
            clock += left
            longest = max(longest, clock - tail)
    return longest
