"""The smallest changes with which a run that does not fit would fit, found by trying.

Every change is one that a user would make: recompute, smaller micro-batches, more expert, pipeline or tensor
parallelism, more GPUs; a smaller cache or wider engines. Changes cost about what they hurt, and combinations are tried
in the order of their costs (Dijkstra), each validated by the configuration's own rules and the model's layout checks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rl.config import ConfigError, RunConfig, from_dict, to_dict
from rl.models.architecture import Architecture
from rl.planning.plan import Plan, PlanError, make_plan

Change = Mapping[str, Any]
Move = Callable[[RunConfig, Architecture], Iterator[tuple[float, Change]]]

MOST_TRIED = 400
MOST_COST = 16.0


@dataclass(frozen=True)
class Advice:
    """Changes that make something fit.

    Attributes:
        what: the trainer's ranks or the engines, as in ``Plan.over``.
        change: new values by dotted field; empty when nothing that was tried fits.
        bytes: that it would take then, of the GPU's limit.
    """

    what: str
    change: Change
    bytes: int

    def render(self) -> str:
        """``trainer.parallel.ep=16 trainer.recompute=full``: as overrides of a command."""
        return " ".join(f"{name}={_text(value)}" for name, value in self.change.items())


def advise(config: RunConfig, plan: Plan, *, alternatives: int = 3) -> list[Advice]:
    """For whatever does not fit, the cheapest changes that were found; each alone is enough.

    Args:
        config: of the run.
        plan: of it.
        alternatives: most of each, none of which contains another.
    """
    found = []
    for what, _ in plan.over:
        moves = _TRAINER if what.startswith("trainer") else _ENGINE
        found += list(_search(config, plan.arch, what, moves, alternatives))
    return found


def _search(
    config: RunConfig, arch: Architecture, what: str, moves: tuple[Move, ...], alternatives: int
) -> Iterator[Advice]:
    order = itertools.count()
    queue: list[tuple[float, int, dict[str, Any], RunConfig]] = [(0.0, next(order), {}, config)]
    seen: set[str] = set()
    solutions: list[Change] = []
    closest: Advice | None = None
    tried = 0
    while queue and tried < MOST_TRIED and len(solutions) < alternatives:
        cost, _, change, current = heapq.heappop(queue)
        if any(solution.items() <= change.items() for solution in solutions):
            continue
        if change:
            tried += 1
            try:
                planned = make_plan(current, arch, with_times=False)
            except (ConfigError, PlanError):
                planned = None  # a size that does not divide; a larger one may
            if planned is not None:
                memory = planned.fullest if what.startswith("trainer") else planned.engine
                advice = Advice(what, change, memory.total)
                if planned.limit is not None and memory.total <= planned.limit:
                    solutions.append(change)
                    yield advice
                    continue
                closest = min(closest or advice, advice, key=lambda each: each.bytes)
        for move in moves:
            for price, step in move(current, arch):
                changed = {**change, **step}
                key = repr(sorted(changed.items()))
                if cost + price > MOST_COST or key in seen:
                    continue
                seen.add(key)
                valid = apply(config, changed)
                if valid is not None:
                    heapq.heappush(queue, (cost + price, next(order), changed, valid))
    if not solutions:
        yield Advice(what, {}, closest.bytes if closest is not None else 0)


def apply(config: RunConfig, change: Change) -> RunConfig | None:
    """The configuration with new values of some fields; None where its rules forbid them."""
    raw = to_dict(config)
    for name, value in change.items():
        *sections, last = name.split(".")
        node = raw
        for section in sections:
            node = node[section]
        node[last] = value
    try:
        return from_dict(raw)
    except ConfigError:
        return None


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- moves


def _recompute(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    if config.trainer.recompute == "none":
        yield 1.5, {"trainer.recompute": "selective", "trainer.recompute_modules": ["moe"] if arch.is_moe else ["mlp"]}
    if config.trainer.recompute != "full":
        yield 2.0, {"trainer.recompute": "full", "trainer.recompute_modules": []}


def _micro_batch(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    now, least = config.trainer.tokens_per_micro_batch, config.longest_sample
    if now > least:
        yield 1.0, {"trainer.tokens_per_micro_batch": max(least, now // 2)}


def _expert_parallel(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    parallel = config.trainer.parallel
    if arch.is_moe and arch.experts % (2 * parallel.ep) == 0:
        yield 1.0, {"trainer.parallel.ep": 2 * parallel.ep}


def _pipeline(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    now = config.trainer.parallel.pp
    larger = next((pp for pp in range(now + 1, arch.layers + 1) if config.trainer.ranks % pp == 0), None)
    if larger is not None:
        yield 2.0, {"trainer.parallel.pp": larger, "trainer.parallel.vpp": 1}


def _tensor_parallel(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    parallel = config.trainer.parallel
    if 2 * parallel.tp <= config.plan.gpus_per_node:
        yield 2.0, {"trainer.parallel.tp": 2 * parallel.tp, "trainer.sequence_parallel": True}


def _more_ranks(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    ranks = {"trainer.ranks": 2 * config.trainer.ranks}
    if config.stream.colocated:
        ranks["rollout.engines"] = 2 * config.trainer.ranks // config.rollout.tensor_parallel
    yield 4.0, ranks


def _shard(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    if not config.trainer.distributed_optimizer:
        yield 0.5, {"trainer.distributed_optimizer": True}


def _balance(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    balance = config.balance
    if not balance.enabled and arch.is_moe and config.trainer.parallel.ep > 1 and config.trainer.parallel.etp == 1:
        yield 1.0, {"balance.enabled": True}
    if balance.enabled and balance.slots > 1:
        yield 1.0, {"balance.slots": max(1, balance.slots // 2)}


def _larger_gpus(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    larger = {"a100": "h200", "h100": "h200", "h200": "b200"}.get(config.plan.gpu)
    if larger is not None:
        yield 5.0, {"plan.gpu": larger}


def _cache(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    if config.rollout.kv_cache_gib >= 2:
        yield 1.0, {"rollout.kv_cache_gib": round(config.rollout.kv_cache_gib / 2, 2)}


def _seats(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    if config.rollout.max_num_seqs >= 32:
        yield 1.0, {"rollout.max_num_seqs": config.rollout.max_num_seqs // 2}


def _wider_engines(config: RunConfig, arch: Architecture) -> Iterator[tuple[float, Change]]:
    rollout = config.rollout
    # An engine stays on its node.
    if 2 * rollout.tensor_parallel <= min(arch.heads, config.plan.gpus_per_node):
        yield (
            3.0,
            {
                "rollout.tensor_parallel": 2 * rollout.tensor_parallel,
                "rollout.engines": max(1, rollout.engines // 2),
            },
        )


_TRAINER: tuple[Move, ...] = (
    _shard,
    _recompute,
    _micro_batch,
    _expert_parallel,
    _balance,
    _pipeline,
    _tensor_parallel,
    _more_ranks,
    _larger_gpus,
)
_ENGINE: tuple[Move, ...] = (_cache, _seats, _wider_engines, _larger_gpus)
