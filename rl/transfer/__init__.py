"""Weights straight from trainer ranks to engines: a plan, communicators of their own, senders and receivers.

plan = make_plan(...)                       # what travels in which bucket, from what the ranks announce
membership = rendezvous.generation(...)     # who takes part; made again when an engine is added or has died
sender.join(membership); receiver.join(membership)
sender.send(plan, weights); receiver.receive(plan)      # the pairs that ``rl.rollout.weights.checked`` takes
"""

from __future__ import annotations

from typing import Literal

Path = Literal["ipc", "nccl", "store", "gloo"]


def choose_path(colocated: bool, device: str) -> Path:
    """How weights should travel.

    Args:
        colocated: engine and trainer rank are processes on the same device, in turns.
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        ``"ipc"``: engines read the trainer's device memory (colocated on GPUs). ``"nccl"``: broadcast between GPUs.
        ``"store"``: Ray's object store, which is shared memory on one host (CPU, the default there). ``"gloo"`` is
        never chosen by itself: it is for hosts that share no memory, and for tests.

    Raises:
        ValueError: another device.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"expected device 'cpu' or 'cuda', got {device!r}")
    if device == "cpu":
        return "store"
    return "ipc" if colocated else "nccl"
