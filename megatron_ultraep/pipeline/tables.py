"""A problem as arrays, for the compiled search.

Operations have ids: those of one node and task are consecutive, micro-batch 0 first. An order of all nodes is one
array: the ids of node 0 in order of execution, then those of node 1, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ultraep.pipeline.problem import Operation, Problem, Schedule, Task
from megatron_ultraep.pipeline.simulate import needs


@dataclass(frozen=True)
class Tables:
    """Arrays by operation id unless said otherwise.

    Attributes:
        first: int64 ``[nodes + 1]``, first id of a node.
        node, kind: int64; kind is ``2 * model + backward``.
        before, after: int64, the operation it needs, the one that needs it; -1 for none.
        lag: float64, time from the end of ``before`` to its start at least.
        duration: float64.
        room: float64, activations it needs besides those held; 0 of a backward.
        change: float64, activations held more after it.
        tail: float64, what remains of the micro-batch's way after it.
    """

    problem: Problem
    first: np.ndarray
    node: np.ndarray
    kind: np.ndarray
    before: np.ndarray
    after: np.ndarray
    lag: np.ndarray
    duration: np.ndarray
    room: np.ndarray
    change: np.ndarray
    tail: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> Tables:
        operations: list[tuple[int, Operation]] = []
        first = [0]
        for n in range(problem.nodes):
            for task in sorted(problem.count(n)):
                model = problem.models[task.model]
                place = model.place(n)
                assert place is not None
                operations += [(n, Operation(task.model, *place, i, task.backward)) for i in range(model.microbatches)]
            first.append(len(operations))
        ids = {operation: i for i, (_, operation) in enumerate(operations)}
        count = len(operations)
        before, after = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
        lag, duration, room, change = (np.zeros(count) for _ in range(4))
        for i, (_, operation) in enumerate(operations):
            model = problem.models[operation.model]
            needed = needs(problem, operation)
            if needed is not None:
                before[i] = ids[needed]
                after[ids[needed]] = i
                lag[i] = model.delay if needed.stage != operation.stage else 0.0
            activation = model.activation[operation.stage]
            duration[i] = (model.backward if operation.backward else model.forward)[operation.stage]
            room[i] = 0.0 if operation.backward else activation
            change[i] = -activation if operation.backward else 0.0 if model.forward_only else activation
        return cls(
            problem,
            np.array(first, dtype=np.int64),
            np.array([n for n, _ in operations], dtype=np.int64),
            np.array([2 * o.model + o.backward for _, o in operations], dtype=np.int64),
            before,
            after,
            lag,
            duration,
            room,
            change,
            _tails(after, lag, duration),
        )

    def arrays(self) -> tuple[np.ndarray, ...]:
        """As the compiled functions take them."""
        return (
            self.first,
            self.node,
            self.kind,
            self.before,
            self.after,
            self.lag,
            self.duration,
            self.room,
            self.change,
            self.tail,
        )

    def schedule(self, sequence: np.ndarray) -> Schedule:
        """The schedule of an array of ids in order."""
        tasks = [Task(int(kind) // 2, bool(kind % 2)) for kind in self.kind[sequence]]
        spans = zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True)
        return Schedule(self.problem, tuple(tuple(tasks[a:b]) for a, b in spans))

    def sequence(self, schedule: Schedule) -> np.ndarray:
        """int64: the ids of a schedule's operations in order, the inverse of :meth:`schedule`."""
        found = []
        for n, order in enumerate(schedule.orders):
            kinds = self.kind[self.first[n] : self.first[n + 1]]
            following = {int(k): int(self.first[n]) + int(np.argmax(kinds == k)) for k in set(kinds.tolist())}
            for task in order:
                key = 2 * task.model + task.backward
                found.append(following[key])
                following[key] += 1
        return np.array(found, dtype=np.int64)


def _tails(after: np.ndarray, lag: np.ndarray, duration: np.ndarray) -> np.ndarray:
    """float64 ``[operations]``: lags and durations of all that follow on a micro-batch's way."""
    tail = np.zeros(len(after))
    following = after.copy()
    while (some := following >= 0).any():  # one step of all ways at a time
        tail[some] += lag[following[some]] + duration[following[some]]
        following[some] = after[following[some]]
    return tail
