"""Background processes that leave nothing behind."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """Initializer of a pool's processes: a parent that is killed closes no pool, so they end when it does."""
    parent = parent_process()
    if parent is None:
        return

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, name="end-with-parent", daemon=True).start()
