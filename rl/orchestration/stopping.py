"""A run that is asked to stop does so between two iterations, with everything saved.

SIGUSR1 asks (schedulers send it some minutes before a job's time is up). The iteration that runs is finished, with its
evaluation; then a checkpoint is written and the command ends with code 75, and `--resume` goes on where it stopped.
SIGTERM and Ctrl-C end a run at once, see ``rl.orchestration.setup``.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later


@dataclass
class StopRequest:
    """Whether somebody asked."""

    requested: bool = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGUSR1 as a request from here on; the handler before comes back at the end."""
    request = StopRequest()

    def ask(signum: int, frame: FrameType | None) -> None:
        if not request.requested:
            print("asked to stop: after this iteration, with a checkpoint", file=sys.stderr, flush=True)
        request.requested = True

    before = signal.signal(signal.SIGUSR1, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGUSR1, before)
