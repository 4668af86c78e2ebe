"""Runs a schedule of several models on their ranks: compute, sends and receives in one flat list per node.

    links = Links.of_models(problem.models, problem.nodes, timeout_s=600)     # once; schedules may change
    executor = FusedExecutor(share_schedule(schedule), links)                  # once per schedule
    report = executor.run(works)                                               # once per step

1. The schedule is simulated: an invalid one is refused before anything is sent.
2. Its digest is compared on all ranks; so is whether each rank can run what the schedule gives it.
3. Every rank runs the list of its node (``steps.py``).
4. When all of it has run, each model's gradients are reduced, in the order of models on every rank.

Invariants: a rank of which another one fails, fails too, within the time-out; a schedule of one model alone is plain
pipeline parallelism, run by the same code.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ultraep.pipeline.agreement import ScheduleMismatch, agree
from megatron_ultraep.pipeline.communication import Links, Transfer
from megatron_ultraep.pipeline.memory import Memory, OperationMemory, OperationsMemory, device_memory
from megatron_ultraep.pipeline.problem import InvalidSchedule, Operation, Schedule
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.pipeline.steps import Message, Step, steps_of
from megatron_ultraep.pipeline.watchdog import (
    DeviceWatchdog,
    ExecutionError,
    FailureBoard,
    abort_communicators,
    explain,
)


class RunningStage(Protocol):
    """One model's stage on this rank, while a schedule runs. Operations come in any valid order."""

    def shape(self, microbatch: int) -> tuple[int, ...]:
        """Of the hidden states that go into and out of every stage."""

    @property
    def dtype(self) -> torch.dtype: ...

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """From the last stage's hidden states (None on the first stage) to what the next gets (None on the last)."""

    def backward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """From the output's gradient (None on the last stage) to the input's (None on the first)."""

    def finish(self) -> list[Any]:
        """Reduce gradients; what the last stage kept of every micro-batch, in order."""


class Work(Protocol):
    """What one model does on this rank in one run."""

    def complaints(self, schedule: Schedule, model: int, node: int) -> list[str]:
        """Why this rank cannot run its part of the schedule; empty if it can."""

    def begin(self) -> RunningStage: ...


@dataclass(frozen=True)
class Measured:
    """When an operation ran, in seconds since all ranks had begun; waiting for its input is not part of it."""

    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class ExecutionReport:
    """What a run gave, on this rank.

    Attributes:
        kept: of each model what its loss function kept, per micro-batch; empty but on its last stage.
        measured: every operation, in order.
        finish_s: time of reducing gradients and of what else comes after the last operation, in seconds.
        memory: of every operation, in order; None where nothing is counted, on CPUs.
        peak: most bytes at once above those before the run, until the last operation; None likewise.
    """

    kept: tuple[list[Any], ...]
    measured: tuple[Measured, ...]
    finish_s: float
    memory: tuple[OperationMemory, ...] | None = None
    peak: int | None = None

    @property
    def makespan(self) -> float:
        """End of this rank's last operation, in seconds; the schedule's is the maximum over ranks."""
        return max((m.end for m in self.measured), default=0.0)


class FusedExecutor:
    """Runs one schedule, as often as wanted. Collective over the world, also to make.

    Args:
        schedule: the same on every rank; see ``share_schedule``.
        links: made for the models' placements; may serve many executors, one after the other.
        timeout_s: limit of every wait, that of ``links`` by default.
        memory: readings of this rank's memory; by default those of its CUDA device, none on CPUs.

    Raises:
        InvalidSchedule: it cannot run; nothing was sent.
        ScheduleMismatch: ranks hold different ones, or ``links`` are for other placements.
    """

    def __init__(
        self, schedule: Schedule, links: Links, *, timeout_s: float | None = None, memory: Memory | None = None
    ) -> None:
        self.schedule = schedule
        self.links = links
        self.memory = device_memory(links.device) if memory is None and links.device.type == "cuda" else memory
        self.timeout_s = links.timeout_s if timeout_s is None else timeout_s
        self.runs = 0
        invalid, complaint, timeline = None, _misfit(schedule, links), None
        try:
            timeline = simulate(schedule)
        except InvalidSchedule as error:
            invalid, complaint = error, f"the schedule is invalid: {error}"
        try:
            agree(schedule.digest(), complaint, group=links.control)
        except ScheduleMismatch:
            if invalid is not None:
                raise invalid from None
            raise
        assert timeline is not None
        self.timeline = timeline
        self.steps: tuple[Step, ...] = steps_of(schedule, links.node, timeline)

    def run(self, works: Sequence[Work | None], *, allocated: int | None = None) -> ExecutionReport:
        """Run every operation of this rank, and reduce gradients.

        Args:
            works: of each model of the problem; None where it has no stage on this rank.
            allocated: bytes of this rank's memory before the works were made; by default what is allocated now.

        Raises:
            ScheduleMismatch: on all ranks, before anything runs, when one cannot run its part.
            ExecutionError: an operation failed or a wait took too long, here or elsewhere. Links, and on GPUs all
                communicators of the process, are of no more use.
        """
        links, problem = self.links, self.schedule.problem
        if links.broken is not None:
            raise ExecutionError(f"these links failed before, make new ones (and new processes): {links.broken}")
        agree(self.schedule.digest(), _unfit(self.schedule, works, links.node), group=links.control)
        board = FailureBoard(f"{links.name}/{links.next_run()}")
        run = _Run(self, works, allocated)
        begun = time.monotonic()
        try:
            with run.watched():
                for step in self.steps:
                    run.do(step)
                run.drain()
                kept, finish_s = run.finish()
                measured = run.clock.measured()
        except Exception as error:
            cause = error if run.failure is None else ExecutionError(run.failure)
            explained = explain(cause, f"rank {links.rank} (node {links.node}), {run.doing}", run.waited(begun), board)
            links.drop(str(explained))
            raise explained from error
        self.runs += 1
        assert len(kept) == len(problem.models)
        counted = run.memory
        if counted is None:
            return ExecutionReport(kept, measured, finish_s)
        return ExecutionReport(kept, measured, finish_s, tuple(counted.found), counted.peak)


