"""What we need to know of a Hugging Face model to build it in Megatron, read from its ``config.json``.

Families: see ``FAMILIES``; what each one's config says is read in ``rl.models.families``. Others are refused by name.
``mbridge`` was considered for this and for the weights: see docs/notes/models.md for why it does not do the job here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3_moe", "mixtral", "llama", "qwen3", "qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        q_rank: rank of the queries' latent.
        kv_rank: rank of the latent of keys and values.
        plain_dim, rotary_dim: of a query or key head, without and with rotary positions.
        value_dim: of a value head.
    """

    q_rank: int
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int


@dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched to longer sequences (YaRN, arXiv 2309.00071), as DeepSeek's models have them.

    Attributes:
        factor: by which positions are stretched.
        original_positions: longest sequence before.
        beta_fast, beta_slow: rotations within that length at which stretching begins and is complete.
        scale: ``mscale`` of the config; with ``scale_all`` it scales rotated dimensions.
        scale_all: ``mscale_all_dim`` of the config; squared into the softmax's scale.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    scale: float = 1.0
    scale_all: float = 0.0


@dataclass(frozen=True)
class Routing:
    """How a router turns logits into the chosen experts' weights.

    Attributes:
        scores: ``"softmax"``, or ``"sigmoid"`` with a bias per expert that only chooses (DeepSeek-V3, arXiv 2412.19437,
            section 2.1.2). The bias is frozen: RL trains without balancing by bias, and what rollout saw must stay.
        groups: experts are cut into so many groups; 1 is no limit.
        chosen_groups: a token's experts come from so many of them.
        scale: factor of the chosen experts' weights.
    """

    scores: str = "softmax"
    groups: int = 1
    chosen_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with rotary positions, RMSNorm and SwiGLU.

    Attributes:
        family: ``model_type`` of the Hugging Face config.
        layers: number of transformer layers.
        moe_layers: 0-based indices of the layers that are MoE; MoE layer i of routes is ``moe_layers[i]``.
        hidden, heads, kv_heads, head_dim: attention sizes.
        ffn: intermediate size of dense layers.
        moe_ffn: intermediate size of an expert.
        experts, topk: of MoE layers; 0 when dense.
        normalize_topk: whether the chosen experts' probabilities are renormalised to 1.
        qk_norm: RMSNorm on queries and keys, head by head.
        attention_bias: biases of the q, k and v projections.
        vocab: vocabulary size.
        tied: whether the output layer is the embedding.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary embedding.
        max_positions: longest sequence the model is made for.
        dtype: dtype name in the config, e.g. ``"bfloat16"``.
        qk_norm_whole: RMSNorm on queries and keys, over all heads together; with ``qk_norm``.
        shared_ffn: intermediate size of the shared expert, 0 without one.
        shared_gate: the shared expert's output is scaled by a sigmoid gate.
        routing: of MoE layers.
        rotary_fraction: part of a head's dimensions that is rotated.
        latent: multi-head latent attention; None for grouped-query attention.
        yarn: how rotary positions are stretched; None leaves them.
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
    qk_norm_whole: bool = False
    shared_ffn: int = 0
    shared_gate: bool = False
    routing: Routing = Routing()
    rotary_fraction: float = 1.0
    latent: LatentAttention | None = None
    yarn: Yarn | None = None
    scalar_head: bool = False

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @property
    def tensor_parallel(self) -> bool:
        """Whether its attention may be cut: latents were not tested, norms over all heads need all heads."""
        return self.latent is None and not self.qk_norm_whole

    def moe_layer_of(self) -> dict[int, int]:
        """Index among the MoE layers, by Megatron's 1-based layer number."""
        return {layer + 1: i for i, layer in enumerate(self.moe_layers)}


class UnsupportedModel(ValueError):
    """A model that this project does not build; says which part of its config and what is supported."""


def read_architecture(directory: str | Path) -> Architecture:
    """Read ``config.json`` of a Hugging Face model directory.

    Raises:
        FileNotFoundError: no ``config.json``.
        UnsupportedModel: a family or feature that is not covered, or a file that is no model's config.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a Hugging Face model directory with a config.json, found none in {directory}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UnsupportedModel(f"expected JSON in {path}: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"expected an object in {path}, found {type(config).__name__}")
    return architecture(config)


def architecture(config: dict[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config (as a dict) describes.

    Raises:
        UnsupportedModel: a family or feature that is not covered, or a field that the family's configs have is missing.
    """
    try:
        return _architecture(config)
    except KeyError as error:
        raise UnsupportedModel(f"{config.get('model_type')}: config.json has no {error.args[0]}") from error


def _architecture(config: dict[str, Any]) -> Architecture:
    from rl.models import families

    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    families.refuse_uncovered(config)
    layers = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    fields: dict[str, Any] = {
        "family": family,
        "layers": layers,
        "moe_layers": (),
        "hidden": int(config["hidden_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "ffn": int(config["intermediate_size"]),
        "moe_ffn": 0,
        "experts": 0,
        "topk": 0,
        "normalize_topk": True,
        "qk_norm": False,
        "attention_bias": False,
        "vocab": int(config["vocab_size"]),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": float(config["rms_norm_eps"]),
        "rope_theta": families.rope_theta(config),
        "max_positions": int(config["max_position_embeddings"]),
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
    }
    found = Architecture(**(fields | families.OF_FAMILY[family](config, layers)))
    if found.topk == 1 and found.normalize_topk:
        raise UnsupportedModel(
            f"{family}: one expert a token (top-1) whose probability is renormalised is not supported: it is always 1, "
            "so nothing would be learnt about routing, and Megatron-core refuses it; choose top-2 or more"
        )
    return found
