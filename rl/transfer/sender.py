"""A source of a direct transfer: packs a bucket while the one before is on the wire.

Memory above the tensors: two buckets on the device, and the tensors of a third (gathered over tensor-parallel ranks or
put together); with a copy, this source's share besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rl.transfer.buffers import new_buffer, on_stream, pack
from rl.transfer.links import Board, Link, Membership, TransferError, await_ready, join, say_ready, source_name
from rl.transfer.plan import Bucket, TransferPlan

_DEPTH = 2  # buckets: one on the wire, one being packed
Snapshot = Literal["device", "pinned"]


@dataclass(frozen=True)
class SendReport:
    """What a source did.

    Attributes:
        nbytes: sent, padding included.
        buckets: how many.
        ready_s: seconds until all receivers were ready (engines drain in this time).
        seconds: from then until the last bucket had arrived.
        started, ended: ``time.time()`` of the whole, for time lines.
    """

    nbytes: int
    buckets: int
    ready_s: float
    seconds: float
    started: float
    ended: float


class Sender:
    """One source of a transfer.

    Args:
        name: its name in memberships.
        device: where tensors and buffers are.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._board: Board | None = None
        self._link: Link | None = None
        self._transfers = 0

    def join(self, membership: Membership) -> None:
        """Leave the generation before and join this one; see :func:`rl.transfer.links.join`."""
        self.close()
        self._board, (self._link,) = join(membership, self.name, self.device)
        self._transfers = 0

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = self._board = None

    def send(self, plan: TransferPlan, source: int, pairs: Iterable[tuple[str, torch.Tensor]]) -> SendReport:
        """Send a source's share; returns when every receiver has it.

        Args:
            plan: the same on all members.
            source: index of this source in the plan and the membership.
            pairs: its tensors in the plan's order. They may change once this has returned.

        Raises:
            TransferError: it broke off. Join a new generation before the next.
            ValueError: tensors that are not the plan's.
        """
        return self._send(plan, source, lambda reuse: self._packed(plan.buckets[source], pairs, reuse))

    def copy(self, plan: TransferPlan, source: int, pairs: Iterable[tuple[str, torch.Tensor]], where: Snapshot) -> Any:
        """A packed copy of a source's share, for :meth:`send_copy`: on the device, or in pinned host memory.

        Weights may change as soon as it has returned.
        """
        host = where == "pinned" and self.device.type == "cuda"
        device = torch.device("cpu") if host else self.device
        buffers = []
        for bucket, tensors in _by_bucket(plan.buckets[source], pairs):
            buffer = new_buffer(bucket, device, pinned=host)
            pack(buffer, bucket, tensors)
            buffers.append(buffer)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return buffers

    def send_copy(self, plan: TransferPlan, source: int, copy: list[torch.Tensor]) -> SendReport:
        """Send a copy bucket by bucket, freeing each once it was sent; see :meth:`send`."""
        copy.reverse()
        return self._send(plan, source, lambda reuse: self._staged(plan.buckets[source], copy))

    # ---------------------------------------------------------------- inside

    def _send(self, plan: TransferPlan, source: int, filled: Callable[[Callable[[int], None]], Any]) -> SendReport:
        board, link = self._board, self._link
        if board is None or link is None:
            raise TransferError(f"{self.name} is in no generation: join one first, and after every failure again")
        limits, begun, started = link.membership.limits, time.time(), time.perf_counter()
        ready = 0.0
        works: list[Any] = []
        kept: list[torch.Tensor] = []
        try:
            say_ready(board, plan, self._transfers)

            def reuse(index: int) -> None:
                """The buffer of bucket ``index`` is about to be overwritten."""
                if self._stream is None:
                    link.wait(works[index], limits.bucket_s, _named(plan, source, index))
                else:
                    works[index].wait()  # the stream waits, not we

            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with on_stream(self._stream):
                for _, buffer in filled(reuse):
                    if not works:
                        await_ready(board, plan, self._transfers, link.membership)
                        ready = time.perf_counter() - started
                    works.append(link.broadcast(buffer))
                    kept = [*kept[-_DEPTH:], buffer]
            for index, work in enumerate(works):
                link.wait(work, limits.bucket_s, _named(plan, source, index))
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException as error:
            link.abort()
            self._link = self._board = None
            board.store.compare_set("failed", "", f"{self.name}: {type(error).__name__}: {error}")
            raise
        self._transfers += 1
        nbytes = sum(b.nbytes for b in plan.buckets[source])
        return SendReport(nbytes, len(works), ready, time.perf_counter() - started - ready, begun, time.time())

    def _packed(
        self, buckets: tuple[Bucket, ...], pairs: Iterable[tuple[str, torch.Tensor]], reuse: Callable[[int], None]
    ) -> Iterator[tuple[Bucket, torch.Tensor]]:
        most = max(b.nbytes for b in buckets)
        room = [torch.empty(most, dtype=torch.uint8, device=self.device) for _ in range(min(_DEPTH, len(buckets)))]
        for bucket, tensors in _by_bucket(buckets, pairs):
            if bucket.index >= _DEPTH:
                reuse(bucket.index - _DEPTH)
            buffer = room[bucket.index % _DEPTH][: bucket.nbytes]
            pack(buffer, bucket, tensors)
            yield bucket, buffer

    def _staged(self, buckets: tuple[Bucket, ...], copy: list[torch.Tensor]) -> Iterator[tuple[Bucket, torch.Tensor]]:
        for bucket in buckets:
            buffer = copy.pop()
            yield bucket, buffer.to(self.device, non_blocking=True)


def _by_bucket(
    buckets: tuple[Bucket, ...], pairs: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[Bucket, list[torch.Tensor]]]:
    given = iter(pairs)
    for bucket in buckets:
        tensors = []
        for piece in bucket.pieces:
            name, tensor = next(given, ("nothing", None))
            if name != piece.tensor.name or tensor is None:
                raise ValueError(f"expected tensor {piece.tensor.name} next, as planned, got {name}")
            tensors.append(tensor)
        yield bucket, tensors
    if (more := next(given, None)) is not None:
        raise ValueError(f"expected no tensor after the last planned one, got {more[0]}")


def _named(plan: TransferPlan, source: int, index: int) -> str:
    return f"bucket {index} of {len(plan.buckets[source])} of {source_name(plan.ranks[source])}"
