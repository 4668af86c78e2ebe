"""When every operation of a schedule would run, and whether the schedule can run at all.

A node executes its order strictly. An operation starts when its node is free and what it needs is there:

1. a forward of stage s: the forward of stage s-1, ``delay`` after its end;
2. a backward of stage s: the backward of stage s+1, ``delay`` after its end; of the last stage, its own forward;
3. so a backward never runs before its own forward.

A schedule is invalid when a node's order has too few or too many of a task, a backward comes before its forward, a
node's memory exceeds its cap, or at some point no node's next operation can start (deadlock).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_ultraep.pipeline.problem import InvalidSchedule, Operation, Problem, Schedule

ROUNDING = 1e-9  # relative; sums of activations in another order must not exceed a cap


@dataclass(frozen=True)
class Timeline:
    """A schedule with times.

    Attributes:
        operations: ``[node]``, in order of execution.
        start, end: ``[node]``, float64 ``[operations of the node]``, from 0, in the problem's unit.
        memory: ``[node]``, float64 ``[operations of the node]``: activations held while the operation runs.
    """

    problem: Problem
    operations: tuple[tuple[Operation, ...], ...]
    start: tuple[np.ndarray, ...]
    end: tuple[np.ndarray, ...]
    memory: tuple[np.ndarray, ...]

    @property
    def makespan(self) -> float:
        return max((float(end[-1]) for end in self.end if len(end)), default=0.0)

    @property
    def peak_memory(self) -> tuple[float, ...]:
        """Most activations held at once, by node."""
        return tuple(float(held.max()) if len(held) else 0.0 for held in self.memory)

    @property
    def idle(self) -> tuple[float, ...]:
        """Time within the makespan in which a node computes nothing, by node."""
        return tuple(self.makespan - float((e - s).sum()) for s, e in zip(self.start, self.end, strict=True))

    @property
    def bubble(self) -> float:
        """Share of all nodes' time that is idle."""
        total = self.makespan * self.problem.nodes
        return sum(self.idle) / total if total else 0.0

    def times(self) -> dict[tuple[int, Operation], tuple[float, float]]:
        """(start, end) by (node, operation)."""
        return {
            (n, operation): (float(s), float(e))
            for n, operations in enumerate(self.operations)
            for operation, s, e in zip(operations, self.start[n], self.end[n], strict=True)
        }


def simulate(schedule: Schedule) -> Timeline:
    """Run a schedule with the durations of its problem.

    Raises:
        InvalidSchedule: it cannot run; the message names node, task and micro-batch.
    """
    problem = schedule.problem
    operations = tuple(tuple(schedule.operations(n)) for n in range(problem.nodes))
    _check_counts(schedule)
    _check_own_forward(problem, operations)
    memory = tuple(held_memory(problem, n, operations[n]) for n in range(problem.nodes))
    _check_memory(problem, operations, memory)
    starts, ends = _run(problem, operations)
    return Timeline(problem, operations, tuple(map(np.array, starts)), tuple(map(np.array, ends)), memory)


def needs(problem: Problem, operation: Operation) -> Operation | None:
    """The operation whose end lets this one start; None for a forward of the first stage."""
    last = problem.models[operation.model].stages - 1
    m, r, s, i, backward = (
        operation.model,
        operation.replica,
        operation.stage,
        operation.microbatch,
        operation.backward,
    )
    if not backward:
        return Operation(m, r, s - 1, i, False) if s else None
    return Operation(m, r, s + 1, i, True) if s < last else Operation(m, r, s, i, False)


def held_memory(problem: Problem, node: int, operations: tuple[Operation, ...]) -> np.ndarray:
    """float64 ``[operations]``: activations that ``node`` holds while each of its operations runs."""
    count: Counter[float] = Counter()  # by activation: products do not gather rounding as sums do
    memory = []
    for operation in operations:
        model = problem.models[operation.model]
        activation = model.activation[operation.stage]
        if not operation.backward:
            count[activation] += 1
        memory.append(sum(size * number for size, number in count.items()))
        if operation.backward or model.forward_only:
            count[activation] -= 1
    return np.array(memory)


