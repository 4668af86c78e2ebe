"""The one context from which replay, balancing, foresight and the fused executor take the micro-batch key.

A forward step enters :func:`micro_batch`. When Megatron recomputes part of it during backward, the key of the forward
that saved it is entered again: the recomputed function is wrapped, at the time it is checkpointed, in a closure that
carries the key. Megatron's own ``current_microbatch`` is set in forward only, and first-in-first-out queues assume an
order that pipelines and fused schedules do not keep.

Invariants (asserted by the tests of this file):

1. Inside a checkpointed function :func:`current_key` is the same in forward and in recomputation, whatever ran between.
2. After recomputation the key is what it was before.
3. Outside :func:`micro_batch` there is no key, and asking for one raises.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.megatron import compat

# Thread-local: autograd recomputes CUDA layers on a thread of its own, while the main thread may be elsewhere.
_state = threading.local()


class NoMicroBatch(RuntimeError):
    """A layer asked which micro-batch it runs for, outside any."""


@contextlib.contextmanager
def micro_batch(key: MicroBatchKey | None) -> Iterator[None]:
    """Everything run inside belongs to this micro-batch (None: to no micro-batch)."""
    before = getattr(_state, "key", None)
    _state.key = key
    try:
        yield
    finally:
        _state.key = before


def current_key_or_none() -> MicroBatchKey | None:
    return getattr(_state, "key", None)


def current_key() -> MicroBatchKey:
    """The key of the micro-batch that runs now.

    Raises:
        NoMicroBatch: outside :func:`micro_batch`; usually a forward step that does not enter it, or a recomputation of
            a function that was checkpointed before :func:`install`.
    """
    key = current_key_or_none()
    if key is None:
        raise NoMicroBatch(
            "a layer runs outside any micro-batch: enter megatron_ultraep.megatron.microbatch.micro_batch(key) in the "
            "forward step, and install() before the first forward"
        )
    return key


def carrying_key(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that enters, whenever it is called, the key that is current now, be it none."""
    key = current_key_or_none()

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with micro_batch(key):
            return function(*args, **kwargs)

    return run


_MARK = "_carries_micro_batch_key"


def install() -> None:
    """Make Megatron's three ways to recompute carry the key. Idempotent.

    Patched (tried on 0.16.1 and 0.19.2), each by name because Megatron looks it up at every call:

    - ``megatron.core.tensor_parallel.checkpoint``: full recomputation and the ``moe``, ``mlp``, ``core_attn`` modules;
    - ``tensor_parallel.random.CheckpointWithoutOutput.checkpoint``: ``moe_act``, ``layernorm`` and the like;
    - ``te_checkpoint`` in the modules that imported it, with Transformer Engine.

    Raises:
        RuntimeError: when one of them no longer takes the function where we expect it.
    """
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    _wrap(tensor_parallel, "checkpoint", first="function")
    _wrap(CheckpointWithoutOutput, "checkpoint", first="self", second="run_function")
    for module in compat.modules_with_te_checkpoint():
        _wrap(module, "te_checkpoint", first="forward_func")


def _wrap(owner: Any, name: str, *, first: str, second: str | None = None) -> None:
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    parameters = list(inspect.signature(original).parameters)
    expected = [first] if second is None else [first, second]
    if parameters[: len(expected)] != expected:
        raise RuntimeError(
            f"{owner.__name__}.{name} of Megatron-core {compat.version()} takes {parameters}, expected it to begin "
            f"with {expected}; tested versions: {compat.TESTED_VERSIONS}"
        )
    if second is None:

        @functools.wraps(original)
        def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return original(carrying_key(function), *args, **kwargs)

    else:

        @functools.wraps(original)
        def wrapped(self: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
            return original(self, carrying_key(function), *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
