"""One stock MoE layer on an expert-parallel group, run with and without balancing."""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.megatron import compat, cpu
from megatron_ultraep.megatron.attach import attach, detach, make_balancer
from megatron_ultraep.megatron.checkpoint import set_home_slot
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.megatron.support import Unsupported

BALANCE = BalanceConfig(slots=2, min_tokens=1, gate=False, tolerance=0.0)


@dataclass(frozen=True)
class Case:
    """A layer, its tokens, and what is special about it.

    Attributes:
        tokens: rows of each rank's micro-batch.
        skew: how much the router prefers the first experts; 0 leaves it as it is.
        layout: parallel sizes besides the world's.
        config: fields of Megatron's ``TransformerConfig``.
        micro_batches: forward and backward passes whose gradients add up.
        plain_router: route by plain softmax; Megatron's router cannot take zero tokens.
    """

    tokens: tuple[int, ...] = (48, 48)
    skew: float = 3.0
    dtype: torch.dtype = torch.float64
    layout: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    plain_router: bool = False


def moe_config(case: Case, **overrides: Any) -> Any:
    """A small layer's configuration: 8 experts, top-2, hidden 32."""
    world = dist.get_world_size()
    kwargs: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 48,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp64" if case.dtype == torch.float64 else "fp32",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "expert_model_parallel_size": case.layout.get("ep", world),
        "tensor_model_parallel_size": case.layout.get("tp", 1),
        "expert_tensor_parallel_size": case.layout.get("etp", 1),
        "sequence_parallel": case.layout.get("tp", 1) > 1,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "params_dtype": case.dtype,
        "bf16": case.dtype == torch.bfloat16,
        "bias_activation_fusion": False,
        "moe_grouped_gemm": compat.has_transformer_engine(),
        "gradient_accumulation_fusion": False,
    }
    return compat.transformer_config(**(kwargs | case.config | overrides))


def build(case: Case, **overrides: Any) -> Any:
    """The stock layer with weights that depend on names alone, and a router that prefers the first experts."""
    cpu.install()
    world = dist.get_world_size()
    groups = create_groups(ParallelLayout(world=world, **({"ep": world} | case.layout)), timeout_s=60)
    where = groups.coordinates
    compat.ensure_scratch_buffer()
    compat.seed_rng(1, tp_rank=where["tp"], ep_rank=where["ep"], etp_rank=where["etp"])
    config = moe_config(case, **overrides)
    layer = compat.moe_layer(config, groups.collection, transformer_engine=compat.has_transformer_engine())
    layer.to(case.dtype)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        expert = where["ep"] if ".local_experts." in name or "experts.linear" in name else 0
        generator = torch.Generator().manual_seed(1000 * expert + number)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with torch.no_grad():  # the first feature of every token is 1
        experts = torch.arange(config.num_moe_experts)
        layer.router.weight[:, 0] = -case.skew * experts / config.num_moe_experts
    if torch.cuda.is_available():
        layer.cuda()
    if case.plain_router:
        layer.route = functools.partial(_plain_route, layer)
    return layer


