"""Named ranges around parts of a step: for the torch profiler (``record_function``) and for Nsight Systems (NVTX).

    with ranges.enabled():                        # a profiled window, or a whole job
        with ranges.span("train", key):           # nothing but a comparison outside
            ...

The torch profiler records ``record_function`` only and Nsight NVTX only, so every range is both; without CUDA there is
no NVTX. Ranges of one thread are nested: each thread has a stack of its own, because autograd runs the backward of CUDA
layers on threads of its own.

Backward has no blocks of code that a ``with`` could enclose. A :class:`Backward` begins when the gradient of a layer's
output exists and ends when that of its input does, told by tensor hooks, which leave the graph as it is. Where the
input needs no gradient nobody tells of the end: it is then the beginning of the next one on this thread, or the end of
the range around both.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()
_lock = threading.Lock()
_local = threading.local()
_users = 0  # windows and jobs that want ranges
_nvtx = False


def on() -> bool:
    """Whether anybody wants ranges now."""
    return _users > 0


def enable() -> None:
    """Want ranges from now on; counted, so that windows may overlap."""
    global _users, _nvtx
    import torch  # here and below: engines import this module, and must not import torch by it

    with _lock:
        _users += 1
        _nvtx = torch.cuda.is_available()


def disable() -> None:
    """Take one :func:`enable` back."""
    global _users
    with _lock:
        _users = max(0, _users - 1)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Ranges inside."""
    enable()
    try:
        yield
    finally:
        disable()


def span(name: str, key: object | None = None) -> AbstractContextManager[None]:
    """A range over a block; nothing when nobody wants ranges.

    Args:
        name: of the part, e.g. ``"train"``.
        key: what it is done for, e.g. a ``MicroBatchKey``; made text only when ranges are wanted.
    """
    return _span(text_of(name, key)) if _users else _NOTHING


def ranged(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: every call of the function is a range."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


def text_of(name: str, key: object | None) -> str:
    """What a range is called: ``name`` alone, or ``name | key``."""
    return name if key is None else f"{name} | {key}"


@contextlib.contextmanager
def _span(text: str) -> Iterator[None]:
    opened = Open(text)
    try:
        yield
    finally:
        opened.close()


class Open:
    """A range of this thread that is open until :meth:`close`, which ends those opened inside it, too.

    Args:
        text: its name.
        backward: how deep in a layer a backward range is (0: the layer itself); None for all others.
    """

    def __init__(self, text: str, backward: int | None = None) -> None:
        import torch

        self.backward = backward
        self._record = torch.profiler.record_function(text)
        self._record.__enter__()  # type: ignore[no-untyped-call]
        self._nvtx = _nvtx
        if self._nvtx:
            torch.cuda.nvtx.range_push(text)  # type: ignore[no-untyped-call]
        _stack().append(self)

    def close(self) -> None:
        """End it, if it is open on this thread."""
        stack = _stack()
        if self in stack:
            while stack.pop_and_end() is not self:
                pass

    def end(self) -> None:
        """Only for the stack."""
        import torch

        if self._nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        self._record.__exit__(None, None, None)


class _Stack(list[Open]):
    """Open ranges of a thread, the innermost last."""

    def pop_and_end(self) -> Open:
        opened = self.pop()
        opened.end()
        return opened


def _stack() -> _Stack:
    found = getattr(_local, "stack", None)
    if found is None:
        found = _local.stack = _Stack()
    return found


class Backward:
    """The backward range of one call of a layer, or of a part of one.

    Args:
        text: its name.
        depth: 0 for a layer, 1 for a part of it.
    """

    def __init__(self, text: str, depth: int) -> None:
        self._text, self._depth = text, depth
        self._opened: Open | None = None

    def begin(self, gradient: Any) -> None:
        """Hook of the output: its gradient exists. Ends backward ranges that nobody ended."""
        stack = _stack()
        while stack and stack[-1].backward is not None and stack[-1].backward >= self._depth:
            stack.pop_and_end()
        self._opened = Open(self._text, self._depth)

    def end(self, gradient: Any) -> None:
        """Hook of the input: its gradient exists."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
