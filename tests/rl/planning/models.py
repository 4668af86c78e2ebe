"""Models for the planner's tests: published dimensions, tiny ones of every family, and what really built ones hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.megatron.optimizer import held_by
from rl.models.architecture import Architecture, architecture
from rl.models.builder import DTYPES, build_model
from rl.models.critic import build_scalar_model

ROOT = Path(__file__).resolve().parents[3]

_BASE: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
}
_SIGMOID = {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": _BASE | {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
    "mixtral": _BASE | {"model_type": "mixtral", "num_local_experts": 8},
    "llama": _BASE | {"model_type": "llama"},
    "qwen3 tied": _BASE | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2_moe": _BASE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40, "num_key_value_heads": 4},
    "olmoe": _BASE | {"model_type": "olmoe", "rms_norm_eps": 1e-5},
    "glm4_moe": _BASE | _SIGMOID | {"model_type": "glm4_moe", "attention_bias": True},
    "deepseek_v3": _BASE
    | _SIGMOID
    | {
        "model_type": "deepseek_v3",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}
for _config in TINY.values():
    if _config["model_type"] in ("glm4_moe", "deepseek_v3"):
        _config.pop("num_experts", None)


def tiny(name: str) -> Architecture:
    """Of one of ``TINY``."""
    return architecture(TINY[name])


def published(name: str) -> Architecture:
    """Dimensions in ``recipes/models``."""
    return architecture(json.loads((ROOT / "recipes" / "models" / f"{name}.json").read_text()))


def really_built(
    name: str,
    layout: dict[str, Any],
    *,
    dtype: str = "float32",
    distributed: bool | None = None,
    scalar: bool = False,
) -> dict[str, Any]:
    """On a rank: sizes of every parameter of every chunk; with ``distributed``, bytes after an optimizer step."""
    arch = tiny(name)
    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **layout), timeout_s=60)
    build = build_scalar_model if scalar else build_model
    model = build(arch, groups, name="actor", dtype=DTYPES[dtype])
    found: dict[str, Any] = {"coordinates": dict(groups.coordinates), "chunks": []}
    for chunk in model.chunks:
        sizes: dict[str, list[int]] = {"dense": [], "experts": []}
        for parameter in chunk.parameters():
            sizes["dense" if getattr(parameter, "allreduce", True) else "experts"].append(parameter.numel())
        found["chunks"].append(sizes)
    if distributed is not None:
        found |= _after_a_step(model, dtype, distributed)
    return found


def _after_a_step(model: Any, dtype: str, distributed: bool) -> dict[str, int]:
    collection, bf16 = model.groups.collection, dtype == "bfloat16"
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(0.01)
    chunks = [compat.float16_module(model.config, chunk) if bf16 else chunk for chunk in model.chunks]
    wrapped = compat.distributed_data_parallel(
        model.config, chunks, collection, distributed_optimizer=distributed, grad_dtype_fp32=True
    )
    optimizer = compat.optimizer(
        wrapped, collection, lr=1e-3, bf16=bf16, params_dtype=DTYPES[dtype], use_distributed_optimizer=distributed
    )
    optimizer.step()
    storages: dict[int, int] = {}
    for held in held_by(optimizer).values():
        for tensor in held.tensors().values():
            storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for c in wrapped for p in c.parameters()}
    return {
        "optimizer": sum(storages.values()),
        "gradients": sum(each.untyped_storage().nbytes() for each in compat.gradient_buffers(wrapped)),
        "weights": sum(weights.values()),
        "elements": sum(p.numel() for c in wrapped for p in c.parameters()),
        "width": torch.empty((), dtype=DTYPES[dtype]).element_size(),
    }
