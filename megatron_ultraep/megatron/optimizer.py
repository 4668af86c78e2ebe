"""What Megatron's optimizers hold of a parameter on this rank, and which optimizers are understood.

| optimizer | main parameter | states |
|---|---|---|
| ``FP32Optimizer`` (float32, float64) | the parameter itself | of its shape |
| ``Float16OptimizerWithFloat16Params`` | a float32 copy | of its shape |
| ``DistributedOptimizer`` | of a range of the flattened parameter: float32 a view, else a float32 copy | likewise |
| ``ChainedOptimizer`` | those of several of the above | |

Classes are recognised by name and module: subclasses (layer-wise, Muon) hold something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Adam's tensors of a parameter; "step" is counted per parameter (torch) or per group (Transformer Engine, Apex).
MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"
_UNDERSTOOD = ("FP32Optimizer", "Float16OptimizerWithFloat16Params", "DistributedOptimizer")
_ADAMS = ("Adam", "AdamW", "FusedAdam")


@dataclass(frozen=True)
class Held:
    """What this rank's optimizer holds of one parameter.

    Attributes:
        start, stop: elements of the flattened parameter.
        main: the main parameter of those elements; None where it shares the parameter's memory.
        states: Adam's moments of those elements by name; empty before the first step.
        steps: steps counted so far; None before the first one.
    """

    start: int
    stop: int
    main: torch.Tensor | None
    states: dict[str, torch.Tensor]
    steps: int | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it that has memory of its own, by kind."""
        return ({} if self.main is None else {"main": self.main}) | self.states


def chained(optimizer: Any) -> list[Any]:
    """The optimizers that one consists of, without those that hold nothing."""
    parts = list(optimizer.chained_optimizers) if hasattr(optimizer, "chained_optimizers") else [optimizer]
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False) and part.optimizer is not None]


def refusals_of(optimizer: Any) -> list[str]:
    """Why the states of an optimizer cannot be moved between ranks, each with what to change; empty if they can."""
    if hasattr(optimizer, "chained_optimizers") and not _is_megatron(optimizer, "ChainedOptimizer"):
        return [f"{type(optimizer).__name__} was not tested: use Megatron's Adam, plain or distributed"]
    return [reason for part in chained(optimizer) for reason in _refusals_of_part(part)]


def _refusals_of_part(part: Any) -> list[str]:
    name = type(part).__name__
    if not any(_is_megatron(part, known) for known in _UNDERSTOOD):
        return [f"{name} was not tested: use Megatron's Adam, plain or distributed"]
    reasons = []
    config = part.config
    if getattr(config, "use_precision_aware_optimizer", False):
        reasons.append("the precision-aware optimizer keeps main parameters in scaled form: unset it")
    if getattr(config, "optimizer_cpu_offload", False) or type(part.optimizer).__name__ == "HybridDeviceOptimizer":
        reasons.append("optimizer states are offloaded to the CPU: unset optimizer_cpu_offload")
    if getattr(getattr(part, "ddp_config", None), "use_megatron_fsdp", False):
        reasons.append("Megatron FSDP shards parameters themselves: unset use_megatron_fsdp")
    if getattr(getattr(part, "ddp_config", None), "num_distributed_optimizer_instances", 1) > 1:
        reasons.append("several instances of the distributed optimizer were not tested: use one")
    if reasons:
        return reasons
    if type(part.optimizer).__name__ not in _ADAMS:
        return [f"{type(part.optimizer).__name__} was not tested: use Adam"]
    for group in part.optimizer.param_groups:
        if group.get("amsgrad"):
            return ["Adam's amsgrad was not tested: turn it off"]
        for main in group["params"]:
            state = part.optimizer.state.get(main) or {}
            unknown = sorted(set(state) - {*MOMENTS, _STEP})
            if unknown:
                return [f"{type(part.optimizer).__name__} holds states that are not known: {unknown}; use Adam"]
            wrong = sorted(k for k in MOMENTS if k in state and not _plain(state[k], main))
            if wrong:
                return [f"{wrong} have other elements or lie on another device than their parameter: load them back"]
    return []


def _is_megatron(optimizer: Any, name: str) -> bool:
    kind = type(optimizer)
    return kind.__name__ == name and kind.__module__.startswith("megatron.core.optimizer")


def _plain(state: Any, main: torch.Tensor) -> bool:
    return torch.is_tensor(state) and state.numel() == main.numel() and state.device == main.device


def held_by(optimizer: Any) -> dict[torch.nn.Parameter, Held]:
    """What this rank holds, by model parameter; parameters that it holds nothing of are left out."""
    return {
        parameter: _held(part.optimizer, parameter, main, group, start)
        for part in chained(optimizer)
        for parameter, main, group, start in _main_parameters(part)
    }


def _held(adam: Any, parameter: torch.Tensor, main: torch.Tensor, group: dict[str, Any], start: int) -> Held:
    state = adam.state.get(main) or {}
    shared = main.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    steps = state.get(_STEP, group.get(_STEP)) if state else None
    return Held(
        start=start,
        stop=start + main.numel(),
        main=None if shared else main,
        states={kind: state[kind] for kind in MOMENTS if kind in state},
        steps=None if steps is None else int(steps),
    )


def _main_parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, dict[str, Any], int]]:
    """``(model parameter, main parameter, Adam's group, first element)``."""
    groups: Sequence[dict[str, Any]] = part.optimizer.param_groups
    if _is_megatron(part, "DistributedOptimizer"):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            start = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, groups[group]["params"][place], groups[group], start
        return
    model_of: dict[int, torch.nn.Parameter] = {}
    if _is_megatron(part, "Float16OptimizerWithFloat16Params"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            model_of |= {id(main): model for model, main in zip(models, mains, strict=True)}
    for group in groups:
        for main in group["params"]:
            yield model_of.get(id(main), main), main, group, 0
