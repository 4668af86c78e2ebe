"""What distinguishes the families: fields of their Hugging Face configs, and what of them is refused.

Sources: each family's ``configuration_*.py`` and ``modeling_*.py`` in transformers, and the published ``config.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rl.models.architecture import LatentAttention, Routing, UnsupportedModel, Yarn

Config = dict[str, Any]
_LATENT_NORM_EPS = 1e-6
_OLMOE_NORM_EPS = 1e-5


def _experts(config: Config) -> int:
    # transformers 5 saves each family's name as num_local_experts
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return int(config[next((name for name in names if name in config), names[0])])


def _sparse_layers(config: Config, layers: int) -> tuple[int, ...]:
    dense = set(config.get("mlp_only_layers") or ())
    step = int(config.get("decoder_sparse_step") or 1)
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _mixtral(config: Config, layers: int) -> dict[str, Any]:
    return {
        "experts": int(config["num_local_experts"]),
        "topk": int(config["num_experts_per_tok"]),
        "moe_ffn": int(config["intermediate_size"]),
        "moe_layers": tuple(range(layers)),
    }


def _qwen3_moe(config: Config, layers: int) -> dict[str, Any]:
    return {
        "experts": _experts(config),
        "topk": int(config["num_experts_per_tok"]),
        "moe_ffn": int(config["moe_intermediate_size"]),
        "moe_layers": _sparse_layers(config, layers),
        "normalize_topk": bool(config.get("norm_topk_prob", False)),
        "qk_norm": True,
    }


def _qwen2_moe(config: Config, layers: int) -> dict[str, Any]:
    return _qwen3_moe(config, layers) | {
        "qk_norm": False,
        "attention_bias": bool(config.get("qkv_bias", True)),
        "shared_ffn": int(config["shared_expert_intermediate_size"]),
        "shared_gate": True,
    }


def _olmoe(config: Config, layers: int) -> dict[str, Any]:
    if config.get("clip_qkv") is not None:
        raise UnsupportedModel(f"olmoe: clip_qkv={config['clip_qkv']} is not supported; published models have null")
    if float(config["rms_norm_eps"]) != _OLMOE_NORM_EPS:
        raise UnsupportedModel(
            f"olmoe: rms_norm_eps={config['rms_norm_eps']} is not supported, only {_OLMOE_NORM_EPS}: vLLM has that one "
            "whatever the config says"
        )
    return {
        "experts": _experts(config),
        "topk": int(config["num_experts_per_tok"]),
        "moe_ffn": int(config["intermediate_size"]),
        "moe_layers": tuple(range(layers)),
        "normalize_topk": bool(config.get("norm_topk_prob", False)),
        "qk_norm": True,
        "qk_norm_whole": True,
    }


def _sigmoid_moe(config: Config, layers: int) -> dict[str, Any]:
    """MoE layers of DeepSeek-V3 and GLM-4-MoE."""
    family = config["model_type"]
    groups, chosen = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    topk = int(config["num_experts_per_tok"])
    refused = []
    if config.get("scoring_func", "sigmoid") != "sigmoid" or config.get("topk_method", "noaux_tc") != "noaux_tc":
        refused.append(
            f"the router scoring_func={config.get('scoring_func')!r}, topk_method={config.get('topk_method')!r} "
            "(expected 'sigmoid' and 'noaux_tc')"
        )
    if not config.get("norm_topk_prob", True):
        refused.append("norm_topk_prob=false with sigmoid scores, which Megatron always normalises")
    if topk < 2:
        refused.append("num_experts_per_tok=1 with sigmoid scores, which Megatron then does not normalise")
    if groups > 1 and topk // chosen != 2:
        refused.append(
            f"routing in groups with num_experts_per_tok={topk} and topk_group={chosen}: a group's score is the sum of "
            "its best two experts in the model, and of num_experts_per_tok // topk_group in Megatron"
        )
    if int(config.get("moe_layer_freq", 1)) != 1:
        refused.append(f"moe_layer_freq={config['moe_layer_freq']} (expected 1)")
    if refused:
        raise UnsupportedModel(f"{family}: not supported: " + "; ".join(refused))
    return {
        "experts": _experts(config),
        "topk": topk,
        "moe_ffn": int(config["moe_intermediate_size"]),
        "moe_layers": tuple(range(int(config.get("first_k_dense_replace") or 0), layers)),
        "shared_ffn": int(config["moe_intermediate_size"]) * int(config.get("n_shared_experts") or 0),
        "routing": Routing("sigmoid", groups, chosen, float(config.get("routed_scaling_factor", 1.0))),
    }


def _glm4_moe(config: Config, layers: int) -> dict[str, Any]:
    parameters = config.get("rope_parameters") or {}
    fraction = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    return _sigmoid_moe(config, layers) | {
        "qk_norm": bool(config.get("use_qk_norm", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
        "rotary_fraction": float(fraction),
    }


def _deepseek_v3(config: Config, layers: int) -> dict[str, Any]:
    if float(config["rms_norm_eps"]) != _LATENT_NORM_EPS:
        raise UnsupportedModel(
            f"deepseek_v3: rms_norm_eps={config['rms_norm_eps']} is not supported, only {_LATENT_NORM_EPS}: norms of "
            "the latents have that epsilon whatever the config says, and Megatron has one for all"
        )
    missing = [name for name in ("scoring_func", "topk_method") if name not in config]
    if missing:
        raise UnsupportedModel(
            f"deepseek_v3: config.json has no {' and no '.join(missing)}, without which vLLM routes by softmax and has "
            'no bias: add "scoring_func": "sigmoid" and "topk_method": "noaux_tc", as published models have'
        )
    if not config.get("rope_interleave", True):
        raise UnsupportedModel("deepseek_v3: rope_interleave=false is not supported: Megatron's rotates pairs")
    if not config.get("q_lora_rank"):
        raise UnsupportedModel(
            "deepseek_v3: q_lora_rank=null (Moonlight) is not supported: Megatron-core 0.19 norms such queries, which "
            "the model does not"
        )
    latent = LatentAttention(
        q_rank=int(config["q_lora_rank"]),
        kv_rank=int(config["kv_lora_rank"]),
        plain_dim=int(config["qk_nope_head_dim"]),
        rotary_dim=int(config["qk_rope_head_dim"]),
        value_dim=int(config["v_head_dim"]),
    )
    return _sigmoid_moe(config, layers) | {
        # What Megatron calls qk_layernorm are here the norms of the latents.
        "qk_norm": True,
        "kv_heads": int(config["num_attention_heads"]),
        "head_dim": latent.plain_dim + latent.rotary_dim,
        "latent": latent,
        "yarn": _yarn(config),
    }


OF_FAMILY: dict[str, Callable[[Config, int], dict[str, Any]]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "llama": lambda config, layers: {},
    "qwen3": lambda config, layers: {"qk_norm": True},
    "qwen2_moe": _qwen2_moe,
    "olmoe": _olmoe,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek_v3,
}
"""Fields of :class:`Architecture` beside those that all families share, from the config and the number of layers."""


def rope_theta(config: Config) -> float:
    """Base of the rotary embedding.

    Raises:
        UnsupportedModel: one that is scaled, but for YaRN in DeepSeek-V3.
    """
    parameters, kind = _rope(config)
    if kind != "default" and (config["model_type"], kind) != ("deepseek_v3", "yarn"):
        raise UnsupportedModel(f"rope_type {kind!r} is not supported, only 'default' (and 'yarn' in deepseek_v3)")
    return float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _rope(config: Config) -> tuple[Config, str]:
    """Parameters of the rotary embedding, under the name of transformers 5 or the older one, and their kind."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return parameters, parameters.get("rope_type", parameters.get("type", "default"))