def _check_counts(schedule: Schedule) -> None:
    for n, order in enumerate(schedule.orders):
        expected, got = schedule.problem.count(n), Counter(order)
        for task in sorted(expected.keys() | got.keys()):
            if expected[task] != got[task]:
                name = schedule.problem.models[task.model].name
                which = f"micro-batch {expected[task]}" if got[task] > expected[task] else f"micro-batch {got[task]}"
                raise InvalidSchedule(
                    f"node {n}: expected {expected[task]} times task {task} ({name!r}), got {got[task]}: {which} is "
                    f"{'one too many' if got[task] > expected[task] else 'missing'}"
                )


def _check_own_forward(problem: Problem, operations: tuple[tuple[Operation, ...], ...]) -> None:
    for n, order in enumerate(operations):
        forwards: Counter[int] = Counter()
        for position, operation in enumerate(order):
            if not operation.backward:
                forwards[operation.model] += 1
            elif operation.microbatch >= forwards[operation.model]:
                raise InvalidSchedule(
                    f"node {n}, position {position}: {operation.describe(problem)} comes before its forward"
                )


def _check_memory(
    problem: Problem, operations: tuple[tuple[Operation, ...], ...], memory: tuple[np.ndarray, ...]
) -> None:
    for n, cap in enumerate(problem.memory_cap or ()):
        over = np.flatnonzero(memory[n] > cap * (1 + ROUNDING))
        if len(over):
            raise InvalidSchedule(
                f"node {n}, position {over[0]}: {operations[n][over[0]].describe(problem)} makes it hold "
                f"{memory[n][over[0]]:g}, more than its cap of {cap:g}"
            )


def _run(
    problem: Problem, operations: tuple[tuple[Operation, ...], ...]
) -> tuple[list[list[float]], list[list[float]]]:
    """Starts and ends, ``[node][operation]``. A node runs until its head must wait; what it waits for wakes it."""
    starts: list[list[float]] = [[] for _ in operations]
    ends: list[list[float]] = [[] for _ in operations]
    done: dict[Operation, float] = {}
    waiting: dict[Operation, int] = {}  # operation -> node whose head needs it
    runnable = list(range(len(operations)))
    while runnable:
        n = runnable.pop()
        while len(starts[n]) < len(operations[n]):
            operation = operations[n][len(starts[n])]
            model = problem.models[operation.model]
            ready = ends[n][-1] if ends[n] else 0.0
            needed = needs(problem, operation)
            if needed is not None:
                if needed not in done:
                    waiting[needed] = n
                    break
                ready = max(ready, done[needed] + (model.delay if needed.stage != operation.stage else 0.0))
            starts[n].append(ready)
            ends[n].append(ready + (model.backward if operation.backward else model.forward)[operation.stage])
            done[operation] = ends[n][-1]
            woken = waiting.pop(operation, None)
            if woken is not None and woken != n:
                runnable.append(woken)
    blocked = {n: operations[n][len(s)] for n, s in enumerate(starts) if len(s) < len(operations[n])}
    if blocked:
        raise InvalidSchedule("deadlock: " + _describe_blocked(problem, blocked))
    return starts, ends


def _describe_blocked(problem: Problem, blocked: dict[int, Operation]) -> str:
    """The head of every node that waits, and on which node what it waits for is."""
    told = []
    for n, operation in blocked.items():
        needed = needs(problem, operation)
        assert needed is not None  # a forward of the first stage waits for nothing
        at = problem.models[needed.model].nodes[needed.replica][needed.stage]
        told.append(f"node {n}'s {operation.describe(problem)} waits for {needed.describe(problem)} on node {at}")
    return "; ".join(told)
