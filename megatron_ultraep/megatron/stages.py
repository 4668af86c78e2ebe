"""What becomes of a stock MoE layer when it is balanced: a class with three stages changed, and the way back.

| stage | stock | balanced |
|---|---|---|
| ``route`` | logical probs and map; auxiliary losses, expert bias | the same code |
| ``preprocess`` | dispatcher's preprocess | gather loads, plan, reroute; then the same code over physical experts |
| ``dispatch``, ``combine``, shared experts | | the same code |
| ``routed_experts_compute`` | experts | the same between: weights into slots, experts over homes and slots |
| ``postprocess`` | | the same code, then a mark where backward begins |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.support import Unsupported, refusals
from megatron_ultraep.runtime.layer import LayerBalancer

ATTRIBUTE = "_ultraep"
_STAGES = {
    "preprocess": ["self", "hidden_states", "probs", "routing_map"],
    "routed_experts_compute": ["self", "hidden_states", "probs"],
    "postprocess": ["self", "output", "shared_expert_output"],
}


class _BalancedStages:
    """The stages that change; mixed into the class of a layer by :func:`balanced_class`."""

    def preprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> Any:
        balancer: LayerBalancer = getattr(self, ATTRIBUTE).balancer
        routed = balancer.route(probs, routing_map)
        return super().preprocess(balancer.dispatched(hidden_states), *routed)  # type: ignore[misc]

    def routed_experts_compute(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        balancer: LayerBalancer = getattr(self, ATTRIBUTE).balancer
        dispatcher: Any = self.token_dispatcher  # type: ignore[attr-defined]
        inputs = dispatcher.dispatch_postprocess(hidden_states, probs)
        return dispatcher.combine_preprocess(balancer.compute(*inputs)), None

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        balancer: LayerBalancer = getattr(self, ATTRIBUTE).balancer
        return balancer.combined(super().postprocess(output, shared_expert_output))  # type: ignore[misc]


_classes: dict[type, type] = {}


def balanced_class(stock: type) -> type:
    if stock not in _classes:
        _classes[stock] = type(f"Balanced{stock.__name__}", (_BalancedStages, stock), {"__module__": __name__})
    return _classes[stock]


class Attached:
    """What a balanced layer carries, and what gives it back as it was."""

    def __init__(
        self, owner: Any, balancer: LayerBalancer, stock_class: type, stock_dispatcher: Any, hook: Any
    ) -> None:
        self.owner = owner
        self.balancer = balancer
        self.stock_class = stock_class
        self.stock_dispatcher = stock_dispatcher
        self.hook = hook


def moe_layers(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[Any]:
    """The MoE layers of a model's chunks, in order."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, compat.moe_layer_class())]


def reasons_against(layer: Any) -> list[str]:
    """Why a layer cannot be balanced now."""
    return ["it is balanced already: detach the model first"] if hasattr(layer, ATTRIBUTE) else refusals(layer)


def name_of(layer: Any) -> str:
    return f"MoE layer {layer.layer_number}"


def check_target() -> None:
    """The stages that a balanced layer overrides are what they were when this was written."""
    stock = compat.moe_layer_class()
    for name, expected in _STAGES.items():
        found = list(inspect.signature(getattr(stock, name)).parameters)
        if found != expected:
            raise Unsupported(
                f"MoELayer.{name} of Megatron-core {compat.version()} takes {found}, expected {expected}; tested "
                f"versions: {', '.join(compat.TESTED_VERSIONS)}"
            )
