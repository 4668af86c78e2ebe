"""Schedules by rule: of all tasks that can run, take the earliest to start, and so on.

:func:`greedy` is RLHFuse's start: ties go to backwards, and the large model is never held up by the small one.
:class:`Drawer` draws rules: which task wins a tie, how many micro-batches of a model may be in flight on a node, how
fast they are let in, under which memory cap. Limits in flight are what keeps memory low without a search; drawn and
tried by the hundred, rules alone come within a few percent of the lower bound, and are what annealing starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_ultraep.pipeline import search
from megatron_ultraep.pipeline.problem import Problem, Schedule
from megatron_ultraep.pipeline.tables import Tables

ANY = np.iinfo(np.int64).max
RULES = (0, search.LARGE_FIRST, search.LONGEST_TAIL_FIRST, search.LARGE_FIRST | search.LONGEST_TAIL_FIRST)


@dataclass(frozen=True)
class Rule:
    """Arguments of :func:`megatron_ultraep.pipeline.search.list_schedule`."""

    cap: np.ndarray
    quota: np.ndarray
    release: np.ndarray
    bias: np.ndarray
    rule: int
    noise: float = 0.0


def caps(problem: Problem, most: float = np.inf) -> np.ndarray:
    """float64 ``[nodes]``: the problem's caps, and ``most`` on every node; widened by what sums are rounded by."""
    given = np.full(problem.nodes, np.inf) if problem.memory_cap is None else np.array(problem.memory_cap, dtype=float)
    return np.asarray(np.minimum(given, most) * (1 + 1e-9))


def plain(tables: Tables, rule: int) -> Rule:
    """A rule without quotas, releases and noise, under the problem's caps."""
    problem = tables.problem
    models = len(problem.models)
    return Rule(
        caps(problem),
        np.full((problem.nodes, models), ANY),
        np.zeros(len(tables.node)),
        np.zeros(2 * models),
        rule,
    )


def apply(tables: Tables, rule: Rule, state: np.ndarray) -> tuple[float, np.ndarray]:
    """(makespan, sequence) of a rule; the makespan is negative where it gets stuck under caps and quotas."""
    sequence = np.zeros(len(tables.node), dtype=np.int64)
    makespan = search.list_schedule(
        tables.arrays(), rule.cap, rule.quota, rule.release, rule.bias, rule.rule, rule.noise, state, sequence
    )
    return makespan, sequence


def greedy(problem: Problem) -> Schedule:
    """RLHFuse's greedy start.

    Raises:
        ValueError: it gets stuck under the problem's memory caps.
    """
    tables = Tables.of(problem)
    makespan, sequence = apply(tables, plain(tables, search.LARGE_FIRST), np.ones(1, dtype=np.uint64))
    if makespan < 0:
        raise ValueError(f"the greedy rule gets stuck under memory caps {problem.memory_cap}: use solve()")
    return tables.schedule(sequence)


class Drawer:
    """Draws rules at random, the same for the same generator."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.problem = tables.problem
        self.work = sum(m.microbatches * (max(m.forward) + max(m.backward)) for m in self.problem.models)
        self.stages_left = np.ones((self.problem.nodes, len(self.problem.models)), dtype=np.int64)
        for m, model in enumerate(self.problem.models):
            for replica in model.nodes:
                self.stages_left[list(replica), m] = model.stages - np.arange(model.stages)

    def draw(self, rng: np.random.Generator, most: float) -> Rule:
        """A rule under caps of ``most`` activations."""
        tables, problem = self.tables, self.problem
        models = len(problem.models)
        quota = np.full((problem.nodes, models), ANY)
        release = np.zeros(len(tables.node))
        for m, model in enumerate(problem.models):
            if rng.random() > 0.2:
                quota[:, m] = np.maximum(1, self.stages_left[:, m] + rng.integers(-1, 5))
            if rng.random() < 0.7:
                pace = rng.random() * self.work / model.microbatches
                begin = 0.0 if rng.random() < 0.5 else rng.random() * 0.1 * self.work
                entering = np.flatnonzero((tables.kind == 2 * m) & (tables.before < 0))
                release[entering] = np.tile(begin + pace * np.arange(model.microbatches), model.replicas)
        wild = 3 * float(tables.duration.mean())
        bias = rng.normal(size=2 * models) * wild * (rng.random() < 0.5)
        noise = rng.random() * wild * (rng.random() < 0.5)
        return Rule(caps(problem, most), quota, release, bias, int(rng.choice(RULES)), float(noise))

    def vary(self, rule: Rule, rng: np.random.Generator) -> Rule:
        """A rule like another one: one or two of its limits and priorities changed, caps kept."""
        for _ in range(int(rng.integers(1, 3))):
            wild = 3 * float(self.tables.duration.mean())
            change = rng.integers(0, 5)
            if change == 0:  # one model's limit in flight, from some node on
                quota = rule.quota.copy()
                at = rng.integers(0, len(quota))
                some = slice(at, None) if rng.random() < 0.5 else slice(at, at + 1)
                m = rng.integers(0, quota.shape[1])
                known = np.minimum(quota[some, m], self.stages_left[some, m] + 4)
                quota[some, m] = np.maximum(1, known + rng.choice((-1, 1)))
                rule = replace(rule, quota=quota)
            elif change == 1:
                rule = replace(rule, bias=rule.bias + rng.normal(size=len(rule.bias)) * wild / 3)
            elif change == 2:
                rule = replace(rule, noise=float(rng.random() * wild * (rng.random() < 0.7)))
            elif change == 3:
                rule = replace(rule, release=rule.release * rng.uniform(0.0, 1.2))
            else:
                rule = replace(rule, rule=int(rng.choice(RULES)))
        return rule
