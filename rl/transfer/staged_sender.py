"""A trainer rank's part where engines share GPUs with trainer ranks: buckets through staging memory.

NCCL takes one process of a GPU into a communicator, so engines are in none: trainer ranks hand each bucket round among
themselves, each into the staging memory on its own GPU, and the engine beside it copies it from there. Per bucket, in
the order of :mod:`rl.transfer.turns`:

1. wait until the engine has taken what lay in its place;
2. export what comes no later than its last tensor, together with tensor-parallel peers;
3. its source packs it; all broadcast it;
4. when the device has it, tell the engine, which says when it has copied it.

Several buckets are at different stages at the same time. Memory above the tensors: the ring (three buckets, or the
largest tensor), and the exported tensors of one bucket.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from rl.transfer.buffers import on_stream, pack
from rl.transfer.links import Board, Link, Membership, TransferError, await_ready, say_ready, source_name
from rl.transfer.plan import Bucket, TransferPlan
from rl.transfer.receiver import receiver_name
from rl.transfer.sender import SendReport
from rl.transfer.staging import ENTRIES, Entry, Staging, StagingHandles
from rl.transfer.turns import Key, Turn, places

_PEERS = 1.5  # of the limit of a bucket: whoever waits for the member that hangs itself must give up first

Exported = Iterable[tuple[Key, Sequence[tuple[str, torch.Tensor]]]]
"""Parameters in layer order: key, and ``(name, tensor)`` of those that this rank hands over, maybe none."""


@dataclass
class _UnderWay:
    """A bucket that is being handed round: what the engine will be told, and the work to wait for."""

    entry: Entry
    work: Any


class StagedSender:
    """One trainer rank.

    Args:
        rank: of the trainer.
        device: where tensors and staging memory are.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.device = rank, device
        self.name = source_name(rank)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._board: Board | None = None
        self._link: Link | None = None
        self._staging: Staging | None = None
        self._membership: Membership | None = None
        self._transfers = 0

    def join(self, membership: Membership, nbytes: int) -> StagingHandles:
        """Leave the generation before and join this one, a collective of all trainer ranks.

        Args:
            membership: its sources are all ranks of the trainer in their order, its receivers engines of one rank, of
                which the i-th shares the device of trainer rank i.
            nbytes: of staging memory, ``turns.staging_bytes``.

        Returns:
            what the engine beside this rank must open.

        Raises:
            ValueError: no such member.
            TransferTimeout: naming the ranks that did not come.
        """
        before = self._staging
        self.close()
        ranks = membership.sources
        if len(ranks) <= self.rank or ranks[self.rank] != self.name:
            raise ValueError(f"expected all trainer ranks in their order, {self.name} among them, got {list(ranks)}")
        self._board, self._membership = Board(membership, self.name), membership
        self._board.tell(f"here/{self.name}", "1")
        self._board.wait_for({f"here/{m}": m for m in ranks}, membership.limits.join_s, "join")
        if len(ranks) > 1:
            among = replace(membership, sources=ranks[:1], receivers=ranks[1:])
            self._link = Link(among, 0, self.rank, self._board, self.device)
        self._staging = Staging(nbytes, self.device, membership.generation, self.rank, before)
        self._transfers = 0
        return self._staging.handles()

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        if self._staging is not None:
            self._staging.close()
        self._link = self._board = self._staging = self._membership = None

    def hand_over(self, plan: TransferPlan, turns: Sequence[Turn], exported: Exported) -> SendReport:
        """Hand all of a plan to the engine beside this rank; a collective of all trainer ranks.

        Args:
            plan: the same on all members.
            turns: of the plan, the same on all ranks.
            exported: iterating it is a collective of tensor-parallel ranks. Whatever goes wrong, it is iterated to
                its end, so that no peer is left alone in a gather.

        Returns:
            what the engine took, and how long that was.

        Raises:
            TransferError: it broke off. Join a new generation before the next.
            ValueError: tensors that are not the plan's.
        """
        given = iter(exported)
        try:
            if self._board is None or self._staging is None:
                raise TransferError(f"{self.name} is in no generation: join one first, and after every failure again")
            return self._hand_over(plan, turns, given)
        except BaseException as error:
            self._give_up(error)
            if isinstance(error, Exception):
                with suppress(Exception):  # the first error is the one to report
                    for _ in given:
                        pass
            raise

    def _hand_over(
        self, plan: TransferPlan, turns: Sequence[Turn], given: Iterator[tuple[Key, Sequence[tuple[str, torch.Tensor]]]]
    ) -> SendReport:
        board, staging, membership = self._board, self._staging, self._membership
        assert board is not None
        assert staging is not None
        assert membership is not None
        buckets = [plan.buckets[turn.source][turn.index] for turn in turns]
        where = places([bucket.nbytes for bucket in buckets], staging.nbytes, ENTRIES)
        begun = time.time()
        say_ready(board, plan, self._transfers)
        await_ready(board, plan, self._transfers, membership)
        started, ready = time.perf_counter(), time.time()
        passing = _Passing(plan, turns, board, self._link, staging, membership, self.rank)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with on_stream(self._stream):
            mine = _Mine(given)
            for turn, bucket, place in zip(turns, buckets, where, strict=True):
                passing.until_taken(place.taken_before)
                mine.advance(turn.after)
                buffer = staging.ring[place.offset : place.offset + bucket.nbytes]
                if plan.ranks[turn.source] == self.rank:
                    pack(buffer, bucket, mine.take(bucket))
                passing.hand_round(turn, place.offset, buffer)
            mine.end()
            passing.until_taken(len(turns))
        self._transfers += 1
        nbytes = sum(bucket.nbytes for bucket in buckets)
        return SendReport(nbytes, len(turns), ready - begun, time.perf_counter() - started, begun, time.time())

    def _give_up(self, error: BaseException) -> None:
        board, link = self._board, self._link
        self._link = self._board = None
        if board is not None:
            board.store.compare_set("failed", "", f"{self.name}: {type(error).__name__}: {error}")
        if link is not None:
            link.abort()


