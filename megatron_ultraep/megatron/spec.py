"""MoE layers that balance themselves, for Megatron's ``--spec``: no launcher, no line in the script.

    export ULTRAEP_ARGS="--ultraep-slots 2"
    torchrun <...> pretrain_gpt.py --spec megatron_ultraep.megatron.spec gpt_layer_spec <...>

``gpt_layer_spec`` is the spec that the job would have used, with :class:`SelfBalancingMoELayer` in place of
``MoELayer``. Megatron has parsed its command line before it imports this, so flags come from the environment variable
``ULTRAEP_ARGS``; under the launcher, or after ``import megatron_ultraep.enable``, from there.

Megatron-core 0.19 calls ``gpt_layer_spec(config, vp_stage)``. Before 0.19 it takes the attribute itself for the spec of
every layer; there ``gpt_layer_spec`` is made when this module is imported, from the job's arguments.
"""

from __future__ import annotations

import copy
import functools
import os
import shlex
import sys
from typing import Any

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import arguments, compat, support, training

VARIABLE = "ULTRAEP_ARGS"

_MoELayer: Any = compat.moe_layer_class()
_balancer: Any = None


class SelfBalancingMoELayer(_MoELayer):  # type: ignore[misc]
    """A stock MoE layer until its first forward: then, with weights where and what they will be, it is balanced.

    Raises:
        Unsupported: when it is built, if it cannot be balanced.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_adopting"] = _balancer
        reasons = support.refusals(self) if _balancer is not None else []
        if reasons:
            raise support.Unsupported("the MoE layer cannot be balanced: " + "; ".join(reasons))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        balancer, self.__dict__["_adopting"] = self.__dict__["_adopting"], None
        if balancer is not None:
            balancer.adopt(self)
        return super().forward(*args, **kwargs)


def gpt_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The spec of the layers of one model chunk, as the job would have had it, with layers that balance themselves.

    Collective over all ranks of the world when it is first called.

    Args:
        config: Megatron's ``GPTModelConfig``.
        vp_stage: the chunk, with a virtual pipeline.
    """
    from megatron.training.models.gpt import default_layer_spec

    set_up()
    return with_self_balancing_layers(default_layer_spec(config, vp_stage))


def layer_spec_before_019(args: Any) -> Any:
    """The spec of a layer of a job on Megatron-core before 0.19, from the job's arguments.

    Raises:
        Unsupported: a job whose layers are not all MoE layers; the launcher balances it.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
    from megatron.training.arguments import core_transformer_config_from_args

    layers = get_gpt_decoder_layer_specs(
        core_transformer_config_from_args(args),
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        qk_l2_norm=args.qk_l2_norm,
    )
    if any(_with_self_balancing_layer(layer) is layer for layer in layers):
        raise support.Unsupported(
            "before Megatron-core 0.19 --spec describes every layer alike, but the job has dense layers: use "
            "python -m megatron_ultraep.launch without --spec"
        )
    return with_self_balancing_layers(layers[0])


def set_up() -> None:
    """Read the flags and make the process-wide balancer, once. Collective over all ranks of the world."""
    global _balancer
    config = training.decision()
    if config is None:
        config = flags_of_environment()
        training.install(config)
    if config.enabled and _balancer is None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        from megatron_ultraep.megatron import attach

        group = parallel_state.get_expert_model_parallel_group()
        _balancer = attach.make_balancer(config, dist.get_process_group_ranks(group))
        training.use(_balancer)


def flags_of_environment() -> BalanceConfig:
    """The config that ``ULTRAEP_ARGS`` describes; the default one when it is not set."""
    return arguments.parse(shlex.split(os.environ.get(VARIABLE, "")))


def with_self_balancing_layers(spec: Any) -> Any:
    """A copy of a layer's or a block's spec in which MoE layers balance themselves. Dense layers stay.

    Raises:
        Unsupported: a spec without stock MoE layers.
    """
    layers = getattr(spec, "layer_specs", None)
    if layers is None:
        result = _with_self_balancing_layer(spec)
        replaced = [result is not spec]
    else:
        result = copy.copy(spec)
        result.layer_specs = [_with_self_balancing_layer(layer) for layer in layers]
        replaced = [new is not old for new, old in zip(result.layer_specs, layers, strict=True)]
    # A pipeline stage may have dense layers alone, so a block without any MoE layer is fine.
    if layers is None and not any(replaced):
        raise support.Unsupported("the layer spec has no MoELayer that could be balanced: set --num-experts")
    return result


def _with_self_balancing_layer(layer: Any) -> Any:
    mlp = layer.submodules.mlp
    if isinstance(mlp, functools.partial) and mlp.func is _MoELayer:  # from 0.18 on
        new: Any = functools.partial(SelfBalancingMoELayer, *mlp.args, **mlp.keywords)
    elif getattr(mlp, "module", None) is _MoELayer:
        new = copy.copy(mlp)
        new.module = SelfBalancingMoELayer
    else:
        return layer
    layer = copy.copy(layer)
    layer.submodules = copy.copy(layer.submodules)
    layer.submodules.mlp = new
    return layer


def _in_job_before_019() -> bool:
    if tuple(int(part) for part in compat.version().split(".")[:2]) >= (0, 19):
        return False
    return "megatron.training.global_vars" in sys.modules


if _in_job_before_019():
    from megatron.training import get_args

    set_up()
    gpt_layer_spec = layer_spec_before_019(get_args())
