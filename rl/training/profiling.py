"""Profiled windows of a trainer rank: passes, layers of all its models, optimizer steps and transfers are ranges.

window = WorkerWindow(worker, ProfileSettings(), Path("profile/step_00003_rank_0.json.gz"))
...
trace = window.end()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ultraep.megatron.layer_ranges import LayerRanges
from megatron_ultraep.runtime.profiler import ProfileSettings, Window

if TYPE_CHECKING:
    from rl.training.worker import TrainWorker


class WorkerWindow:
    """A window that begins now; hooks are on the layers only while it is open.

    Args:
        worker: whose models.
        settings: how.
        path: of this rank's trace.
    """

    def __init__(self, worker: TrainWorker, settings: ProfileSettings, path: Path) -> None:
        self._window = Window(settings, path)
        models = [*(trained.model for trained in worker.trained.values()), *worker.frozen.values()]
        self._layers = [LayerRanges(model.chunks) for model in models]
        self._window.start()

    def end(self) -> Path | None:
        """Take the hooks off and write the trace; its path, if there is one."""
        for each in self._layers:
            each.remove()
        return self._window.stop()
