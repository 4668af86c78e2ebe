"""Balancing of stock Megatron-core MoE layers, built by anyone, before or after DistributedDataParallel.

    balancer = attach(model, BalanceConfig(slots=2))
    ...train...
    detach(model)

What changes in a layer: its class becomes a subclass that overrides three stages (``stages.py``), and its dispatcher
is replaced by the same dispatcher over physical experts (``dispatcher.py``). Nothing of Megatron is patched; its
modules keep their parameters.

A forward pre-hook on the transformer layer marks what the replicas' gradients can hide behind; without one (a MoE layer
that is in none) they hide behind less.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.balancer import Balancer
from megatron_ultraep.megatron.stages import ATTRIBUTE, moe_layers, name_of, reasons_against
from megatron_ultraep.megatron.support import Unsupported, check_version
from megatron_ultraep.runtime import choose

__all__ = ["Balancer", "attach", "detach", "make_balancer", "moe_layers"]

log = logging.getLogger(__name__)


def attach(
    model: torch.nn.Module | Sequence[torch.nn.Module], config: BalanceConfig | None = None, *, timeout_s: float = 600.0
) -> Balancer | None:
    """Balance every MoE layer of a model.

    Collective over all ranks of the world; every rank calls it with its part of the model, also one without MoE layers.

    Args:
        model: a model or the chunks of one, wrapped in DistributedDataParallel or not.
        config: how to balance; the same on every rank.
        timeout_s: limit of every wait of balancing's own communication (s).

    Returns:
        the balancer; None when ``config.enabled`` is False: then nothing was touched.

    Raises:
        Unsupported: on all ranks alike, when a layer of any rank cannot be balanced.
    """
    config = config or BalanceConfig()
    if not config.enabled:
        return None
    layers = moe_layers(model)
    groups = {tuple(dist.get_process_group_ranks(layer.ep_group)) for layer in layers}
    mine = groups.pop() if len(groups) == 1 else ()
    problem = f"MoE layers are on several expert-parallel groups: {sorted(groups | {mine})}" if groups else ""
    if not problem:
        problem = next((f"{name_of(layer)}: {reason}" for layer in layers for reason in reasons_against(layer)), "")
    balancer = make_balancer(config, mine, problem=problem, timeout_s=timeout_s)
    parents = _parents(model)
    early = _reduced_after_backward(model)
    try:
        for layer in layers:
            balancer.adopt(layer, parent=parents.get(id(layer)), early=early)
        if config.profile:
            balancer.name_ranges(model)
    except BaseException:
        balancer.release()
        raise
    return balancer


def make_balancer(
    config: BalanceConfig, ranks: Iterable[int], *, problem: str = "", timeout_s: float = 600.0
) -> Balancer:
    """A balancer without layers; they are adopted one by one. Collective over all ranks of the world.

    Args:
        config: how to balance; the same on every rank.
        ranks: global ranks of this rank's expert-parallel group; none on a rank without MoE layers.
        problem: why this rank cannot take part, if it cannot: then all ranks raise.
        timeout_s: limit of every wait of balancing's own communication (s).

    Raises:
        Unsupported: when any rank has a problem, or none has an expert-parallel group; on all ranks alike.
    """
    warning = check_version(allow_untested=config.allow_untested)
    if warning:
        log.warning("%s", warning)
    mine = tuple(ranks)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (mine, problem, config, choose.means(config.transport)))
    first = next(((rank, said) for rank, (_, said, _, _) in enumerate(told) if said), None)
    if first is not None:
        raise Unsupported(f"the model cannot be balanced: {first[1]} (rank {first[0]})")
    differs = next((rank for rank, (_, _, other, _) in enumerate(told) if _shared(other) != _shared(config)), None)
    if differs is not None:
        raise Unsupported(
            f"ranks were given different settings: rank {dist.get_rank()} {config}, rank {differs} {told[differs][2]}"
        )
    groups = sorted({group for group, _, _, _ in told if group})
    if not groups:
        raise Unsupported("the model cannot be balanced: it has no MoE layer on any rank")
    symmetric = _symmetric(config, groups, [means for _, _, _, means in told])
    transport = choose.make_transport(groups, mine, config.node_size, symmetric=symmetric, timeout_s=timeout_s)
    return Balancer(config, transport, name=f"ranks-{mine[0]}-{mine[-1]}" if mine else "none")


def _symmetric(config: BalanceConfig, groups: Sequence[tuple[int, ...]], told: Sequence[choose.Means]) -> bool:
    """Whether weights and gradients travel through symmetric memory; the same on every rank."""
    if config.transport == "collective":
        return False
    # A node size that no layout allows is refused where layers are adopted.
    if config.node_size and any(len(group) % config.node_size for group in groups):
        return False
    why_not = choose.why_not_symmetric(groups, config.node_size, told)
    if not why_not:
        return True
    if config.transport == "symmetric":
        raise Unsupported(f"transport 'symmetric' cannot be used: {why_not}")
    if dist.get_rank() == 0:  # on GPUs it is worth a warning: the other one is faster
        log.log(logging.WARNING if torch.cuda.is_available() else logging.INFO, "transport 'collective': %s", why_not)
    return False


def _shared(config: BalanceConfig) -> tuple[Any, ...]:
    """The settings that all ranks must share."""
    own = {"enabled", "record", "record_mib", "profile", "allow_untested"}
    return tuple(value for name, value in dataclasses.asdict(config).items() if name not in own)


def detach(model: torch.nn.Module | Sequence[torch.nn.Module]) -> None:
    """Give a balanced model back as it was; a model that is not balanced stays as it is. Collective like attach."""
    owners = {id(a.owner): a.owner for layer in moe_layers(model) if (a := getattr(layer, ATTRIBUTE, None))}
    for owner in owners.values():
        owner.release()


def _parents(model: torch.nn.Module | Sequence[torch.nn.Module]) -> dict[int, torch.nn.Module]:
    """The transformer layer of each MoE layer, by the id of the latter."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    kind = compat.moe_layer_class()
    found = ((getattr(module, "mlp", None), module) for chunk in chunks for module in chunk.modules())
    return {id(mlp): module for mlp, module in found if isinstance(mlp, kind)}


def _reduced_after_backward(model: torch.nn.Module | Sequence[torch.nn.Module]) -> bool:
    """Whether every chunk is in a DistributedDataParallel that reduces gradients when backward has ended."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    configs = [getattr(chunk, "ddp_config", None) for chunk in chunks]
    return all(config is not None and not config.overlap_grad_reduce for config in configs)
