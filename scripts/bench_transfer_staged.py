"""``scripts/bench_transfer.py --staged``: trainer ranks and engines that share GPUs, in pairs of processes.

Process i is trainer rank i, process pairs + i the engine beside it, both on device i. Measured, in one run:

1. *link*: one large buffer broadcast among the trainer ranks, and copied within a device. The bound is bytes / the
   smaller rate: every trainer rank takes in nearly all bytes, and every engine copies all of them once.
2. *signal*: a bucket announced and acknowledged between the two processes of a pair, without its bytes: by the shared
   page that staged transfers use, and by the driver's store.
3. *staged*: from the moment all members are ready until the last engine has copied the last tensor into place.
4. a tiny model, which is all latency.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from rl.transfer.links import Board, Limits, Membership, Rendezvous, source_name
from rl.transfer.plan import TensorSpec, make_plan
from rl.transfer.receiver import receiver_names
from rl.transfer.staged_receiver import StagedReceiver
from rl.transfer.staged_sender import StagedSender
from rl.transfer.staging import Entry, StagingHandles
from rl.transfer.turns import Key, Turn, staging_bytes, turns_of
from scripts.bench_transfer_rank import Member, Timed, serve_member, sizes_of

MIB = 2**20
_SIGNALS = 300


class StagedMember(Member):
    """One process of a pair; each method is a command of the parent."""

    def __init__(self, rank: int, gpu: bool, pairs: int) -> None:
        self.trains = rank < pairs
        if self.trains:
            os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as in trainer ranks
        super().__init__(rank % pairs, gpu)
        self.sender = StagedSender(self.rank, self.device)
        self.receiver = StagedReceiver(receiver_names([self.rank], 1)[0], self.device)

    def join_staged(self, membership: Membership, nbytes: int) -> StagingHandles:
        self.board = Board(membership, f"bench of {self.sender.name}")
        return self.sender.join(membership, nbytes)

    def open_staged(self, membership: Membership, handles: StagingHandles) -> None:
        self.board = Board(membership, f"bench of {self.receiver.name}")
        self.receiver.join(membership, handles)

    def staged(self, plan: Any, turns: tuple[Turn, ...], keys: dict[str, Key]) -> Timed:
        """One transfer: hand over, or receive and copy into place."""
        self._settle()
        called = time.time()
        if self.trains:
            report = self.sender.hand_over(plan, turns, [(keys[n], [(n, t)]) for n, t in self.tensors.items()])
            return Timed(called, report.started + report.ready_s, time.time())
        for pairs in self.receiver.receive_buckets(plan):
            torch._foreach_copy_([self.tensors[name] for name, _ in pairs], [tensor for _, tensor in pairs])
        self._settle()
        return Timed(called, 0.0, time.time())

    def broadcast(self, nbytes: int) -> Timed:
        """One large buffer from the first trainer rank to the others."""
        link = self.sender._link
        if not self.trains or link is None:
            return Timed(0.0, 0.0, 0.0)
        buffer = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        link.wait(link.broadcast(buffer[:1]), 60.0, "a barrier")
        self._settle()
        called = time.time()
        link.wait(link.broadcast(buffer), 60.0, "the bare broadcast")
        self._settle()
        return Timed(called, called, time.time())

    def copy_here(self, nbytes: int) -> float:
        """Bytes a second of a copy within the device; all engines at the same time."""
        source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        best = float("inf")
        for _ in range(4):
            self._settle()
            started = time.perf_counter()
            target.copy_(source)
            self._settle()
            best = min(best, time.perf_counter() - started)
        return nbytes / best

    def signals(self, how: str) -> float:
        """Seconds of a signal to the engine and its answer, by ``page`` or ``store``; median."""
        mine, other = ("t", "e") if self.trains else ("e", "t")
        name = f"process of pair {self.rank}"
        memory = self.sender._staging if self.trains else self.receiver._staging
        assert memory is not None
        first, spins = memory.taken, 2000 if self.device.type == "cuda" else 0  # as transfers wait
        spans = []
        self.board.tell(f"begin/{mine}/{self.rank}/{how}", "1")
        self.board.wait_for({f"begin/{other}/{self.rank}/{how}": name}, 60.0, "begin")
        for i in range(_SIGNALS):
            started = time.perf_counter()
            if how == "store":
                if self.trains:
                    self.board.tell(f"{self.rank}/t/{i}", "1")
                self.board.wait_for({f"{self.rank}/{other}/{i}": name}, 60.0, "signal")
                if not self.trains:
                    self.board.tell(f"{self.rank}/e/{i}", "1")
            elif self.trains:
                self.sender._staging.publish(first + i, Entry(0, 0, 0))
                self.board.until(lambda i=i: memory.taken > first + i, 60.0, lambda: name, spins=spins)
            else:
                self.board.until(lambda i=i: memory.written > first + i, 60.0, lambda: name, spins=spins)
                self.receiver._staging.take(first + i + 1)
            spans.append(time.perf_counter() - started)
        return statistics.median(spans)


def serve_pair(connection: Connection, rank: int, gpu: bool, pairs: int) -> None:
    """Take commands until the parent goes."""
    serve_member(connection, StagedMember(rank, gpu, pairs))


def measure(
    processes: Any,
    pairs: int,
    specs: list[TensorSpec],
    buckets: list[int],
    *,
    gpu: bool,
    repeats: int,
    share: Callable[[list[TensorSpec], int], dict[int, list[TensorSpec]]],
    add: Callable[..., None],
) -> None:
    """All rows of one number of pairs.

    Args:
        processes: 2 * pairs of them, see :func:`serve_pair`.
        pairs: of trainer rank and engine.
        specs: of the model.
        buckets: sizes of the sweep, MiB.
        gpu: NCCL among trainer ranks, staging memory by CUDA IPC.
        repeats: timed ones, after one that warms up.
        share: tensors by source.
        add: takes the fields of a row of ``bench_transfer``.
    """
    layout, count = f"{pairs}+{pairs}", 2 * pairs
    rendezvous = Rendezvous("127.0.0.1")

    def join(nbytes: int) -> None:
        sources = [source_name(r) for r in range(pairs)]
        membership = rendezvous.generation(
            sources, receiver_names(list(range(pairs)), 1), "nccl" if gpu else "gloo", Limits(60.0, 60.0, 60.0)
        )
        handles = processes.some("join_staged", dict.fromkeys(range(pairs), (membership, nbytes)))
        processes.some("open_staged", {pairs + r: (membership, handles[r]) for r in range(pairs)})

    join(4 * MIB)
    large = 1024 * MIB if gpu else sum(spec.nbytes for spec in specs)
    rates = {}
    if pairs > 1:
        spans = []
        for _ in range(repeats + 1):
            told = processes.all("broadcast", [(large,)] * pairs)
            spans.append(max(t.ended for t in told) - min(t.begun for t in told))
        rates["broadcast"] = large / statistics.median(spans[1:])  # the first one warms up
    rates["copy within a device"] = min(
        processes.some("copy_here", {pairs + r: (large,) for r in range(pairs)}).values()
    )
    for how, rate in rates.items():
        add(layout, "link", how, large / 2**30, 1e3 * large / rate, 0.0, rate / 1e9, 0.0, 0.0, None)
    for how in ("page", "store"):
        seconds = max(processes.all("signals", [(how,)] * count))
        add(layout, "signal", how, 0.0, 1e3 * seconds, 0.0, 0.0, 0.0, 0.0, None)
    for model, mib, note in [*((specs, mib, "") for mib in buckets), (sizes_of(0.0005, tiny=True), 64, ", tiny model")]:
        plan = make_plan(share(model, pairs), mib * MIB)
        keys = {spec.name: (i, 0, 0) for i, spec in enumerate(model)}
        turns = turns_of(plan, keys)
        join(staging_bytes(plan))
        shares = share(model, pairs)
        processes.all("hold", [(shares[r], True) for r in range(pairs)] + [(model, False)] * pairs)
        spans, waits = [], []
        for _ in range(repeats + 1):
            told = processes.all("staged", [(plan, turns, keys)] * count)
            begun = min(t.begun for t in told[:pairs])
            spans.append(max(t.ended for t in told) - begun)
            waits.append(begun - max(t.called for t in told))
        sums = processes.all("checksums", [()] * count)
        sent = {name: value for told in sums[:pairs] for name, value in told.items()}
        equal = len(sent) == len(model) and all(got == sent for got in sums[pairs:])
        ms, ready = 1e3 * statistics.median(spans[1:]), 1e3 * statistics.median(waits[1:])
        bound = 1e3 * plan.nbytes / min(rates.values())
        variant = f"{mib} MiB{note}"
        add(layout, "staged", variant, plan.nbytes / 2**30, ms, ready, plan.nbytes / ms / 1e6, bound, bound / ms, equal)
    gc.collect()
