"""Which Hugging Face tensors a Megatron parameter is made of, and how.

Both spellings of Megatron are understood: the local modules' (CPU) and Transformer Engine's (GPU), whose linear layers
carry the norm before them and whose grouped experts are ``weight0``, ``weight1``, ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from rl.models.architecture import Architecture

Kind = Literal["plain", "vocab", "qkv", "gated"]


@dataclass(frozen=True)
class Logical:
    """One parameter of the whole model, independent of any layout.

    Attributes:
        key: unique, sortable in layer order: ``(layer or -1/layers, place, expert)``.
        hf: names of its Hugging Face tensors: one; gate and up (``gated``); or q, k and v (``qkv``).
        kind: how they are put together.
        tp_dim: dimension of the Megatron tensor that tensor-parallel ranks split, None when replicated.
        expert: logical expert, None for everything else.
    """

    key: tuple[int, int, int]
    hf: tuple[str, ...]
    kind: Kind = "plain"
    tp_dim: int | None = None
    expert: int | None = None


SCALAR_HEAD = "score.weight"
"""Hugging Face's name of the head that gives one number per row, ``[1, hidden]``."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_LOCAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_EXPERT_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")

# Megatron name inside a layer -> (place in the order, Hugging Face names, kind, tp_dim)
_IN_LAYER: dict[str, tuple[int, tuple[str, ...], Kind, int | None]] = {
    "input_layernorm.weight": (0, ("input_layernorm.weight",), "plain", None),
    "self_attention.linear_qkv.layer_norm_weight": (0, ("input_layernorm.weight",), "plain", None),
    "self_attention.linear_qkv.weight": (
        1,
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
        0,
    ),
    "self_attention.linear_qkv.bias": (
        11,
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
        0,
    ),
    "self_attention.q_layernorm.weight": (2, ("self_attn.q_norm.weight",), "plain", None),
    "self_attention.k_layernorm.weight": (3, ("self_attn.k_norm.weight",), "plain", None),
    "self_attention.linear_proj.weight": (4, ("self_attn.o_proj.weight",), "plain", 1),
    "pre_mlp_layernorm.weight": (5, ("post_attention_layernorm.weight",), "plain", None),
    "mlp.linear_fc1.layer_norm_weight": (5, ("post_attention_layernorm.weight",), "plain", None),
    "mlp.linear_fc1.weight": (6, ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated", 0),
    "mlp.linear_fc2.weight": (7, ("mlp.down_proj.weight",), "plain", 1),
}

# Where multi-head latent attention differs; Transformer Engine's up projections carry the norms of the latents.
_LATENT: dict[str, tuple[int, tuple[str, ...], Kind, int | None]] = {
    "self_attention.linear_q_down_proj.weight": (1, ("self_attn.q_a_proj.weight",), "plain", 0),
    "self_attention.q_layernorm.weight": (2, ("self_attn.q_a_layernorm.weight",), "plain", None),
    "self_attention.linear_q_up_proj.layer_norm_weight": (2, ("self_attn.q_a_layernorm.weight",), "plain", None),
    "self_attention.kv_layernorm.weight": (3, ("self_attn.kv_a_layernorm.weight",), "plain", None),
    "self_attention.linear_kv_up_proj.layer_norm_weight": (3, ("self_attn.kv_a_layernorm.weight",), "plain", None),
    "self_attention.linear_q_up_proj.weight": (12, ("self_attn.q_b_proj.weight",), "plain", 0),
    "self_attention.linear_kv_down_proj.weight": (13, ("self_attn.kv_a_proj_with_mqa.weight",), "plain", 0),
    "self_attention.linear_kv_up_proj.weight": (14, ("self_attn.kv_b_proj.weight",), "plain", 0),
}

_ROUTER = {"mixtral": "block_sparse_moe.gate.weight"}
_ROUTER_BIAS = "mlp.router.expert_bias"
_HF_ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
_SHARED = {"qwen2_moe": "mlp.shared_expert", "glm4_moe": "mlp.shared_experts", "deepseek_v3": "mlp.shared_experts"}
_MIXTRAL_EXPERTS: dict[str, tuple[str, ...]] = {
    "linear_fc1": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    "linear_fc2": ("block_sparse_moe.experts.{}.w2.weight",),
}
_EXPERTS: dict[str, tuple[str, ...]] = {
    "linear_fc1": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "linear_fc2": ("mlp.experts.{}.down_proj.weight",),
}


def sent_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a Hugging Face tensor is sent to engines as: ``dtype``, but float32 for routers' biases, which engines hold
    so; rounded, they would choose other experts."""
    return torch.float32 if name.endswith(_HF_ROUTER_BIAS) else dtype


def is_kept(name: str) -> bool:
    """Whether a buffer of a chunk belongs to the model's weights: routers' biases do, statistics do not."""
    return name.endswith(_ROUTER_BIAS)


def logical(name: str, arch: Architecture, *, layer_of: dict[int, int], experts: tuple[int, ...]) -> Logical | None:
    """What a parameter, or a buffer that is kept, of a bare ``GPTModel`` chunk is.

    Args:
        name: from ``named_parameters()`` or ``named_buffers()``.
        arch: of the model.
        layer_of: global 0-based layer by the index in this chunk.
        experts: logical experts at home on this rank, in the order of its local experts.

    Returns:
        The logical parameter; None for a tied output layer, whose values are the embedding's.

    Raises:
        KeyError: a parameter that no Hugging Face tensor corresponds to.
    """
    if name == "embedding.word_embeddings.weight":
        return Logical((-1, 0, 0), ("model.embed_tokens.weight",), "vocab", 0)
    if name == "output_layer.weight" and arch.scalar_head:
        return Logical((arch.layers, 1, 0), (SCALAR_HEAD,))
    if name == "output_layer.weight":
        return None if arch.tied else Logical((arch.layers, 1, 0), ("lm_head.weight",), "vocab", 0)
    if name == "decoder.final_layernorm.weight":
        return Logical((arch.layers, 0, 0), ("model.norm.weight",))
    match = _LAYER.fullmatch(name)
    if not match:
        raise KeyError(f"no Hugging Face tensor corresponds to Megatron's {name!r} in {arch.family}")
    layer, rest = layer_of[int(match[1])], match[2]
    prefix = f"model.layers.{layer}."
    table = _in_layer(arch)
    if rest in table:
        place, hf, kind, tp_dim = table[rest]
        return Logical((layer, place, 0), tuple(prefix + n for n in hf), kind, tp_dim)
    if found := _EXPERT_LOCAL.fullmatch(rest):
        local, projection = int(found[1]), found[2]
    elif found := _EXPERT_GROUPED.fullmatch(rest):
        local, projection = int(found[2]), found[1]
    else:
        raise KeyError(f"no Hugging Face tensor corresponds to Megatron's {name!r} in {arch.family}")
    expert = experts[local]
    names = _MIXTRAL_EXPERTS if arch.family == "mixtral" else _EXPERTS
    hf = tuple(prefix + n.format(expert) for n in names[projection])
    if projection == "linear_fc1":
        return Logical((layer, 9, expert), hf, "gated", 0, expert)
    return Logical((layer, 10, expert), hf, "plain", 1, expert)


def _in_layer(arch: Architecture) -> dict[str, tuple[int, tuple[str, ...], Kind, int | None]]:
    """Everything of a layer but its experts."""
    table = _IN_LAYER | (_LATENT if arch.latent else {})
    table["mlp.router.weight"] = (8, (_ROUTER.get(arch.family, "mlp.gate.weight"),), "plain", None)
    table[_ROUTER_BIAS] = (15, (_HF_ROUTER_BIAS,), "plain", None)
    if shared := _SHARED.get(arch.family):
        table["mlp.shared_experts.linear_fc1.weight"] = (
            16,
            (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
            "gated",
            0,
        )
        table["mlp.shared_experts.linear_fc2.weight"] = (17, (f"{shared}.down_proj.weight",), "plain", 1)
        table["mlp.shared_experts.gate_weight"] = (18, (f"{shared}_gate.weight",), "plain", None)
    return table
