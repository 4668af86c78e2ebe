"""Ranges of every transformer layer, its attention and its MoE layer: forward, recomputation and backward.

    ranges_of_layers = LayerRanges(model)     # hooks
    ...
    ranges_of_layers.remove()                 # none are left

A range is called ``layer 3 moe backward | actor/train/step 12/micro-batch 0``; the key is the micro-batch context's,
so recomputation has that of the forward it repeats. Hooks are on modules and on tensors; they return nothing, so no
number and no graph changes. Layer numbers are Megatron's, from 1.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ultraep.megatron import compat, microbatch
from megatron_ultraep.runtime import ranges


@dataclass(frozen=True)
class _Call:
    """A forward of a module that runs."""

    module: torch.nn.Module
    opened: ranges.Open
    backward: ranges.Backward | None


class LayerRanges:
    """Hooks on the layers of a model that open ranges while :func:`ranges.on`.

    Args:
        model: a model or the chunks of one, wrapped or not.
    """

    def __init__(self, model: torch.nn.Module | Sequence[torch.nn.Module]) -> None:
        self._handles: list[Any] = []
        self._running = threading.local()
        chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
        kind, moe = compat.transformer_layer_class(), compat.moe_layer_class()
        for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, kind)):
            name = f"layer {layer.layer_number}"
            self._hook(layer, name, 0)
            self._hook(layer.self_attention, f"{name} attention", 1)
            self._hook(layer.mlp, f"{name} {'moe' if isinstance(layer.mlp, moe) else 'mlp'}", 1)

    def remove(self) -> None:
        """Take all hooks off; calling it again does nothing."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _hook(self, module: torch.nn.Module, name: str, depth: int) -> None:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if ranges.on():
                self._calls().append(_begin(module, name, depth, _hidden(args, kwargs)))

        def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._end(module, output)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _end(self, module: torch.nn.Module, output: Any) -> None:
        calls = self._calls()
        while calls:  # of those that raised there was no end
            call = calls.pop()
            call.opened.close()
            if call.module is module:
                tensor = output[0] if isinstance(output, tuple) else output
                if call.backward is not None and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(call.backward.begin)
                return

    def _calls(self) -> list[_Call]:
        found: list[_Call] | None = getattr(self._running, "calls", None)
        if found is None:
            found = self._running.calls = []
        return found


def _begin(module: torch.nn.Module, name: str, depth: int, hidden: torch.Tensor | None) -> _Call:
    key = microbatch.current_key_or_none()
    again = torch._C._current_graph_task_id() != -1  # autograd is running: this is recomputation
    backward = None
    if torch.is_grad_enabled():
        backward = ranges.Backward(ranges.text_of(f"{name} backward", key), depth)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(backward.end)
    return _Call(module, ranges.Open(ranges.text_of(f"{name} {'recompute' if again else 'forward'}", key)), backward)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states that a layer is given: its first argument in all of them."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, torch.Tensor) else None
