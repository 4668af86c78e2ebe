"""Members of a transfer, sound or not, and plain processes to run them in; quick to import: no Megatron."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from rl.rollout.weights import WeightMismatch, checked
from rl.transfer.links import Membership, TransferError, source_name
from rl.transfer.plan import TensorSpec, make_plan
from rl.transfer.receiver import Receiver, receiver_names
from rl.transfer.sender import Sender

CPU = torch.device("cpu")
_LIMIT_S = 60.0


def specs(rank, n=24):
    return [TensorSpec(f"t{rank}.{i}", (64, 512), "float32") for i in range(n)]


PLAN = make_plan({0: specs(0), 2: specs(2)}, 600_000)
RECEIVERS = receiver_names([0, 3], 1)
SOURCES = tuple(source_name(r) for r in PLAN.ranks)


def member(membership, faults, rank=None):
    """Sources are ranks 0 and 1, receivers ranks 2 and 3. ``faults``: {rank: what it does half-way}.

    Returns ``(name, error or None, its message, tensors taken, seconds)``.
    """
    rank = dist.get_rank() if rank is None else rank
    name = membership.members[rank]
    fault = faults.get(rank)
    started = time.monotonic()
    taken = 0

    def half_way(i):
        if i == 10 and fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 10 and fault == "stalls":
            time.sleep(4.5)
        if i == 10 and fault == "raises":
            raise RuntimeError("a layer of another kind")

    try:
        if fault == "stays away":
            return name, None, "", 0, 0.0
        if rank < 2:
            sender = Sender(name, CPU)
            sender.join(membership)

            def pairs():
                for i, tensor_name in enumerate(PLAN.names(rank)):
                    half_way(i)
                    yield tensor_name, torch.full((64, 512), float(i))

            sender.send(PLAN, rank, pairs())
        else:
            receiver = Receiver(name, CPU)
            receiver.join(membership)
            plan = PLAN if fault != "other plan" else make_plan({0: specs(0), 2: specs(2)}, 900_000)
            for tensor_name, tensor in checked(receiver.receive(plan), plan.manifest):
                assert (tensor == float(tensor_name.split(".")[1])).all()
                half_way(taken)
                taken += 1
    except (TransferError, RuntimeError, WeightMismatch) as error:
        return name, type(error).__name__, str(error), taken, time.monotonic() - started
    return name, None, "", taken, time.monotonic() - started


def run_members(membership: Membership, faults: dict[int, str]) -> dict[int, Any]:
    """Answers by rank of ``test_transfer.member``; ranks that were killed have none."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_member, args=(membership, rank, faults, answers), daemon=True)
        for rank in range(len(membership.members))
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + _LIMIT_S
    expected = len(processes) - sum(fault == "dies" for fault in faults.values())
    while len(found) < expected and time.monotonic() < deadline:
        try:
            rank, answer = answers.get(timeout=1.0)
        except queue.Empty:
            continue
        found[rank] = answer
    for process in processes:
        process.kill()
        process.join(10)
    return found


def _member(membership: Membership, rank: int, faults: dict[int, str], answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put((rank, member(membership, faults, rank)))
