"""The plans of a model on this rank, counted and recorded without holding anybody up."""

from __future__ import annotations

import atexit
import dataclasses
from collections.abc import Callable, Sequence

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.megatron import microbatch
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.runtime.planning import Aside, PlanBatch, Planned
from megatron_ultraep.telemetry.metrics import StepMetrics
from megatron_ultraep.telemetry.recorder import Recorder

_MOST_COUNTED = 100_000  # (micro-batch, layer)s that metrics are kept of
_MOST_ARRIVING = 4096  # plans that are not counted yet
_MOST_BYTES = 16 * 2**20  # of the device's memory, in them
_MOST_CROSSING = 16  # batches of plans on the host that are not counted yet


class PlanLog:
    """Counts plans, for metrics, and records them.

    Args:
        recorder: None records nothing.

    Attributes:
        aside: where plans are copied to the host on GPUs.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.aside: Aside | None = None
        self._recorder = recorder
        self._replicas = 0
        self._arriving: list[tuple[MicroBatchKey, int, Planned]] = []
        self._arriving_bytes = 0
        self._crossing: list[tuple[list[tuple[MicroBatchKey, int]], PlanBatch]] = []
        self._metrics = StepMetrics()
        self._unnamed: dict[int, int] = {}
        self._counted: set[tuple[MicroBatchKey, int]] = set()
        if recorder is not None:
            atexit.register(self.close)
        # Recomputed layers must find the key of the forward that saved them, or records count them twice.
        microbatch.install()

    def observer(self, number: int) -> Callable[[Planned], None]:
        """What a layer tells its plans, by Megatron's layer number."""

        def observe(planned: Planned) -> None:
            key = self._key(number)
            if (key, number) in self._counted:
                return  # recomputation
            if len(self._counted) >= _MOST_COUNTED:  # nobody asks for metrics
                self.metrics()
            self._counted.add((key, number))
            self._arriving.append((key, number, planned))
            if self.aside is not None:
                self.aside.mark()
            # Plans made on a device stay there until they are many or somebody asks: the next kernels wait.
            self._arriving_bytes += planned.bytes
            if self._arriving_bytes > _MOST_BYTES or len(self._arriving) >= _MOST_ARRIVING:
                self._send_over()
            else:
                self._land()

        return observe

    def planned_with(self, settings: PlanSettings) -> None:
        """Keep with the records what they are planned with, so that plans can be made again from their loads."""
        if self._recorder is not None:
            self._recorder.remember(plan_settings=dataclasses.asdict(settings))

    def _send_over(self) -> None:
        """Start the plans since the last time on their way to the host."""
        arriving, self._arriving, self._arriving_bytes = self._arriving, [], 0
        names = [(key, number) for key, number, _ in arriving]
        self._crossing.append((names, PlanBatch([planned for _, _, planned in arriving], self.aside)))

    def _land(self) -> None:
        """Take plans that have come out of pinned memory, and count the oldest where they are many; waits for none."""
        landed = [batch.landed() for _, batch in self._crossing]
        while landed and landed[0] and len(self._crossing) > _MOST_CROSSING:
            landed.pop(0)
            self._take(*self._crossing.pop(0))

    def take_all(self) -> None:
        """Count and record all plans since the last time; waits for the device."""
        self._send_over()
        crossing, self._crossing = self._crossing, []
        for names, batch in crossing:
            self._take(names, batch)

    def _take(self, names: Sequence[tuple[MicroBatchKey, int]], batch: PlanBatch) -> None:
        for (key, number), plan in zip(names, batch.plans(), strict=True):
            self._replicas += len(plan.replicas)
            self._metrics.add(number, plan)
            if self._recorder is not None:
                self._recorder.record(key, number, plan)

    @property
    def replicas(self) -> int:
        """Replicas made since the start, over the whole expert-parallel group; waits for the device."""
        self.take_all()
        return self._replicas

    def _key(self, layer: int) -> MicroBatchKey:
        key = microbatch.current_key_or_none()
        if key is not None:
            return key
        # A job that names no micro-batches: they are numbered as they come, recomputation included.
        count = self._unnamed.get(layer, 0)
        self._unnamed[layer] = count + 1
        return MicroBatchKey("model", "train", 0, count)

    def metrics(self) -> dict[str, float]:
        """Metrics of the plans since the last call, e.g. ``moe/imbalance_before/mean``; empty without any.

        See :mod:`megatron_ultraep.telemetry.metrics`. Of very long times between calls, only the newest plans count.
        """
        self.take_all()
        self._counted.clear()
        return self._metrics.finish()

    def close(self) -> None:
        """Write what is left of the records."""
        if self._recorder is not None:
            self.take_all()
            self._recorder.close()
            self._recorder = None
        atexit.unregister(self.close)
