"""Logits in float32 from a 16-bit engine's output layer; see ``rl.models.float32_head``, whose other end this is."""

from __future__ import annotations

from typing import Any

from rl.rollout import compat
from rl.rollout.ranks import answered


@answered
def install(worker: Any) -> int:
    """Have this rank's output layers give float32; returns how many do. For ``call_ranks``.

    Raises:
        UnexpectedVllm: the model has no output layer, or one with weights that are not plain 16-bit ones.
    """
    import torch

    from rl.float32 import float32_product

    heads = compat.output_heads(worker.model_runner.model)
    for head in heads:
        weight = head.weight
        if weight.dtype not in (torch.bfloat16, torch.float16) or weight.dim() != 2:
            raise compat.UnexpectedVllm(
                f"expected an output layer with 16-bit weights, got {weight.dtype} {list(weight.shape)}; set "
                "model.float32_head to false"
            )

        def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            logits = float32_product(x, layer.weight)
            return logits if bias is None else logits + bias

        head.quant_method.apply = apply
    return len(heads)