def _plain_route(layer: Any, hidden: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.softmax(hidden.reshape(-1, hidden.shape[-1]) @ layer.router.weight.t(), dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(layer.config.moe_router_topk, dim=1).indices, True)
    return scores * chosen, chosen


def inputs(case: Case, layer: Any, micro_batch: int = 0) -> torch.Tensor:
    """Hidden states ``[tokens of this rank, 1, hidden]``."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(77 + 100 * micro_batch + rank)
    hidden = torch.randn(case.tokens[rank], 1, layer.config.hidden_size, generator=generator)
    hidden[..., 0] = 1
    return hidden.to(next(layer.parameters())).requires_grad_()


def run(case: Case, layer: Any) -> dict[str, Any]:
    """Output, input gradients and weight gradients of this rank after all micro-batches."""
    found: dict[str, Any] = {}
    layer.zero_grad()
    for i in range(case.micro_batches):
        hidden = inputs(case, layer, i)
        output, bias = layer(hidden)
        assert bias is None
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
        (output * weight).sum().backward()
        found[f"output {i}"] = output.detach().double().cpu()
        found[f"input gradient {i}"] = hidden.grad.double().cpu()
    found |= {n: p.grad.double().cpu() for n, p in layer.named_parameters() if p.grad is not None}
    return found


def stock_and_balanced(case: Case, balance: BalanceConfig = BALANCE) -> dict[str, Any]:
    """Both runs of one layer, and what balancing did."""
    layer = build(case)
    stock = run(case, layer)
    planned: list[Any] = []
    balancer = attach(layer, balance)
    attached = layer._ultraep.balancer
    observe = attached.observe
    attached.observe = lambda each: (planned.append(each), observe(each))
    balanced = run(case, layer)
    names = [n for n, _ in layer.named_parameters()]
    buffers = balancer.slot_bytes
    plans = [each.plan for each in planned]
    detach(layer)
    again = run(case, layer)
    return {
        "stock": stock,
        "balanced": balanced,
        "again": again,
        "plans": [(p.replica_expert, p.quota, p.before, p.after, [d.outcome for d in p.decisions]) for p in plans],
        "names": names,
        "slot_bytes": buffers,
    }


def worst(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, str]:
    """max|a - b| / max|b| of the worst tensor, and its name; tensors that are zero in ``b`` must be zero in ``a``."""
    assert set(a) == set(b), set(a) ^ set(b)
    differences = []
    for name in b:
        if b[name].numel() == 0:
            assert a[name].shape == b[name].shape
            continue
        scale = float(b[name].abs().max())
        differences.append((float((a[name] - b[name]).abs().max()) / (scale or 1.0), name))
    return max(differences)


def refusal(config: dict[str, Any], balance: BalanceConfig = BALANCE, layout: dict[str, Any] | None = None) -> str:
    """What attach says of a layer with this configuration; the layer must be as it was."""
    case = Case(tokens=(8,) * dist.get_world_size(), layout=layout or {})
    layer = build(case)
    # After building: some of these cannot be built here.
    layer.config = copy.copy(layer.config)
    for name, value in config.items():
        setattr(layer.config, name, value)
    before = dict(layer.__dict__), type(layer)
    try:
        attach(layer, balance)
    except Unsupported as error:
        assert (dict(layer.__dict__), type(layer)) == before
        return str(error)
    raise AssertionError(f"not refused: {config}")


def permuted(case: Case, home_slot: tuple[int, ...]) -> dict[str, Any]:
    """A stock layer beside a balanced one whose experts live elsewhere, with the same weights by logical expert."""
    layer = build(case)
    stock = run(case, layer)
    experts = layer.config.num_moe_experts
    world, rank = dist.get_world_size(), dist.get_rank()
    layout = ExpertLayout(experts, world, home_slot)
    local = [list(expert.parameters()) for expert in layer.experts.local_experts]
    whole: list[Any] = [None] * world
    dist.all_gather_object(whole, [[p.detach().clone() for p in expert] for expert in local])
    logical = [expert for part in whole for expert in part]
    with torch.no_grad():
        for place, expert in enumerate(layout.experts_of(rank)):
            for parameter, value in zip(local[place], logical[expert], strict=True):
                parameter.copy_(value)
    balancer = make_balancer(BALANCE, range(world))
    balancer.adopt(layer, home_slot=home_slot)
    balanced = run(case, layer)
    names = [f"experts.local_experts.{{}}.{name}" for name, _ in layer.experts.local_experts[0].named_parameters()]
    found = {}
    for place, expert in enumerate(layout.experts_of(rank)):
        for name in names:
            found[expert, name] = balanced.pop(name.format(place))
    per_rank = experts // world
    expected = {(rank * per_rank + i, name): stock.pop(name.format(i)) for i in range(per_rank) for name in names}
    refused = ""
    try:
        balancer.release()
    except Unsupported as error:
        refused = str(error)
    set_home_slot(layer, range(experts))
    balancer.release()
    same = {"stock": stock, "balanced": balanced, "home": found, "expected": expected, "replicas": balancer.replicas}
    return same | {"refused": refused}


def frozen_experts(case: Case) -> dict[str, Any]:
    """Both runs of a layer whose experts are not trained."""
    layer = build(case)
    layer.experts.requires_grad_(False)
    stock = run(case, layer)
    balancer = attach(layer, BALANCE)
    return {"stock": stock, "balanced": run(case, layer), "replicas": balancer.replicas}


def frozen_in_part() -> str:
    """What attach says of experts of which one parameter is frozen."""
    layer = build(Case())
    next(layer.experts.parameters()).requires_grad_(False)
    try:
        attach(layer, BALANCE)
    except Unsupported as error:
        return str(error)
    return ""


def left_alone() -> tuple[bool, bool]:
    """Whether ``enabled=False`` changes nothing, and whether attaching twice is refused."""
    case = Case()
    layer = build(case)

    def state(module: torch.nn.Module) -> list[Any]:
        hooks = [{k: len(v) for k, v in m.__dict__.items() if "hook" in k and v} for m in module.modules()]
        return [type(module), dict(module.__dict__), hooks, [id(m) for m in module.modules()]]

    before = state(layer)
    untouched = attach(layer, BalanceConfig(enabled=False)) is None and state(layer) == before
    attach(layer, BALANCE)
    try:
        attach(layer, BALANCE)
    except Unsupported as error:
        return untouched, "already" in str(error)
    return untouched, False


def different_settings() -> str:
    """What attach says when ranks are given different settings."""
    layer = build(Case())
    try:
        attach(layer, dataclasses.replace(BALANCE, slots=1 + dist.get_rank()))
    except Unsupported as error:
        return str(error)
    return ""


def measured_gate() -> tuple[Any, int]:
    """The gate's constants as measured on this rank, and the replicas made when a copy costs a fortune."""
    case = Case(tokens=(64, 64))
    layer = build(case)
    balancer = attach(layer, BalanceConfig(slots=2, min_tokens=1))
    costs = balancer.costs
    assert all(p.grad is None for p in layer.parameters())
    detach(layer)
    dear = attach(layer, BalanceConfig(slots=2, min_tokens=1, token_ns=1, copy_ns_per_mib=10**9))
    run(case, layer)
    return costs, dear.replicas
