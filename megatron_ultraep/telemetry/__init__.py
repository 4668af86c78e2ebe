"""Load records, metrics and the load viewer. See ``docs/viewer.md``."""

from megatron_ultraep.telemetry.metrics import StepMetrics
from megatron_ultraep.telemetry.recorder import Counts, Recorder
from megatron_ultraep.telemetry.records import LoadRecord, Records, Replica, read

__all__ = ["Counts", "LoadRecord", "Recorder", "Records", "Replica", "StepMetrics", "read"]
