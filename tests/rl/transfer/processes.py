"""Members of a transfer as plain processes, one of which may be killed."""

from __future__ import annotations

import multiprocessing
import queue
import time
from typing import Any

from rl.transfer.links import Membership

_LIMIT_S = 60.0


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
    import torch

    from tests.rl.transfer import test_transfer

    torch.set_num_threads(1)
    answers.put((rank, test_transfer.member(membership, faults, rank)))
