"""Communicators of weight transfer: one per source, made of it and all receivers, apart from every other group.

An engine's vLLM has a default group of its own, and so has the trainer: nothing here touches ``torch.distributed``'s
default group. Members meet in a :class:`Rendezvous`, a key-value store that the driver serves, so that it survives
each of them. Every set of members is a *generation*; when an engine comes or dies, the next generation replaces it.

Every wait has a limit, and who failed is written to the store, so that the others stop at once with its name instead
of waiting for their own limits.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rl.transfer.plan import TransferPlan

_LOOK_S = 0.05  # how often a waiting member asks whether another one has failed
_NAP_S = 0.0001
_POLLS = 2000  # looks without a nap: a bucket between GPUs takes less than a millisecond
_GRACE_S = 1.0  # for the reason of a broken connection to be written by whoever broke it


class TransferError(RuntimeError):
    """A transfer broke off: what was received is not whole. The message names who failed, and at what."""


class TransferTimeout(TransferError, TimeoutError):
    """A member did not do its part within the limit."""


@dataclass(frozen=True)
class Limits:
    """Seconds to wait.

    Attributes:
        join_s: for all members to come to a new generation.
        start_s: for all members to be ready for a transfer, the draining of engines included.
        bucket_s: for a bucket, once all are ready.
    """

    join_s: float = 120.0
    start_s: float = 600.0
    bucket_s: float = 60.0


@dataclass(frozen=True)
class Membership:
    """One generation.

    Attributes:
        generation: number; store keys and communicators of different generations never meet.
        address: ``host:port`` of the driver's store.
        sources, receivers: names for errors, e.g. ``"trainer rank 0"`` and ``"engine 1 rank 0"``; a communicator has
            its source at rank 0 and the receivers, in this order, after it.
        backend: ``"gloo"`` or ``"nccl"``.
        limits: of every wait.
        channels: most NCCL channels (thread blocks) of a communicator; 0 leaves the choice to NCCL.
    """

    generation: int
    address: str
    sources: tuple[str, ...]
    receivers: tuple[str, ...]
    backend: str = "gloo"
    limits: Limits = field(default_factory=Limits)
    channels: int = 0

    @property
    def members(self) -> tuple[str, ...]:
        return self.sources + self.receivers


class Rendezvous:
    """The store and the count of generations; lives in the driver."""

    def __init__(self, host: str | None = None) -> None:
        self.host = host or socket.gethostbyname(socket.gethostname())
        self.store = dist.TCPStore(self.host, 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        self._generation = 0

    def generation(
        self,
        sources: Sequence[str],
        receivers: Sequence[str],
        backend: str = "gloo",
        limits: Limits | None = None,
        channels: int = 0,
    ) -> Membership:
        """A new generation of these members; see :class:`Membership`.

        Raises:
            ValueError: no source, no receiver, or a name twice.
        """
        names = [*sources, *receivers]
        if not sources or not receivers or len(set(names)) != len(names):
            raise ValueError(
                f"expected at least one source and one receiver, all names different, got sources {list(sources)} and "
                f"receivers {list(receivers)}"
            )
        self._generation += 1
        address = f"{self.host}:{self.store.port}"
        return Membership(
            self._generation, address, tuple(sources), tuple(receivers), backend, limits or Limits(), channels
        )


class Board:
    """What members of a generation tell each other through the store.

    Raises:
        TransferTimeout: the driver's store does not answer.
    """

    def __init__(self, membership: Membership, name: str) -> None:
        host, port = membership.address.rsplit(":", 1)
        self.name = name
        self.what = f"weight transfer, generation {membership.generation}: {name}"
        seconds = membership.limits.join_s
        try:
            store = dist.TCPStore(host, int(port), None, False, timedelta(seconds=seconds), wait_for_workers=False)
        except (RuntimeError, dist.DistError) as error:
            raise TransferTimeout(
                f"{self.what}: found no store at {membership.address} within {seconds:g} s: is the driver alive?"
            ) from error
        self.store = dist.PrefixStore(f"transfer/{membership.generation}", store)

    def tell(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def wait_for(self, keys: Mapping[str, str], limit_s: float, what: str) -> dict[str, str]:
        """Values of keys, each told by the member it maps to.

        Raises:
            TransferTimeout: naming the members that were waited for.
            TransferError: a member has failed.
        """
        deadline = time.monotonic() + limit_s
        look = time.monotonic() + _LOOK_S
        waiting = dict(keys)
        while waiting:
            for key in [key for key in waiting if self.store.check([key])]:
                del waiting[key]
            now = time.monotonic()
            if waiting and now > look:
                self.raise_failure()
                look = now + _LOOK_S
            if waiting and now > deadline:
                self.fail(
                    TransferTimeout(f"{self.what} waited {limit_s:g} s for {', '.join(waiting.values())} to {what}")
                )
            if waiting:
                time.sleep(_NAP_S)
        return {key: self.store.get(key).decode() for key in keys}

    def until(self, done: Callable[[], bool], limit_s: float, what: Callable[[], str], *, spins: int = _POLLS) -> None:
        """Wait for something that is no key of the store.

        Args:
            done: whether it has come; called again and again.
            limit_s: of the wait, seconds.
            what: says who was waited for, and to do what.
            spins: looks without a nap.

        Raises:
            TransferTimeout: it did not come.
            TransferError: a member has failed.
        """
        now = time.monotonic()
        deadline, look, looks = now + limit_s, now + _LOOK_S, 0
        while not done():
            looks += 1
            if looks > spins:
                time.sleep(_NAP_S)
            now = time.monotonic()
            if now > look:
                self.raise_failure()
                look = now + _LOOK_S
            if now > deadline:
                self.fail(TransferTimeout(f"{self.what} waited {limit_s:g} s for {what()}"))

    def raise_failure(self) -> None:
        """Raise if another member has failed."""
        if self.store.check(["failed"]):
            reason = self.store.get("failed").decode()
            raise TransferError(f"{self.what} stopped because the transfer failed elsewhere: {reason}")

    def fail(self, error: TransferError) -> None:
        """Let the others know, then raise; the first reason is kept."""
        self.store.compare_set("failed", "", str(error))
        raise error


class Link:
    """The communicator of one source.

    Args:
        membership: the generation.
        source: index of the source.
        rank: 0 for the source, 1 + receiver's index for a receiver.
        board: of this member.
        device: where buffers are.
    """

    def __init__(self, membership: Membership, source: int, rank: int, board: Board, device: torch.device) -> None:
        self.source = source
        self.membership = membership
        self.board = board
        self.device = device
        world = 1 + len(membership.receivers)
        store = dist.PrefixStore(f"link/{source}", board.store)
        try:
            self.group = _group(membership, store, rank, world)
            # NCCL connects at the first collective.
            word = torch.zeros(1, dtype=torch.uint8, device=device)
            self.wait(self.broadcast(word), membership.limits.join_s, "the connection")
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, TransferError):
                raise
            board.fail(TransferError(f"{board.what} could not connect to {self._who()}: {error}"))

    def _who(self) -> str:
        others = [self.membership.sources[self.source], *self.membership.receivers]
        return ", ".join(name for name in others if name != self.board.name)

    def broadcast(self, buffer: torch.Tensor, root: int = 0) -> Any:
        """Start to send (root, the source) or fill (others) a uint8 buffer; returns the work to :meth:`wait` for."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = root, 0, True
        return self.group.broadcast([buffer], options)

    def wait(self, work: Any, limit_s: float, what: str) -> None:
        """Wait until a broadcast is done.

        Raises:
            TransferTimeout: not within the limit. The communicator is given up.
            TransferError: a member's connection broke, or a member has failed.
        """
        deadline = time.monotonic() + limit_s
        look = time.monotonic() + _LOOK_S
        polls = 0
        while not work.is_completed():
            polls += 1
            if polls > _POLLS or self.device.type == "cpu":
                time.sleep(_NAP_S)
            now = time.monotonic()
            if now > look:
                self._stop_if_failed()
                look = now + _LOOK_S
            if now > deadline:
                self.abort()
                self.board.fail(TransferTimeout(f"{self.board.what} waited {limit_s:g} s for {self._who()} at {what}"))
        try:
            work.wait()  # it has ended: raises what it met; on GPUs, orders the current stream behind it
        except RuntimeError as error:
            self._broken(error, what)

    def _stop_if_failed(self) -> None:
        try:
            self.board.raise_failure()
        except TransferError:
            self.abort()
            raise

    def _broken(self, error: RuntimeError, what: str) -> None:
        """A connection broke: because its process ended, or because its process had a reason, which is better."""
        self.abort()
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline:
            self.board.raise_failure()
            time.sleep(_LOOK_S)
        reason = str(error).strip().splitlines()[0].split(" This is typically")[0]
        self.board.fail(
            TransferError(f"{self.board.what} lost a connection to one of {self._who()} at {what}: {reason}")
        )

    def abort(self) -> None:
        """Give the communicator up; what hangs in it ends, or, with gloo, is not waited for."""
        self.group.abort()
        if self.membership.backend == "gloo":
            # Operations that wait for a peer go on to their limit, and taking the group down would wait for them with
            # Python's lock held: somebody keeps it until they have ended.
            keeper = threading.Timer(_longest_s(self.membership.limits) + _GRACE_S, _forget, [self.group])
            keeper.daemon = True
            keeper.start()

    def close(self) -> None:
        """End the communicator in good order."""
        if hasattr(self.group, "shutdown"):
            self.group.shutdown()


