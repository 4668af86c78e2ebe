"""What is scheduled when several models train on the same pipeline nodes, and what a schedule is.

A *node* is the set of ranks that hold one pipeline stage of the large model. A model lies on nodes by its stages, once
or in several replicas; it has at most one stage on a node, so a node's tasks are told apart by ``(model, forward or
backward)``: the i-th forward of a model on a node is micro-batch i of the replica there, the i-th backward likewise.

Durations and delays are in one unit of the caller's choice (seconds when measured), activations in another (bytes).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


class InvalidSchedule(ValueError):
    """A schedule that cannot run as it is; says on which node, at which task and micro-batch, and why."""


@dataclass(frozen=True)
class PipelineModel:
    """A model as its pipeline stages.

    Attributes:
        name: "actor", "critic", ...
        nodes: ``[replica][stage]``, node; replicas share no node.
        microbatches: of each replica, in one step.
        forward, backward: time of a micro-batch, by stage.
        activation: memory held from the start of a micro-batch's forward to the end of its backward, by stage; of a
            model that only runs forward, to the end of its forward.
        delay: time from the end of a stage to the start of the next one, either direction.
        forward_only: there are no backwards; ``backward`` is all 0.
    """

    name: str
    nodes: tuple[tuple[int, ...], ...]
    microbatches: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    activation: tuple[float, ...]
    delay: float = 0.0
    forward_only: bool = False

    def __post_init__(self) -> None:
        where = f"model {self.name!r}"
        if not self.nodes or not self.nodes[0]:
            raise ValueError(f"{where}: expected nodes of at least one replica of at least one stage, got {self.nodes}")
        if len({len(replica) for replica in self.nodes}) != 1:
            raise ValueError(
                f"{where}: expected replicas of as many stages each, got {[len(replica) for replica in self.nodes]}"
            )
        used = Counter(node for replica in self.nodes for node in replica)
        twice = sorted(node for node, times in used.items() if times > 1)
        if twice:
            raise ValueError(f"{where}: expected at most one stage of a model on a node; nodes {twice} have more")
        if min(used) < 0:
            raise ValueError(f"{where}: expected nodes from 0, got {min(used)}")
        if self.microbatches < 1:
            raise ValueError(f"{where}: expected at least 1 micro-batch, got {self.microbatches}")
        for name in ("forward", "backward", "activation"):
            values = getattr(self, name)
            if len(values) != self.stages:
                raise ValueError(f"{where}: expected one {name} for each of {self.stages} stages, got {len(values)}")
            if not all(math.isfinite(value) and value >= 0 for value in values):
                raise ValueError(f"{where}: expected {name} finite and 0 or more, got {values}")
        if not (math.isfinite(self.delay) and self.delay >= 0):
            raise ValueError(f"{where}: expected a delay finite and 0 or more, got {self.delay}")
        if self.forward_only and any(self.backward):
            raise ValueError(f"{where}: runs forward only, so its backward must be all 0, got {self.backward}")

    @property
    def stages(self) -> int:
        return len(self.nodes[0])

    @property
    def replicas(self) -> int:
        return len(self.nodes)

    @property
    def directions(self) -> tuple[bool, ...]:
        """Values of :attr:`Task.backward` that its tasks have."""
        return (False,) if self.forward_only else (False, True)

    def place(self, node: int) -> tuple[int, int] | None:
        """(replica, stage) on ``node``; None where it has none."""
        for r, replica in enumerate(self.nodes):
            if node in replica:
                return r, replica.index(node)
        return None

    @classmethod
    def uniform(
        cls,
        name: str,
        *,
        stages: int,
        microbatches: int,
        forward: float,
        backward: float,
        activation: float,
        replicas: int = 1,
        reversed: bool = False,
        first_node: int = 0,
        delay: float = 0.0,
        forward_only: bool = False,
    ) -> PipelineModel:
        """Stages alike, replicas on consecutive segments of nodes from ``first_node``.

        Args:
            reversed: the first stage lies on the last node of its segment.
        """
        step = -1 if reversed else 1
        segments = [range(first_node + r * stages, first_node + (r + 1) * stages)[::step] for r in range(replicas)]
        return cls(
            name,
            tuple(tuple(segment) for segment in segments),
            microbatches,
            (forward,) * stages,
            (backward,) * stages,
            (activation,) * stages,
            delay,
            forward_only,
        )


@dataclass(frozen=True)
class Problem:
    """Models that share nodes.

    Attributes:
        nodes: number of nodes.
        models: the large one first.
        memory_cap: most activations held at once, by node; no limit when None.
    """

    nodes: int
    models: tuple[PipelineModel, ...]
    memory_cap: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("expected at least one model, got none")
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"expected models of different names, got {names}")
        for model in self.models:
            last = max(node for replica in model.nodes for node in replica)
            if last >= self.nodes:
                raise ValueError(f"model {model.name!r} lies on node {last}, but there are nodes 0 to {self.nodes - 1}")
        if self.memory_cap is not None:
            if len(self.memory_cap) != self.nodes:
                raise ValueError(f"expected a memory cap for each of {self.nodes} nodes, got {len(self.memory_cap)}")
            for n, cap in enumerate(self.memory_cap):
                for model in self.models:
                    place = model.place(n)
                    if place is not None and model.activation[place[1]] > cap:
                        raise ValueError(
                            f"node {n}: one micro-batch of {model.name!r} holds {model.activation[place[1]]:g}, more "
                            f"than the cap of {cap:g}: raise the cap, or make micro-batches smaller"
                        )

    def count(self, node: int) -> Counter[Task]:
        """How often each task must be in the order of ``node``."""
        return Counter(
            {
                Task(m, backward): model.microbatches
                for m, model in enumerate(self.models)
                if model.place(node) is not None
                for backward in model.directions
            }
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON, or not a problem.
        """
        try:
            return _problem(json.loads(text))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a problem as Problem.to_json writes it: {error!r}") from error

    @classmethod
    def of_instance(cls, row: Mapping[str, Any]) -> Problem:
        """A row of a file of instances: ``nodes``, and ``large`` and ``small`` with ``stages``, ``microbatches``
        (of each replica), ``forward``, ``backward``, ``activation``, and of the small one ``replicas`` and
        ``direction``.

        Raises:
            ValueError: a key is missing.
        """
        try:
            models = []
            for name in ("large", "small"):
                given = row[name]
                models.append(
                    PipelineModel.uniform(
                        name,
                        stages=given["stages"],
                        microbatches=given["microbatches"],
                        forward=given["forward"],
                        backward=given["backward"],
                        activation=given["activation"],
                        replicas=given.get("replicas", 1),
                        reversed=str(given.get("direction", "")).startswith("reversed"),
                        delay=given.get("delay", 0.0),
                        forward_only=given.get("forward_only", False),
                    )
                )
            return cls(row["nodes"], tuple(models))
        except KeyError as error:
            raise ValueError(f"instance {row.get('name', '?')!r}: expected the key {error}, it has none") from error