class _Run:
    """One run of a schedule on this rank.

    Attributes:
        doing: what this rank is doing, for errors.
        memory: of operations so far; None where nothing is counted.
    """

    def __init__(self, executor: FusedExecutor, works: Sequence[Work | None], allocated: int | None) -> None:
        self._links, self._problem = executor.links, executor.schedule.problem
        self._timeout = executor.timeout_s
        self._stages = [None if work is None else work.begin() for work in works]
        self._incoming: dict[Operation, Transfer] = {}
        self._outgoing: deque[tuple[Message, Transfer]] = deque()
        self._since: float | None = None
        self._device = self._links.device
        self._watchdog: DeviceWatchdog | None = None
        self.doing = "beginning"
        self.clock: Any = _DeviceClock(self._device) if self._device.type == "cuda" else _HostClock()
        self.memory = None if executor.memory is None else OperationsMemory(executor.memory, allocated)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """On GPUs, with a thread that ends what takes too long."""
        if self._device.type != "cuda":
            yield
            return
        with DeviceWatchdog(self._timeout, abort_communicators) as self._watchdog:
            yield
            torch.cuda.synchronize(self._device)
            if self._watchdog.failure is not None:
                raise ExecutionError(self._watchdog.failure)

    @property
    def failure(self) -> str | None:
        """What the watchdog found."""
        return None if self._watchdog is None or self._watchdog.failure is None else self._describe_stuck()

    def _describe_stuck(self) -> str:
        assert self._watchdog is not None
        return f"rank {self._links.rank} (node {self._links.node}), {self._watchdog.failure}"

    def waited(self, begun: float) -> float:
        return time.monotonic() - (begun if self._since is None else self._since)

    def do(self, step: Step) -> None:
        """Post receives, run the operation, send its result."""
        for message in step.post:
            self._post(message)
        operation = step.operation
        received = self._await(operation) if step.receive is not None else None
        stage = self._stages[operation.model]
        assert stage is not None
        peer = None if step.receive is None else self._links.peer(step.receive.source)
        self._say(operation, "computing")
        if self.memory is not None:
            self.memory.begin()
        begin = self.clock.mark()
        if self._watchdog is not None:
            self._watchdog.began(self._describer(operation, peer), begin)
        run = stage.backward if operation.backward else stage.forward
        result = run(operation.microbatch, received)
        end = self.clock.mark()
        self.clock.add(operation, begin, end)
        if self._watchdog is not None:
            self._watchdog.ended(end)
        if self.memory is not None:
            kept = not self._problem.models[operation.model].forward_only
            self.memory.end(operation, received=0 if received is None else received.nbytes, kept=kept)
        if step.send is not None:
            self._send(step.send, result)

    def drain(self) -> None:
        """Until everything is sent."""
        while self._outgoing:
            message, transfer = self._outgoing.popleft()
            self._say(message.producer, f"waiting until rank {transfer.peer} has received its result")
            with self._watching():
                transfer.wait(self._timeout)

    def finish(self) -> tuple[tuple[list[Any], ...], float]:
        """What all models kept, and how long it took to reduce their gradients, in seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        kept = []
        for model, stage in zip(self._problem.models, self._stages, strict=True):
            self.doing, self._since = f"reducing gradients of {model.name!r}", time.monotonic()
            with self._watching():
                kept.append([] if stage is None else stage.finish())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return tuple(kept), time.perf_counter() - started

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """On GPUs, what is handed to the device inside must end in time."""
        if self._watchdog is None:
            yield
            return
        doing = self.doing
        self._watchdog.began(lambda begun: doing, self.clock.mark())
        yield
        self._watchdog.ended(self.clock.mark())

    def _post(self, message: Message) -> None:
        consumer = message.consumer
        stage = self._stages[consumer.model]
        assert stage is not None
        self._say(consumer, "asking for its input")
        buffer = torch.empty(stage.shape(consumer.microbatch), dtype=stage.dtype, device=self._device)
        self._incoming[consumer] = self._links.receive(buffer, consumer.model, consumer.backward, message.source)

    def _await(self, operation: Operation) -> torch.Tensor:
        transfer = self._incoming.pop(operation)
        self._say(operation, f"waiting for its input from rank {transfer.peer}")
        return transfer.wait(self._timeout)

    def _send(self, message: Message, result: torch.Tensor | None) -> None:
        producer = message.producer
        self._say(producer, "sending its result")
        stage = self._stages[producer.model]
        assert stage is not None
        expected = stage.shape(producer.microbatch)
        if result is None or tuple(result.shape) != expected or result.dtype != stage.dtype:
            got = None if result is None else f"{tuple(result.shape)} {result.dtype}"
            raise ExecutionError(
                f"rank {self._links.rank}, {self.doing}: expected {expected} {stage.dtype}, got {got}: give the rows "
                "of every micro-batch as the model sees them, padding included"
            )
        transfer = self._links.send(result.contiguous(), producer.model, producer.backward, message.target)
        self._outgoing.append((message, transfer))
        while self._outgoing and self._outgoing[0][1].is_done():
            self._outgoing.popleft()

    def _say(self, operation: Operation, what: str) -> None:
        self.doing, self._since = f"{operation.describe(self._problem)}: {what}", time.monotonic()

    def _describer(self, operation: Operation, peer: int | None) -> Callable[[bool], str]:
        def describe(begun: bool) -> str:
            what = "computing" if begun or peer is None else f"waiting for its input from rank {peer}"
            return f"{operation.describe(self._problem)}: {what}"

        return describe


class _HostClock:
    """Times of operations that have ended when their call returns."""

    def __init__(self) -> None:
        self._zero = self.mark()
        self._found: list[tuple[Operation, float, float]] = []

    def mark(self) -> float:
        return time.perf_counter()

    def add(self, operation: Operation, begin: float, end: float) -> None:
        self._found.append((operation, begin, end))

    def measured(self) -> tuple[Measured, ...]:
        return tuple(Measured(operation, begin - self._zero, end - self._zero) for operation, begin, end in self._found)


class _DeviceClock:
    """Times of operations on the current stream of a device, by events."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        self._zero = self.mark()
        self._found: list[tuple[Operation, Any, Any]] = []

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, operation: Operation, begin: Any, end: Any) -> None:
        self._found.append((operation, begin, end))

    def measured(self) -> tuple[Measured, ...]:
        """Waits for the device."""
        torch.cuda.synchronize()

        def since(event: Any) -> float:
            return float(self._zero.elapsed_time(event)) / 1e3

        return tuple(Measured(operation, since(begin), since(end)) for operation, begin, end in self._found)