def join(membership: Membership, name: str, device: torch.device) -> tuple[Board, list[Link]]:
    """Join a generation as one of its members: a source gets its link, a receiver one for each source.

    Raises:
        ValueError: no such member.
        TransferTimeout: naming the members that did not come.
    """
    if name not in membership.members:
        raise ValueError(f"expected one of {', '.join(membership.members)}, got {name!r}")
    board = Board(membership, name)
    board.tell(f"here/{name}", "1")
    board.wait_for({f"here/{m}": m for m in membership.members}, membership.limits.join_s, "join")
    if name in membership.sources:
        return board, [Link(membership, membership.sources.index(name), 0, board, device)]
    rank = 1 + membership.receivers.index(name)
    return board, [Link(membership, s, rank, board, device) for s in range(len(membership.sources))]


def source_name(rank: int) -> str:
    """What a trainer rank is called in memberships."""
    return f"trainer rank {rank}"


def say_ready(board: Board, plan: TransferPlan, number: int) -> None:
    """Tell all members that this one is ready for a transfer, and of which plan."""
    board.tell(f"ready/{number}/{board.name}", plan.digest)


def await_ready(board: Board, plan: TransferPlan, number: int, membership: Membership) -> None:
    """Wait for all members to be ready for the same plan.

    Raises:
        TransferTimeout: naming who was not.
        TransferError: a member has another plan.
    """
    keys = {f"ready/{number}/{m}": m for m in membership.members}
    told = board.wait_for(keys, membership.limits.start_s, f"be ready for transfer {number}")
    wrong = [keys[key] for key, digest in told.items() if digest != plan.digest]
    if wrong:
        board.fail(TransferError(f"{board.what} has another plan than {', '.join(wrong)}: send all the same one"))


def _longest_s(limits: Limits) -> float:
    """Limit of any operation of a communicator."""
    return max(limits.join_s, limits.bucket_s)


def _forget(kept: Any) -> None:
    """Somebody kept it until now."""


def _group(membership: Membership, store: Any, rank: int, world: int) -> Any:
    limits = membership.limits
    longest = timedelta(seconds=_longest_s(limits))
    if membership.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, world, longest)
    if membership.backend != "nccl":
        raise ValueError(f"expected backend 'gloo' or 'nccl', got {membership.backend!r}")
    options = dist.ProcessGroupNCCL.Options()
    # Ours is the limit that counts. NCCL's comes later, and must not end the process: an engine survives a torn
    # update, and a trainer the death of an engine.
    options._timeout = longest + timedelta(seconds=60)
    if membership.channels:
        options.config.max_ctas = membership.channels
    with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):
        return dist.ProcessGroupNCCL(store, rank, world, options)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