class _Mine:
    """This rank's own tensors, exported as far as the turns ask for."""

    def __init__(self, given: Iterator[tuple[Key, Sequence[tuple[str, torch.Tensor]]]]) -> None:
        self._given = given
        self._next = next(given, None)
        self._waiting: deque[tuple[str, torch.Tensor]] = deque()

    def advance(self, after: Key) -> None:
        """Export what comes no later than this key."""
        while self._next is not None and self._next[0] <= after:
            self._waiting.extend(self._next[1])
            self._next = next(self._given, None)

    def take(self, bucket: Bucket) -> list[torch.Tensor]:
        """A bucket's tensors."""
        tensors = []
        for piece in bucket.pieces:
            name, tensor = self._waiting.popleft() if self._waiting else ("nothing", None)
            if name != piece.tensor.name or tensor is None:
                raise ValueError(f"expected tensor {piece.tensor.name} next, as planned, got {name}")
            tensors.append(tensor)
        return tensors

    def end(self) -> None:
        """Export the rest, of which nothing is this rank's to hand over."""
        while self._next is not None:
            self._waiting.extend(self._next[1])
            self._next = next(self._given, None)
        if self._waiting:
            raise ValueError(f"expected no tensor after the last planned one, got {self._waiting[0][0]}")


class _Passing:
    """Buckets of one transfer on their way to the engine: handed round, published, taken, always in their order."""

    def __init__(
        self,
        plan: TransferPlan,
        turns: Sequence[Turn],
        board: Board,
        link: Link | None,
        staging: Staging,
        membership: Membership,
        rank: int,
    ) -> None:
        self._plan, self._turns, self._board, self._link, self._staging = plan, turns, board, link, staging
        self._first = staging.written  # buckets of transfers before
        self._published = 0
        self._under_way: deque[_UnderWay] = deque()
        self._limit_s = membership.limits.bucket_s
        engine = receiver_name(rank, 0)
        self._engine = engine if engine in membership.receivers else None
        self._peers = ", ".join(name for r, name in enumerate(membership.sources) if r != rank)

    def hand_round(self, turn: Turn, offset: int, buffer: torch.Tensor) -> None:
        """Begin to broadcast a bucket from its source to all ranks."""
        work = _Packed(buffer.device) if self._link is None else self._link.broadcast(buffer, self._root(turn))
        self._under_way.append(_UnderWay(Entry(turn.source, turn.index, offset), work))
        self._publish()

    def until_taken(self, number: int) -> None:
        """Wait until the engine has taken the first so many buckets."""
        while self._published < number:
            self._board.until(
                lambda: self._under_way[0].work.is_completed(),
                _PEERS * self._limit_s,
                lambda: f"{self._peers} at {self._named(self._published)}",
                spins=self._spins,
            )
            self._publish()
        if self._engine is None:
            return
        while (taken := self._taken_so_far()) < number:
            self._board.until(
                lambda: self._taken_so_far() > taken,
                self._limit_s,
                lambda: f"{self._engine} to take {self._named(taken)}",
                spins=self._spins,
            )

    def _taken_so_far(self) -> int:
        self._publish()
        return self._staging.taken - self._first

    def _publish(self) -> None:
        """Tell the engine of buckets that its device has."""
        while self._under_way and self._under_way[0].work.is_completed():
            arrived = self._under_way.popleft()
            if self._link is not None:
                self._link.wait(arrived.work, self._limit_s, self._named(self._published))  # raises what it met
            self._staging.publish(self._first + self._published, arrived.entry)
            self._published += 1

    def _root(self, turn: Turn) -> int:
        return self._plan.ranks[turn.source]

    def _named(self, number: int) -> str:
        turn = self._turns[number]
        return f"bucket {number} of {len(self._turns)}, from {source_name(self._root(turn))}"

    @property
    def _spins(self) -> int:
        return 0 if self._staging.ring.device.type == "cpu" else 2000


class _Packed:
    """Without peers, a bucket is there when it has been packed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()
