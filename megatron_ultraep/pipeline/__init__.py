"""Fused pipeline schedules: several models interleaved on the same pipeline nodes.

``problem`` says what is scheduled, ``simulate`` when everything would run. Planning needs numpy and numba only; torch
is the executor's.
"""

from megatron_ultraep.pipeline.problem import InvalidSchedule, Operation, PipelineModel, Problem, Schedule, Task

__all__ = ["InvalidSchedule", "Operation", "PipelineModel", "Problem", "Schedule", "Task"]
