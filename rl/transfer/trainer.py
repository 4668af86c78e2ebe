"""A Megatron rank's part in direct transfers.

sender = ModelSender(model, rank)
holdings = sender.announce("bfloat16")          # to the driver, which makes plan and membership from all ranks'
sender.join(membership)
report = sender.send(plan)                      # returns when all engines have all
sender.start(plan); train(...); sender.finish(60.0)     # from a copy, so that training may change weights at once

or, where engines share GPUs with trainer ranks:

handles = sender.join_staged(membership, staging_bytes(plan))   # to the engine beside this rank
report = sender.hand_over(plan, turns)                          # returns when that engine has all
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rl.models.builder import BuiltModel
from rl.models.weights import export_by_parameter, export_weights, holdings
from rl.transfer.links import Membership, TransferError, source_name
from rl.transfer.plan import Holding, TransferPlan
from rl.transfer.sender import Sender, SendReport, Snapshot
from rl.transfer.staged_sender import StagedSender
from rl.transfer.staging import StagingHandles
from rl.transfer.turns import Turn


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
        self._staged: StagedSender | None = None
        self._holdings: list[Holding] = []
        # A thread's device is the first one until it says otherwise, and using it makes a context there.
        on = (torch.cuda.set_device, (model.device,)) if torch.device(model.device).type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "weight-transfer", *on)
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

    def join_staged(self, membership: Membership, nbytes: int) -> StagingHandles:
        """Join as one of all ranks, with so much staging memory; see :meth:`StagedSender.join`."""
        if self._staged is None:
            self._staged = StagedSender(self.rank, self.sender.device)
        return self._staged.join(membership, nbytes)

    @torch.no_grad()
    def hand_over(self, plan: TransferPlan, turns: Sequence[Turn]) -> SendReport:
        """Hand everything to the engine on the same GPU; a collective of all trainer ranks.

        Raises:
            TransferError: see :meth:`StagedSender.hand_over`.
        """
        if self._staged is None:
            raise TransferError(f"{self.sender.name} is in no generation: join one first")
        self.settle()
        return self._staged.hand_over(plan, turns, export_by_parameter(self.model, self._names(plan)))

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
        if self._staged is not None:
            self._staged.close()

    def _pairs(self, plan: TransferPlan) -> Iterator[tuple[str, torch.Tensor]]:
        self.settle()
        return export_weights(self.model, names=self._names(plan))

    def _names(self, plan: TransferPlan) -> set[str]:
        """Tensors that this rank hands over or helps to gather."""
        leader = {name: rank for source, rank in enumerate(plan.ranks) for name in plan.names(source)}
        mine = self._holdings or self.announce(next(iter(plan.buckets[0][0].pieces)).tensor.dtype)
        return {t.name for h in mine for t in h.tensors if leader.get(t.name) == h.leader}
