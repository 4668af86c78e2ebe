"""Windows of one process that are profiled: a torch profiler trace, or a capture range for Nsight Systems.

    window = Window(ProfileSettings(), Path("profile/step_00003_rank_0.json.gz"))
    window.start()
    ...
    window.stop()                                # writes the trace

Inside a window parts of the step are named ranges, see :mod:`megatron_ultraep.runtime.ranges`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ultraep.runtime import ranges

Tool = Literal["torch", "nsys"]


@dataclass(frozen=True)
class ProfileSettings:
    """How windows are profiled.

    Attributes:
        tool: ``"torch"`` writes Chrome traces; ``"nsys"`` opens NVTX ranges and calls ``cudaProfilerStart`` and
            ``cudaProfilerStop``, for a process that runs under ``nsys profile``.
        shapes: of operators' inputs are recorded (torch).
        stacks: Python's stack at every operator is recorded (torch).
        memory: allocations are recorded (torch).
    """

    tool: Tool = "torch"
    shapes: bool = False
    stacks: bool = False
    memory: bool = False


class Window:
    """One window; started and stopped on the thread whose operators are to be seen.

    Args:
        settings: how.
        path: of the trace, ``.json`` or ``.json.gz``; its directory is made. Not written by ``"nsys"``.
        device: record kernels on the GPU too, where there is one.
        threads: record all threads of the process, not only this one and autograd's.
    """

    def __init__(self, settings: ProfileSettings, path: Path, *, device: bool = True, threads: bool = False) -> None:
        import torch  # here: engines import this module, and must not import torch by it

        self._settings, self._path = settings, path
        self._cuda = device and torch.cuda.is_available()
        self._threads = threads
        self._profiler: Any = None
        self._running = False

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: it runs already.
        """
        import torch

        if self._running:
            raise RuntimeError(f"the window of {self._path.name} runs already: stop() it first")
        if self._settings.tool == "torch":
            self._profiler = self._make()
            self._profiler.start()
        elif self._cuda:
            torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
        ranges.enable()
        self._running = True

    def stop(self) -> Path | None:
        """End it; does nothing when it does not run.

        Returns:
            the trace, if one was written.
        """
        profiler = self._end()
        if profiler is None:
            return None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._path))
        return self._path

    def drop(self) -> None:
        """End it and write nothing."""
        self._end()

    def _end(self) -> Any:
        """The stopped torch profiler, if there is one."""
        import torch

        if not self._running:
            return None
        self._running = False
        ranges.disable()
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        elif self._cuda:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]
        return profiler

    def _make(self) -> Any:
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        options: dict[str, Any] = {}
        if self._threads:
            options["experimental_config"] = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        return torch.profiler.profile(
            activities=activities,
            record_shapes=self._settings.shapes,
            with_stack=self._settings.stacks,
            profile_memory=self._settings.memory,
            **options,
        )