def _problem(given: Mapping[str, Any]) -> Problem:
    models = []
    for model in given["models"]:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
        values["nodes"] = tuple(tuple(replica) for replica in model["nodes"])
        models.append(PipelineModel(**values))
    cap = given.get("memory_cap")
    return Problem(given["nodes"], tuple(models), None if cap is None else tuple(cap))


@dataclass(frozen=True, order=True)
class Task:
    """One entry of a node's order; which micro-batch it is follows from its place (see the module)."""

    model: int
    backward: bool

    def __str__(self) -> str:
        return f"{'B' if self.backward else 'F'}{self.model}"

    @classmethod
    def parse(cls, text: str) -> Task:
        """The inverse of ``str``: ``F0`` is a forward of the first model."""
        if text[:1] not in ("F", "B") or not text[1:].isdecimal():
            raise ValueError(f"expected a task like F0 or B1, got {text!r}")
        return cls(int(text[1:]), text[0] == "B")


@dataclass(frozen=True, order=True)
class Operation:
    """A micro-batch's forward or backward in one stage of one replica of a model."""

    model: int
    replica: int
    stage: int
    microbatch: int
    backward: bool

    def describe(self, problem: Problem) -> str:
        """As errors name it."""
        model = problem.models[self.model]
        kind = "backward" if self.backward else "forward"
        replica = f", replica {self.replica}" if model.replicas > 1 else ""
        return f"{kind} of {model.name!r}, micro-batch {self.microbatch}, stage {self.stage}{replica}"


@dataclass(frozen=True)
class Schedule:
    """An order of tasks for every node. It may be invalid: :func:`megatron_ultraep.pipeline.simulate.simulate` tells.

    Attributes:
        orders: ``[node]``, its tasks in order of execution.
    """

    problem: Problem
    orders: tuple[tuple[Task, ...], ...]

    def __post_init__(self) -> None:
        if len(self.orders) != self.problem.nodes:
            raise InvalidSchedule(f"expected an order for each of {self.problem.nodes} nodes, got {len(self.orders)}")

    def operations(self, node: int) -> list[Operation]:
        """What ``node`` runs, in order.

        Raises:
            InvalidSchedule: a task of a model that has no stage there.
        """
        seen: Counter[Task] = Counter()
        found = []
        models = self.problem.models
        places = [model.place(node) for model in models]
        for position, task in enumerate(self.orders[node]):
            place = places[task.model] if 0 <= task.model < len(places) else None
            if place is None:
                raise InvalidSchedule(
                    f"node {node}, position {position}: task {task} is of a model that has no stage on this node"
                )
            found.append(Operation(task.model, *place, seen[task], task.backward))
            seen[task] += 1
        return found

    def digest(self) -> str:
        """sha256 (hex) of the orders and of what of the problem they depend on: nodes, stages, micro-batches, not
        durations and memory, which every rank may have measured for itself."""
        shape = [[model.name, model.nodes, model.microbatches, model.forward_only] for model in self.problem.models]
        text = json.dumps([self.problem.nodes, shape, _texts(self.orders)], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"problem": asdict(self.problem), "orders": _texts(self.orders)})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON, or not a schedule.
        """
        try:
            given = json.loads(text)
            orders = tuple(tuple(map(Task.parse, order.split())) for order in given["orders"])
            return cls(_problem(given["problem"]), orders)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a schedule as Schedule.to_json writes it: {error!r}") from error


def _texts(orders: Sequence[Sequence[Task]]) -> list[str]:
    return [" ".join(map(str, order)) for order in orders]
