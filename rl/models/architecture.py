"""What we need to know of a Hugging Face model to build it in Megatron, read from its ``config.json``.

Families: ``qwen3_moe``, ``mixtral``, ``llama`` (and ``qwen3``, dense). Others are refused by name. ``mbridge`` was
considered for this and for the weights: see docs/notes/models.md for why it does not do the job here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3_moe", "mixtral", "llama", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with grouped-query attention, rotary positions, RMSNorm and SwiGLU.

    Attributes:
        family: ``model_type`` of the Hugging Face config.
        layers: number of transformer layers.
        moe_layers: 0-based indices of the layers that are MoE; MoE layer i of routes is ``moe_layers[i]``.
        hidden, heads, kv_heads, head_dim: attention sizes.
        ffn: intermediate size of dense layers.
        moe_ffn: intermediate size of an expert.
        experts, topk: of MoE layers; 0 when dense.
        normalize_topk: whether the chosen experts' probabilities are renormalised to 1.
        qk_norm: RMSNorm on queries and keys.
        attention_bias: biases of the q, k and v projections.
        vocab: vocabulary size.
        tied: whether the output layer is the embedding.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary embedding.
        max_positions: longest sequence the model is made for.
        dtype: dtype name in the config, e.g. ``"bfloat16"``.
        scalar_head: gives one number per row instead of the vocabulary, as Hugging Face's sequence classification with
            one label does; see ``rl.models.critic``.
    """

    family: str
    layers: int
    moe_layers: tuple[int, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    moe_ffn: int
    experts: int
    topk: int
    normalize_topk: bool
    qk_norm: bool
    attention_bias: bool
    vocab: int
    tied: bool
    norm_eps: float
    rope_theta: float
    max_positions: int
    dtype: str
    scalar_head: bool = False

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    def moe_layer_of(self) -> dict[int, int]:
        """Index among the MoE layers, by Megatron's 1-based layer number."""
        return {layer + 1: i for i, layer in enumerate(self.moe_layers)}


class UnsupportedModel(ValueError):
    """A model that this project does not build; says which part of its config and what is supported."""


def read_architecture(directory: str | Path) -> Architecture:
    """Read ``config.json`` of a Hugging Face model directory.

    Raises:
        FileNotFoundError: no ``config.json``.
        UnsupportedModel: a family or feature that is not covered.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a Hugging Face model directory with a config.json, found none in {directory}"
        )
    return architecture(json.loads(path.read_text()))


def architecture(config: dict[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config (as a dict) describes."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_uncovered(config)
    layers = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    experts, topk, moe_ffn, moe_layers, normalize = _moe(config, layers)
    return Architecture(
        family=family,
        layers=layers,
        moe_layers=moe_layers,
        hidden=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        ffn=int(config["intermediate_size"]),
        moe_ffn=moe_ffn,
        experts=experts,
        topk=topk,
        normalize_topk=normalize,
        qk_norm=family in ("qwen3_moe", "qwen3"),
        attention_bias=bool(config.get("attention_bias", False)),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=_rope_theta(config),
        max_positions=int(config["max_position_embeddings"]),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
    )


def _moe(config: dict[str, Any], layers: int) -> tuple[int, int, int, tuple[int, ...], bool]:
    family = config["model_type"]
    if family == "mixtral":
        return (
            int(config["num_local_experts"]),
            int(config["num_experts_per_tok"]),
            int(config["intermediate_size"]),
            tuple(range(layers)),
            True,
        )
    if family == "qwen3_moe":
        dense = set(config.get("mlp_only_layers") or ())
        step = int(config.get("decoder_sparse_step") or 1)
        moe_layers = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
        return (
            # transformers 5 saves it as num_local_experts
            int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
            int(config["num_experts_per_tok"]),
            int(config["moe_intermediate_size"]),
            moe_layers,
            bool(config.get("norm_topk_prob", False)),
        )
    return 0, 0, 0, (), True


def _rope_theta(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UnsupportedModel(f"rope_type {kind!r} is not supported, only 'default'")
    return float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _refuse_uncovered(config: dict[str, Any]) -> None:
    refused = []
    if config.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act {config['hidden_act']!r} (expected 'silu')")
    if config.get("quantization_config"):
        refused.append("a quantized checkpoint (convert it to bf16 first)")
    if config.get("sliding_window") and config.get("use_sliding_window", config["model_type"] == "mixtral"):
        refused.append(f"sliding-window attention (sliding_window={config['sliding_window']}; set it to null)")
    if config.get("mlp_bias"):
        refused.append("biases in the MLP (mlp_bias)")
    if config.get("num_nextn_predict_layers"):
        refused.append("multi-token-prediction heads (num_nextn_predict_layers)")
    if config.get("attention_bias"):
        refused.append("attention_bias")
    if refused:
        raise UnsupportedModel(f"{config['model_type']}: not supported: " + "; ".join(refused))
