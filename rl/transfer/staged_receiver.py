"""The engine's side of staged transfers: buckets from the memory that the trainer rank on the same GPU fills.

A bucket is copied within the device before its tensors are handed out, since vLLM holds a layer's tensors until the
layer is complete; then the trainer rank may use its place again. Memory: the copies whose tensors the caller still
holds, and one more; never the whole model.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from rl.transfer.buffers import new_buffer, on_stream, views
from rl.transfer.links import Board, Membership, TransferError, await_ready, say_ready, source_name
from rl.transfer.plan import TransferPlan
from rl.transfer.receiver import BucketReceiver
from rl.transfer.staging import OpenedStaging, StagingHandles

_RANK = 2.0  # of the limit of a bucket: the trainer rank waits for others, and must give up first, naming them


class StagedReceiver(BucketReceiver):
    """The only rank of an engine that shares its device with a trainer rank.

    Args:
        name: its name in memberships, see ``receiver_name``.
        device: where its weights are.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._board: Board | None = None
        self._membership: Membership | None = None
        self._staging: OpenedStaging | None = None
        self._transfers = 0

    def join(self, membership: Membership, handles: StagingHandles) -> None:
        """Leave the generation before and open the memory of this one; waits for nobody.

        Raises:
            ValueError: no such member.
            TransferError: the memory cannot be opened.
        """
        self.close()
        if self.name not in membership.receivers:
            raise ValueError(f"expected one of {', '.join(membership.receivers)}, got {self.name!r}")
        self._staging = handles.open(self.device)
        self._board, self._membership = Board(membership, self.name), membership
        self._transfers = 0

    def close(self) -> None:
        if self._staging is not None:
            self._staging.close()
        self._staging = self._board = self._membership = None

    def receive_buckets(self, plan: TransferPlan) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
        """All tensors of a plan, bucket by bucket; the caller may keep them.

        Raises:
            TransferError: it broke off, naming who failed; what came is not whole. The generation is of no more use:
                join another. The same happens to the other members when the caller stops half-way.
        """
        board, staging, membership = self._board, self._staging, self._membership
        if board is None or staging is None or membership is None:
            raise TransferError(f"{self.name} is in no generation: join one first, and after every failure again")
        total = sum(map(len, plan.buckets))
        first, who = staging.taken, source_name(staging.rank)
        try:
            say_ready(board, plan, self._transfers)
            await_ready(board, plan, self._transfers, membership)
            for number in range(total):
                self._until_written(board, staging, first + number, membership, f"{number} of {total}")
                entry = staging.entry(first + number)
                if not (entry.source < len(plan.buckets) and entry.index < len(plan.buckets[entry.source])):
                    raise TransferError(f"{self.name} found no bucket of the plan in the memory of {who}: {entry}")
                bucket = plan.buckets[entry.source][entry.index]
                with on_stream(self._stream):
                    buffer = new_buffer(bucket, self.device)
                    buffer.copy_(staging.ring[entry.offset : entry.offset + bucket.nbytes])
                if self._stream is not None:
                    self._stream.synchronize()  # a device copy: a fraction of a millisecond
                    buffer.record_stream(torch.cuda.current_stream(self.device))
                staging.take(first + number + 1)
                yield views(buffer, bucket)
                del buffer
        except BaseException as error:
            self._give_up(error)
            raise
        self._transfers += 1

    def _until_written(
        self, board: Board, staging: OpenedStaging, number: int, membership: Membership, named: str
    ) -> None:
        board.until(
            lambda: staging.written > number,
            _RANK * membership.limits.bucket_s,
            lambda: f"{source_name(staging.rank)} to write bucket {named}",
            spins=0 if self.device.type == "cpu" else 2000,
        )

    def _give_up(self, error: BaseException) -> None:
        board, self._board = self._board, None
        if board is not None:
            why = "its caller stopped half-way" if isinstance(error, GeneratorExit) else f"{error}"
            board.store.compare_set("failed", "", f"{self.name}: {why}")
