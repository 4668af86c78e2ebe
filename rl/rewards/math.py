"""Mathematical answers, compared as expressions by math-verify: ``rl.rewards.math:math_verify``.

1. The library limits its time with an alarm signal, which works in a process's main thread only, and a parser that is
   stuck in C hears no signal. Rewards run in threads: so answers are graded in processes of their own, and one that is
   late is killed and replaced.
2. Only text goes to a process and a yes or no comes back.
"""

from __future__ import annotations

import atexit
import multiprocessing
import threading
from collections.abc import Mapping
from concurrent.futures import TimeoutError as LateError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rl.rewards.math_worker import grade, start
from rl.types import Sample

_DEFAULTS = {"timeout_s": 10.0, "workers": 2, "memory_mib": 4096}
_pools: dict[tuple[int, int], ProcessPool] = {}
_lock = threading.Lock()


def math_verify(sample: Sample, args: Mapping[str, Any]) -> float:
    """1.0 when the answer that the response gives last equals the label as a mathematical expression, else 0.0.

    Answers are found in LaTeX (``\\boxed{...}`` first, then ``$...$``) and in plain numbers and expressions. A response
    that gives none gets 0.0.

    Args:
        sample: with a label of text (LaTeX or plain) or a number.
        args: ``timeout_s`` (10): seconds for one answer, waiting for a process not counted; ``workers`` (2): processes;
            ``memory_mib`` (4096): address space of each.

    Raises:
        ValueError: a label that is no mathematical expression, or unknown args.
        TimeoutError: the answer took too long to compare.
        RuntimeError: its process died, for example for lack of memory.
    """
    settings = _settings(args)
    label = sample.prompt.label
    _check_label(label)
    pool = _pool(int(settings["workers"]), int(settings["memory_mib"]))
    future = pool.schedule(grade, args=[str(label), sample.response_text], timeout=settings["timeout_s"])
    try:
        equal = future.result()
    except LateError as error:
        raise TimeoutError(f"the answer was not compared within {settings['timeout_s']:g} s") from error
    except ProcessExpired as error:
        raise RuntimeError(f"the process that compared the answer died: {error}") from error
    if equal is None:
        raise ValueError(f"expected a mathematical expression as label, got {str(label)[:100]!r}")
    return float(equal)


def _check_label(label: Any) -> None:
    if isinstance(label, bool) or not isinstance(label, str | int | float) or not str(label).strip():
        raise ValueError(f"expected a mathematical expression as text, or a number, got {str(label)[:100]!r}")


def _settings(args: Mapping[str, Any]) -> dict[str, float]:
    unknown = set(args) - set(_DEFAULTS)
    if unknown:
        raise ValueError(f"unknown reward args {sorted(unknown)}; known are {sorted(_DEFAULTS)}")
    settings = _DEFAULTS | dict(args)
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"expected {name} > 0 in the reward's args, got {value!r}")
    return settings


def _check_args(args: Mapping[str, Any]) -> None:
    _settings(args)


math_verify.check_args = _check_args  # type: ignore[attr-defined]
math_verify.check_label = _check_label  # type: ignore[attr-defined]


def _pool(workers: int, memory_mib: int) -> ProcessPool:
    """Processes that stay: importing sympy takes a second."""
    with _lock:
        key = (workers, memory_mib)
        if key not in _pools or not _pools[key].active:
            _pools[key] = ProcessPool(
                max_workers=workers,
                initializer=start,
                initargs=[memory_mib],
                context=multiprocessing.get_context("spawn"),
            )
        return _pools[key]


@atexit.register
def _stop() -> None:
    with _lock:
        for pool in _pools.values():
            pool.stop()
            pool.join()
        _pools.clear()
