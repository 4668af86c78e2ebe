"""Weights straight from trainer ranks to engines: a plan, communicators of their own, senders and receivers.

plan = make_plan(...)                       # what travels in which bucket, from what the ranks announce
membership = rendezvous.generation(...)     # who takes part; made again when an engine is added or has died
sender.join(membership); receiver.join(membership)
sender.send(plan, weights); receiver.receive(plan)      # the pairs that ``rl.rollout.weights.checked`` takes
"""

from __future__ import annotations

from typing import Literal

Path = Literal["ipc", "nccl", "store", "gloo"]