def _yarn(config: Config) -> Yarn | None:
    parameters, kind = _rope(config)
    if kind != "yarn":
        return None
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    refused = [
        f"{name}={parameters[name]}"
        for name, default in (("attention_factor", None), ("truncate", True))
        if parameters.get(name, default) != default
    ]
    if not scale_all and (scale or 1.0) != 1.0:
        # transformers then takes 1 for both, Megatron and vLLM take it as it is.
        refused.append(f"mscale={scale} without mscale_all_dim")
    if refused:
        raise UnsupportedModel(f"{config['model_type']}: not supported in a yarn embedding: " + "; ".join(refused))
    return Yarn(
        factor=float(parameters["factor"]),
        original_positions=int(parameters["original_max_position_embeddings"]),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        scale=float(scale or 1.0),
        scale_all=float(scale_all or 0.0),
    )


def refuse_uncovered(config: Config) -> None:
    """Raise for features that no family of ours has here.

    Raises:
        UnsupportedModel: naming all that were found.
    """
    family = config["model_type"]
    refused = []
    if config.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act {config['hidden_act']!r} (expected 'silu')")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        refused.append(f"a quantized checkpoint (convert it to bf16 first; it is {method!r})")
    if config.get("sliding_window") and config.get("use_sliding_window", family == "mixtral"):
        refused.append(f"sliding-window attention (sliding_window={config['sliding_window']}; set it to null)")
    if config.get("mlp_bias"):
        refused.append("biases in the MLP (mlp_bias)")
    if heads := (config.get("num_nextn_predict_layers") or config.get("num_mtp_layers")):
        last = int(config["num_hidden_layers"])
        refused.append(
            f"multi-token-prediction heads (num_nextn_predict_layers={heads}; remove the tensors model.layers.{last} "
            "and above from the checkpoint and set it to 0)"
        )
    if config.get("attention_bias") and family != "glm4_moe":
        refused.append("attention_bias")
    if refused:
        raise UnsupportedModel(f"{family}: not supported: " + "; ".join(refused))
