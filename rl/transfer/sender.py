"""The trainer's side of a direct transfer: packs while the bucket before is on the wire.

    sender = ModelSender(model, rank)
    holdings = sender.announce("bfloat16")          # to the driver, which makes plan and membership from all ranks'
    sender.join(membership)
    report = sender.send(plan)                      # returns when all engines have all
    sender.start(plan); train(...); sender.finish() # from a copy, so that training may change weights at once

Memory above the weights: two buckets on the device, and the tensors of a third (gathered over tensor-parallel ranks
or put together); with a copy, this rank's share besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rl.models.builder import BuiltModel
from rl.models.weights import export_weights, holdings
from rl.transfer.buffers import new_buffer, on_stream, pack
from rl.transfer.links import Board, Link, Membership, TransferError, join
from rl.transfer.plan import Bucket, Holding, TransferPlan

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

            with on_stream(self._stream):
                if self._stream is not None:
                    self._stream.wait_stream(torch.cuda.default_stream(self.device))
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


class ModelSender:
    """A Megatron rank's part in transfers, as source or as a tensor-parallel peer of one.

    Args:
        model: whose weights.
        rank: of the trainer.
        settle: called before weights are read (gathers that are under way).
    """

    def __init__(self, model: BuiltModel, rank: int, settle: Callable[[], None] = lambda: None) -> None:
        self.model = model
        self.rank = rank
        self.settle = settle
        self.sender = Sender(source_name(rank), torch.device(model.device))
        self._holdings: list[Holding] = []
        self._thread = ThreadPoolExecutor(1, "weight-transfer")
        self._under_way: Future[SendReport | None] | None = None

    def announce(self, dtype: str) -> list[Holding]:
        """What this rank could hand over, as ``dtype``; no communication."""
        self._holdings = holdings(self.model, dtype)
        return self._holdings

    def join(self, membership: Membership) -> None:
        """Join if this rank is one of the sources; see :func:`rl.transfer.links.join`."""
        if self.sender.name in membership.sources:
            self.sender.join(membership)

    @torch.no_grad()
    def send(self, plan: TransferPlan) -> SendReport | None:
        """Hand over this rank's share; a collective of all trainer ranks. None on ranks that are no source.

        Raises:
            TransferError: see :meth:`Sender.send`.
        """
        pairs = self._pairs(plan)
        if self.rank in plan.ranks:
            return self.sender.send(plan, plan.ranks.index(self.rank), pairs)
        for _ in pairs:  # its part in the gathers
            pass
        return None

    @torch.no_grad()
    def start(self, plan: TransferPlan, where: Snapshot = "device") -> None:
        """Copy this rank's share and begin to send the copy; weights may change at once. A collective.

        Raises:
            TransferError: the transfer before was not waited for (:meth:`finish`).
        """
        if self._under_way is not None:
            raise TransferError(f"{self.sender.name} is still at a transfer: call finish() first")
        pairs = self._pairs(plan)
        if self.rank not in plan.ranks:
            for _ in pairs:
                pass
            return
        source = plan.ranks.index(self.rank)
        copy = self.sender.copy(plan, source, pairs, where)
        self._under_way = self._thread.submit(self.sender.send_copy, plan, source, copy)

    def finish(self, timeout_s: float) -> SendReport | None:
        """Wait for what :meth:`start` began; None if nothing is under way.

        Raises:
            TransferTimeout, TransferError: see :meth:`Sender.send`.
        """
        if self._under_way is None:
            return None
        try:
            report = self._under_way.result(timeout_s)
        except TimeoutError as error:
            if not self._under_way.done():
                raise TimeoutError(f"{self.sender.name} did not finish its transfer within {timeout_s:g} s") from error
            self._under_way = None
            raise
        except BaseException:
            self._under_way = None
            raise
        self._under_way = None
        return report

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.sender.close()

    def _pairs(self, plan: TransferPlan) -> Iterator[tuple[str, torch.Tensor]]:
        self.settle()
        leader = {name: rank for source, rank in enumerate(plan.ranks) for name in plan.names(source)}
        mine = self._holdings or self.announce(next(iter(plan.buckets[0][0].pieces)).tensor.dtype)
        names = {t.name for h in mine for t in h.tensors if leader.get(t.name) == h.leader}
        return export_weights(self.model, names=names)


def source_name(rank: int) -> str:
    """What a trainer rank is called in memberships."""
    return f"trainer rank {rank}"


def say_ready(board: Board, plan: TransferPlan, number: int) -> None:
    """Tell all members that this one is ready for a transfer, and of which plan."""
    board.tell(f"ready/{number}/{board.name}", plan.digest())


def await_ready(board: Board, plan: TransferPlan, number: int, membership: Membership) -> None:
    """Wait for all members to be ready for the same plan.

    Raises:
        TransferTimeout: naming who was not.
        TransferError: a member has another plan.
    """
    keys = {f"ready/{number}/{m}": m for m in membership.members}
    told = board.wait_for(keys, membership.limits.start_s, f"be ready for transfer {number}")
    wrong = [keys[key] for key, digest in told.items() if digest != plan.digest()]
    if wrong:
        board.fail(TransferError(f"{board.what} has another plan than {', '.join(wrong)}: send all the same one"))


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