def _misfit(schedule: Schedule, links: Links) -> str:
    """Why links do not serve a schedule; empty if they do."""
    problem = schedule.problem
    if problem.nodes != links.nodes:
        return f"expected links between {problem.nodes} nodes, got {links.nodes}: make links for this problem"
    placements = tuple(model.nodes for model in problem.models)
    if placements != links.placements:
        return f"expected links for models on the nodes {placements}, got {links.placements}: make links for these"
    return ""


def _unfit(schedule: Schedule, works: Sequence[Work | None], node: int) -> str:
    """Why this rank cannot run its part with what it was given; empty if it can."""
    models = schedule.problem.models
    if len(works) != len(models):
        return f"expected work for each of {len(models)} models (None where a rank has no stage), got {len(works)}"
    wrong = []
    for i, (model, work) in enumerate(zip(models, works, strict=True)):
        if (model.place(node) is None) != (work is None):
            wrong.append(f"model {model.name!r}: expected {'no work' if work is not None else 'work'} on node {node}")
        elif work is not None:
            wrong += [f"model {model.name!r}: {reason}" for reason in work.complaints(schedule, i, node)]
    return "; ".join(wrong)


def makespan(report: ExecutionReport, links: Links) -> float:
    """The longest over all ranks, in seconds; collective."""
    told: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(told, report.makespan, group=links.control)
    return max(told)
