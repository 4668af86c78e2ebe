"""The residual stream of a 16-bit engine in float32; see ``rl.models.float32_residual``, whose other end this is.

vLLM's models hand the stream from norm to norm: each adds a layer's output to it, and returns it beside what it normed.
So the stream has the type that norms give it. They are exchanged as they are made, before CUDA graphs are captured.
"""

from __future__ import annotations

import functools
from typing import Any

from rl.rollout import compat
from rl.rollout.patching import expect, replace
from rl.rollout.ranks import answered

# In vLLM's ``additional_config``, which reaches every process of an engine.
SETTING = "ultraep_float32_residual"
_PARAMETERS = ("self", "hidden_size", "eps", "var_hidden_size", "has_weight", "dtype")

_refused: list[compat.UnexpectedVllm] = []  # why norms could not be exchanged


def offer() -> None:
    """Let norms of models whose engine asks for it (:data:`SETTING`) keep the stream in float32; others stay.

    Where norms are made otherwise than in the versions that this was tried with, nothing changes, and :func:`check`
    says why: this runs in every process of vLLM where the package is installed, and few ask for it.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm

    try:
        original = expect(RMSNorm, "__init__", _PARAMETERS, ("self.variance_epsilon = eps",))
    except compat.UnexpectedVllm as error:
        _refused[:] = [error]
        return
    if original is None:
        return

    @functools.wraps(original)
    def initialise(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        if compat.additional_setting(SETTING) and self.variance_size_override is None:
            self._forward_method = functools.partial(_forward, self, self._forward_method)

    replace(RMSNorm, "__init__", initialise)


def _forward(norm: Any, plain: Any, x: Any, residual: Any = None) -> Any:
    """``x + residual`` in float32, and its norm in the type of ``x``; without a residual, vLLM's own norm of ``x``.

    Args:
        norm: vLLM's ``RMSNorm``.
        plain: its method for this platform.
        x: 16-bit ``[tokens, hidden]``.
        residual: the same shape; float32, or 16-bit before the first layer.
    """
    if residual is None:
        return plain(x)
    from torch.nn import functional

    stream = residual.float() + x
    normed = functional.rms_norm(stream, stream.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    return normed.to(x.dtype), stream


@answered
def check(worker: Any) -> int:
    """Number of this rank's norms that keep the stream in float32. For ``call_ranks``.

    Raises:
        UnexpectedVllm: there are none, perhaps since this vLLM makes them otherwise.
    """
    if _refused:
        raise _refused[0]
    modules = worker.model_runner.model.modules()
    found = sum(getattr(getattr(m, "_forward_method", None), "func", None) is _forward for m in modules)
    if not found:
        raise compat.UnexpectedVllm(
            "expected norms that keep a float32 residual stream, the model has none: set model.float32_residual to "
            "false, or, if other ranks of the engine have them, install the package, so that vLLM's processes find "
            "its plugin"
        )
    return found
