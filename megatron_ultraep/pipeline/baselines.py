"""Schedules without a search: one model's 1F1B, models one after the other, and random valid ones."""

from __future__ import annotations

import random
from dataclasses import replace

from megatron_ultraep.pipeline.problem import InvalidSchedule, PipelineModel, Problem, Schedule, Task
from megatron_ultraep.pipeline.simulate import Timeline, simulate


def one_f_one_b(problem: Problem, model: int) -> Schedule:
    """Plain 1F1B of one model alone, as Megatron runs it: stage s of S starts with S-1-s forwards, then takes a
    forward and a backward in turn. A model that only runs forward just runs its forwards.

    Returns:
        a schedule of a problem of this model only (its tasks have model 0) on the same nodes.
    """
    alone = problem.models[model]
    single = Problem(problem.nodes, (alone,), problem.memory_cap)
    return Schedule(single, tuple(_order_1f1b(alone, 0, n) for n in range(problem.nodes)))


def _order_1f1b(model: PipelineModel, index: int, node: int) -> tuple[Task, ...]:
    place = model.place(node)
    if place is None:
        return ()
    forward, backward = Task(index, False), Task(index, True)
    if model.forward_only:
        return (forward,) * model.microbatches
    warmup = min(model.stages - 1 - place[1], model.microbatches)
    steady = model.microbatches - warmup
    return (forward,) * warmup + (forward, backward) * steady + (backward,) * warmup


def concatenated(problem: Problem) -> Schedule:
    """Every model's 1F1B, one after the other on every node without a barrier: a node goes on with the next model
    while others still drain. Models come in their order in the problem."""
    return Schedule(
        problem,
        tuple(
            tuple(task for m, model in enumerate(problem.models) for task in _order_1f1b(model, m, n))
            for n in range(problem.nodes)
        ),
    )


def one_at_a_time(problem: Problem) -> Schedule:
    """One micro-batch of one model in flight at a time, in every replica: no schedule holds less."""
    orders = []
    for n in range(problem.nodes):
        order: list[Task] = []
        for m, model in enumerate(problem.models):
            if model.place(n) is not None:
                order += [Task(m, backward) for backward in model.directions] * model.microbatches
        orders.append(tuple(order))
    return Schedule(problem, tuple(orders))


def serial_timelines(problem: Problem) -> tuple[Timeline, ...]:
    """Every model's 1F1B alone, whether it fits the memory caps or not."""
    uncapped = replace(problem, memory_cap=None)
    return tuple(simulate(one_f_one_b(uncapped, m)) for m in range(len(problem.models)))


def serial_makespan(problem: Problem) -> float:
    """Time of the models' 1F1B one after the other with a barrier between them, which is what two trainings take."""
    return sum(timeline.makespan for timeline in serial_timelines(problem))


def serial_peak_memory(problem: Problem) -> float:
    """Peak memory of the models' 1F1B one after the other, on the fullest node.

    For the large model that is its activation times its stages, on the first one, which RLHFuse calls the lower
    bound of memory. It bounds nothing in general: where the makespan leaves slack, fewer micro-batches in flight do.
    """
    return max(max(timeline.peak_memory) for timeline in serial_timelines(problem))


def random_schedule(problem: Problem, seed: int, attempts: int = 100) -> Schedule:
    """A valid schedule: at every turn a random node runs a random task that can run.

    Raises:
        InvalidSchedule: under the memory cap every attempt got stuck.
    """
    for attempt in range(attempts):
        orders = _random_orders(problem, random.Random(f"{seed}/{attempt}"))
        if orders is not None:
            return Schedule(problem, orders)
    raise InvalidSchedule(f"{attempts} random schedules got stuck under the memory caps {problem.memory_cap}")


def _random_orders(problem: Problem, rng: random.Random) -> tuple[tuple[Task, ...], ...] | None:
    orders: list[list[Task]] = [[] for _ in range(problem.nodes)]
    done: dict[tuple[int, Task], int] = {(n, task): 0 for n in range(problem.nodes) for task in problem.count(n)}
    held = [0.0] * problem.nodes
    left = {key: problem.models[key[1].model].microbatches for key in done}
    while any(left.values()):
        ready = [(n, task) for (n, task), count in left.items() if count and _can_run(problem, done, held, n, task)]
        if not ready:
            return None
        n, task = rng.choice(ready)
        model = problem.models[task.model]
        place = model.place(n)
        assert place is not None
        orders[n].append(task)
        done[n, task] += 1
        left[n, task] -= 1
        if not model.forward_only:
            held[n] += -model.activation[place[1]] if task.backward else model.activation[place[1]]
    return tuple(map(tuple, orders))


def _can_run(problem: Problem, done: dict[tuple[int, Task], int], held: list[float], node: int, task: Task) -> bool:
    """Whether the next micro-batch of ``task`` has what it needs, and room."""
    model = problem.models[task.model]
    place = model.place(node)
    assert place is not None
    replica, stage = place
    if not task.backward:
        cap = problem.memory_cap
        if cap is not None and held[node] + model.activation[stage] > cap[node]:
            return False
        before = model.nodes[replica][stage - 1] if stage else None
        return before is None or done[before, task] > done[node, task]
    if stage == model.stages - 1:
        return done[node, Task(task.model, False)] > done[node, task]
    return done[model.nodes[replica][stage + 1], task] > done[node, task]
