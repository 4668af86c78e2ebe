"""The engine's side of a direct transfer: ``(name, tensor)`` pairs, as from the object store.

Two broadcasts per source are under way while the caller loads tensors; buckets come out in the order in which they
arrive, whichever the source: waiting for one source's bucket while another's fills its buffers could stop both, as
trainer ranks of one tensor-parallel group gather together.

Memory: at most two buckets per source, and those whose tensors the caller still holds (vLLM holds a layer's until the
layer is complete): tensors are views of buckets, and a bucket's memory lives as long as any of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from rl.transfer.buffers import new_buffer, on_stream, views
from rl.transfer.links import Board, Link, Membership, TransferError, await_ready, join, say_ready, source_name
from rl.transfer.plan import Bucket, TransferPlan

_DEPTH = 2  # buckets per source under way
_LOOK_S = 0.05
_NAP_S = 0.0001


@dataclass(frozen=True)
class Incoming:
    """A chunk of an update that comes by a direct transfer: what ``RolloutEngine.update_weights`` is given.

    Its manifest is ``plan.manifest``. The engine must have joined a generation with all sources of the plan.
    """

    plan: TransferPlan


@dataclass
class _Awaited:
    bucket: Bucket
    buffer: torch.Tensor
    work: Any
    since: float


class BucketReceiver(ABC):
    """What takes a plan's buckets, however they come."""

    @abstractmethod
    def receive_buckets(self, plan: TransferPlan) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
        """All tensors of a plan, bucket by bucket."""

    def receive(self, plan: TransferPlan) -> Iterator[tuple[str, torch.Tensor]]:
        """``(name, tensor)`` of all tensors of a plan, see :meth:`receive_buckets`."""
        # Closed with this generator, so that a caller that stops half-way is noticed at once.
        with closing(self.receive_buckets(plan)) as buckets:
            for pairs in buckets:
                yield from pairs


class Receiver(BucketReceiver):
    """One engine worker (one tensor-parallel rank of an engine).

    Args:
        name: its name in memberships, see :func:`receiver_name`.
        device: where its weights are.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._board: Board | None = None
        self._links: list[Link] = []
        self._transfers = 0

    def join(self, membership: Membership) -> None:
        """Leave the generation before and join this one; see :func:`rl.transfer.links.join`."""
        self.close()
        self._board, self._links = join(membership, self.name, self.device)
        self._transfers = 0

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links, self._board = [], None

    def receive_buckets(self, plan: TransferPlan) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
        """All tensors of a plan, bucket by bucket as they arrive; a collective of all members.

        Raises:
            TransferError: it broke off, naming who failed; what came is not whole. The generation is of no more use:
                join another. The same happens to the other members when the caller stops half-way.
        """
        board, links = self._board, self._links
        if board is None or len(links) != len(plan.ranks):
            raise TransferError(
                f"{self.name} is in a generation of {len(links)} sources, the plan has {len(plan.ranks)}: join one of "
                "this plan's sources first, and after every failure again"
            )
        waiting = [deque(buckets) for buckets in plan.buckets]
        awaited: list[deque[_Awaited]] = [deque() for _ in links]
        try:
            say_ready(board, plan, self._transfers)
            await_ready(board, plan, self._transfers, links[0].membership)
            for source in range(len(links)):
                for _ in range(_DEPTH):
                    self._post(links[source], waiting[source], awaited[source])
            while any(awaited):
                source = self._first(plan, board, links, awaited)
                done = awaited[source].popleft()
                if self._stream is not None:
                    done.buffer.record_stream(torch.cuda.current_stream(self.device))
                yield views(done.buffer, done.bucket)
                del done
                self._post(links[source], waiting[source], awaited[source])
        except BaseException as error:
            self._give_up(error)
            raise
        self._transfers += 1

    def _post(self, link: Link, waiting: deque[Bucket], awaited: deque[_Awaited]) -> None:
        if waiting:
            bucket = waiting.popleft()
            with on_stream(self._stream):
                buffer = new_buffer(bucket, self.device)
                awaited.append(_Awaited(bucket, buffer, link.broadcast(buffer), time.monotonic()))

    def _first(self, plan: TransferPlan, board: Board, links: list[Link], awaited: list[deque[_Awaited]]) -> int:
        """The source whose next bucket is there first."""
        started = time.monotonic()
        look = started + _LOOK_S
        limit = links[0].membership.limits.bucket_s
        while True:
            for source, works in enumerate(awaited):
                if not works:
                    continue
                next_one = works[0]
                late = time.monotonic() - max(next_one.since, started) > limit
                if late or next_one.work.is_completed():
                    what = f"bucket {next_one.bucket.index} of {len(plan.buckets[source])}"
                    what += f" of {source_name(plan.ranks[source])}"
                    links[source].wait(next_one.work, 0.0 if late else limit, what)
                    return source
            if time.monotonic() > look:
                board.raise_failure()
                look = time.monotonic() + _LOOK_S
            if self.device.type == "cpu":
                time.sleep(_NAP_S)

    def _give_up(self, error: BaseException) -> None:
        board, links = self._board, self._links
        self._links, self._board = [], None
        if board is not None:
            why = "its caller stopped half-way" if isinstance(error, GeneratorExit) else f"{error}"
            board.store.compare_set("failed", "", f"{self.name}: {why}")
        for link in links:
            link.abort()


def receiver_name(engine: int, rank: int) -> str:
    """What a tensor-parallel rank of an engine is called in memberships."""
    return f"engine {engine} rank {rank}"


def receiver_names(engines: list[int], tensor_parallel: int) -> tuple[str, ...]:
    """All workers of engines, by index of the engine."""
    return tuple(receiver_name(e, r) for e in engines for r in range(tensor_parallel))
