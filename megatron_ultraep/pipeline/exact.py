"""The shortest makespan by exhausting all orders: for a few dozen operations, to judge the search by.

Branch and bound over active schedules (Giffler and Thompson): of all tasks that can run take the one that would end
first; on its node, branch over the tasks that could start before that end. Some active schedule is optimal. A partial
schedule is dropped when no completion can beat the best, or another one of the same operations is as early everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ultraep.pipeline.bound import lower_bound
from megatron_ultraep.pipeline.problem import Problem
from megatron_ultraep.pipeline.tables import Tables

_SLACK = 1e-9


def optimal_makespan(problem: Problem, upper: float = float("inf"), most: int = 200_000) -> float:
    """The shortest makespan of any valid schedule; memory caps are not looked at.

    Args:
        upper: makespan of a known schedule, which cuts the search short.
        most: partial schedules to look at.

    Raises:
        TimeoutError: there were more.
    """
    tables = Tables.of(problem)
    found = _Exact(tables, lower_bound(problem), upper, most)
    kinds = [
        [int(i) for i in range(a, b) if i == a or tables.kind[i] != tables.kind[i - 1]]
        for a, b in zip(tables.first[:-1].tolist(), tables.first[1:].tolist(), strict=True)
    ]
    found.branch({}, [0.0] * problem.nodes, kinds)
    return found.best


@dataclass
class _Exact:
    tables: Tables
    bound: float
    best: float
    most: int
    seen: dict[tuple[int, ...], list[tuple[float, ...]]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.before, self.lag = self.tables.before.tolist(), self.tables.lag.tolist()
        self.duration, self.tail = self.tables.duration.tolist(), self.tables.tail.tolist()
        self.kind, self.node = self.tables.kind.tolist(), self.tables.node.tolist()

    def branch(self, ends: dict[int, float], free: list[float], following: list[list[int]]) -> None:
        """
        Args:
            ends: of operations that run.
            free: ``[node]``, when it has run them.
            following: ``[node]``, next operation of each kind that is left.
        """
        self.count += 1
        if self.count > self.most:
            raise TimeoutError(f"expected at most {self.most} partial schedules, there are more: take fewer operations")
        starts: dict[int, float] = {}
        for n, operations in enumerate(following):
            for operation in operations:
                needed = self.before[operation]
                if needed < 0:
                    starts[operation] = free[n]
                elif needed in ends:
                    starts[operation] = max(free[n], ends[needed] + self.lag[operation])
        if not starts:
            self.best = min(self.best, max(free))
            return
        if self._hopeless(ends, free, following, starts):
            return
        soonest = min(starts, key=lambda i: (starts[i] + self.duration[i], i))
        limit, at = starts[soonest] + self.duration[soonest], self.node[soonest]
        choices = [i for i in starts if self.node[i] == at and (starts[i] < limit or i == soonest)]
        for operation in sorted(choices, key=lambda i: -self.tail[i]):
            if self.best <= self.bound * (1 + _SLACK):
                return
            end = starts[operation] + self.duration[operation]
            later = [list(operations) for operations in following]
            place = later[at].index(operation)
            successor = operation + 1
            if successor < len(self.kind) and (self.node[successor], self.kind[successor]) == (
                at,
                self.kind[operation],
            ):
                later[at][place] = successor
            else:
                del later[at][place]
            self.branch(ends | {operation: end}, [end if n == at else f for n, f in enumerate(free)], later)

    def _hopeless(
        self, ends: dict[int, float], free: list[float], following: list[list[int]], starts: dict[int, float]
    ) -> bool:
        """Whether what is left cannot end before the best, or has been looked at from an earlier state."""
        for n, operations in enumerate(following):
            left = [i for first in operations for i in self._line(first)]
            if left:
                earliest = min((starts[i] for i in operations if i in starts), default=free[n])
                total = sum(self.duration[i] for i in left)
                if earliest + total + min(self.tail[i] for i in left) >= self.best - _SLACK:
                    return True
        if any(begin + self.duration[i] + self.tail[i] >= self.best - _SLACK for i, begin in starts.items()):
            return True
        key = tuple(i for operations in following for i in operations)
        waited = [self.before[i] for operations in following for first in operations for i in self._line(first)]
        times = (*free, *(ends[i] for i in sorted(set(waited)) if i in ends))
        others = self.seen.setdefault(key, [])
        if any(all(a <= b for a, b in zip(other, times, strict=True)) for other in others):
            return True
        others.append(times)
        return False

    def _line(self, first: int) -> range:
        """``first`` and what follows it of its node and kind."""
        stop = first
        while stop < len(self.kind) and (self.node[stop], self.kind[stop]) == (self.node[first], self.kind[first]):
            stop += 1
        return range(first, stop)
