"""Forwards of balanced layers until their backward is over, and the order in which their backwards will come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_ultraep.runtime.planning import Planned

if TYPE_CHECKING:
    from megatron_ultraep.runtime.layer import LayerBalancer


@dataclass
class Call:
    """One forward of one layer, until its backward is over."""

    planned: Planned
    trained: bool = True  # home parameters get gradients
    placed: bool = False  # weights have been on their way to slots for it
    idle: bool = False  # the host knows that no rank has a replica: nothing travels
    key: object = None  # of its micro-batch, where weights are placed ahead of backward
    # Identifies what lies in the slots; compared by identity.
    token: object = field(default_factory=object)


class Backwards:
    """Calls whose backward is still to come, so that the weights of the next one can be placed ahead of it.

    Backward goes through the layers of a micro-batch in the reverse order of forward. Where it does not (chunks of an
    interleaved pipeline) weights are placed for a call that is not next, and once more when it is.
    """

    MOST_KEYS = 1024
    """Micro-batches at a time: of those whose backward never comes the oldest are forgotten."""

    def __init__(self) -> None:
        self._calls: dict[object, list[tuple[LayerBalancer, Call]]] = {}

    def add(self, key: object, layer: LayerBalancer, call: Call) -> None:
        """Note a call of a micro-batch whose forward runs now."""
        if len(self._calls) > self.MOST_KEYS:
            del self._calls[next(iter(self._calls))]
        self._calls.setdefault(key, []).append((layer, call))
        call.key = key

    def next_after(self, call: Call) -> tuple[LayerBalancer, Call] | None:
        """The call before this one in forward; this one and those after it are forgotten."""
        calls = self._calls.get(call.key, [])
        if not any(each is call for _, each in calls):
            return None
        while calls.pop()[1] is not call:
            pass
        if not calls:
            del self._calls[call.key]
            return None
        return calls[-1]

    def clear(self) -> None:
        self._calls.clear()
