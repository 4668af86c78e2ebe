"""Tiny models and tokenizers, made on the spot: for tests, for the smoke recipe, for a laptop without a network.

Each maker writes one directory that vLLM, transformers and our own loader accept like any downloaded model:
``config.json``, ``generation_config.json``, ``model.safetensors`` with one tensor per expert under the standard
Hugging Face names, and the files of a tokenizer. Weights are random, a pure function of ``seed``; they are drawn
wider than a real model's, so that routers and next-token distributions are far from uniform.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.models.tiny_tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, place_tokenizer, train_tokenizer

__all__ = [
    "deepseek_v3",
    "for_reasoning_gym",
    "glm4_moe",
    "llama",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "tensor_names",
    "train_tokenizer",
]
_ROUTER_BIAS = "e_score_correction_bias"
_EXPERTS_FIELD = {
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "olmoe": "num_experts",
    "glm4_moe": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}


def for_reasoning_gym(
    path: str | Path,
    *,
    task: str,
    task_args: Mapping[str, Any] | None = None,
    texts: int = 2000,
    text_seed: int = 0,
    vocab_size: int = 384,
    **model: Any,
) -> Path:
    """A random Qwen3-MoE model whose tokenizer knows the wording of one reasoning-gym task.

    The wording of such a task repeats: learnt as whole phrases, a prompt takes few tokens, and a tiny model learns in
    minutes what it would otherwise spend on reading. Digits stay single tokens.

    Args:
        task, task_args: of reasoning-gym.
        texts, text_seed: problems whose wording the tokenizer learns, and their generator seed.
        vocab_size: upper limit of the vocabulary.
        model: arguments of :func:`qwen3_moe`.
    """
    from rl.data.sources import create_task

    problems = create_task(task, {**(task_args or {}), "size": texts, "seed": text_seed})
    tokenizer = Path(path) / "tokenizer"
    train_tokenizer((problems[i]["question"] for i in range(texts)), tokenizer, vocab_size, phrases=True)
    try:
        return qwen3_moe(path, tokenizer=tokenizer, **model)
    finally:
        shutil.rmtree(tokenizer)


def qwen3_moe(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    topk: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    moe_intermediate: int = 64,
    intermediate: int | None = None,
    mlp_only_layers: Sequence[int] = (),
    decoder_sparse_step: int = 1,
    tie_word_embeddings: bool = False,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random Qwen3-MoE model with its tokenizer to ``path`` and return the path.

    Args:
        tokenizer: directory of an existing tokenizer to copy in; None trains a bytes-only one.
        layers, hidden, heads, kv_heads, head_dim: the attention trunk. vLLM's CPU backend wants ``head_dim`` >= 32.
        experts, topk, moe_intermediate: each MoE layer.
        intermediate: width of dense MLPs (``mlp_only_layers``), default ``2 * hidden``.
        mlp_only_layers, decoder_sparse_step: which layers are dense, as in the HF config.
        dtype: "float32", "bfloat16" or "float16", of the saved tensors.
        seed: of the weights.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    config = Qwen3MoeConfig(
        **_trunk(vocabulary, layers, hidden, heads, kv_heads, max_positions, initializer_range),
        head_dim=head_dim,
        intermediate_size=intermediate or 2 * hidden,
        moe_intermediate_size=moe_intermediate,
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=True,
        decoder_sparse_step=decoder_sparse_step,
        mlp_only_layers=list(mlp_only_layers),
        tie_word_embeddings=tie_word_embeddings,
        router_aux_loss_coef=0.0,
    )
    return _save(Qwen3MoeForCausalLM, config, path, dtype, seed)


def mixtral(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    topk: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    intermediate: int = 64,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random Mixtral model with its tokenizer to ``path``; arguments as in :func:`qwen3_moe`.

    ``hidden / heads`` is the head dimension; vLLM's CPU backend wants >= 32.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    config = MixtralConfig(
        **_trunk(vocabulary, layers, hidden, heads, kv_heads, max_positions, initializer_range),
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_experts_per_tok=topk,
        sliding_window=None,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
    )
    return _save(MixtralForCausalLM, config, path, dtype, seed)


def llama(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    intermediate: int = 128,
    tie_word_embeddings: bool = False,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random dense Llama model with its tokenizer to ``path``; arguments as in :func:`qwen3_moe`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    config = LlamaConfig(
        **_trunk(vocabulary, layers, hidden, heads, kv_heads, max_positions, initializer_range),
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        tie_word_embeddings=tie_word_embeddings,
    )
    return _save(LlamaForCausalLM, config, path, dtype, seed)


def qwen2_moe(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    topk: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    moe_intermediate: int = 64,
    shared_intermediate: int = 96,
    mlp_only_layers: Sequence[int] = (0,),
    decoder_sparse_step: int = 1,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random Qwen2-MoE model to ``path``: gated shared expert, biases of q, k and v; see :func:`qwen3_moe`."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    config = Qwen2MoeConfig(
        **_trunk(vocabulary, layers, hidden, heads, kv_heads, max_positions, initializer_range),
        intermediate_size=2 * hidden,
        moe_intermediate_size=moe_intermediate,
        shared_expert_intermediate_size=shared_intermediate,
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=False,
        decoder_sparse_step=decoder_sparse_step,
        mlp_only_layers=list(mlp_only_layers),
        router_aux_loss_coef=0.0,
    )
    return _save(Qwen2MoeForCausalLM, config, path, dtype, seed, vectors=True)


def olmoe(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    topk: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    intermediate: int = 64,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random OLMoE model to ``path``: norms over whole queries and keys; arguments as in :func:`qwen3_moe`."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    trunk = _trunk(vocabulary, layers, hidden, heads, kv_heads, max_positions, initializer_range)
    config = OlmoeConfig(
        **(trunk | {"rms_norm_eps": 1e-5}),
        intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
    )
    return _save(OlmoeForCausalLM, config, path, dtype, seed, vectors=True)


def glm4_moe(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    topk: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    moe_intermediate: int = 64,
    dense_layers: int = 1,
    groups: int = 1,
    chosen_groups: int = 1,
    scale: float = 1.5,
    use_qk_norm: bool = True,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random GLM-4-MoE model to ``path``; arguments as in :func:`qwen3_moe`.

    Args:
        dense_layers: the first so many have no experts.
        groups, chosen_groups, scale: of the router, see ``rl.models.architecture.Routing``.
    """
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    config = Glm4MoeConfig(
        **_trunk(vocabulary, layers, hidden, heads, kv_heads, max_positions, initializer_range),
        **_sigmoid_moe(hidden, experts, topk, moe_intermediate, dense_layers, groups, chosen_groups, scale),
        head_dim=head_dim,
        attention_bias=True,
        use_qk_norm=use_qk_norm,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    return _save(Glm4MoeForCausalLM, config, path, dtype, seed, vectors=True)


def deepseek_v3(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    topk: int = 4,
    heads: int = 2,
    q_rank: int = 48,
    kv_rank: int = 32,
    plain_dim: int = 48,
    rotary_dim: int = 16,
    value_dim: int = 32,
    moe_intermediate: int = 64,
    dense_layers: int = 1,
    groups: int = 4,
    chosen_groups: int = 2,
    scale: float = 2.5,
    yarn: Mapping[str, float] | None = None,
    max_positions: int = 8192,
    initializer_range: float = 0.15,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random DeepSeek-V3 model to ``path``; arguments as in :func:`glm4_moe`.

    Args:
        q_rank, kv_rank, plain_dim, rotary_dim, value_dim: see ``rl.models.architecture.LatentAttention``. vLLM's CPU
            backend wants ``plain_dim + rotary_dim`` to be 32, 64, 96 or another of its head sizes.
        yarn: parameters of a YaRN embedding under the names of the config: ``factor``,
            ``original_max_position_embeddings`` and others.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    vocabulary = place_tokenizer(path, tokenizer)
    config = DeepseekV3Config(
        **_trunk(vocabulary, layers, hidden, heads, heads, max_positions, initializer_range),
        **_sigmoid_moe(hidden, experts, topk, moe_intermediate, dense_layers, groups, chosen_groups, scale),
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=plain_dim,
        qk_rope_head_dim=rotary_dim,
        v_head_dim=value_dim,
        rope_parameters={"rope_theta": 10000.0} | ({"rope_type": "yarn", **yarn} if yarn else {"rope_type": "default"}),
    )
    return _save(DeepseekV3ForCausalLM, config, path, dtype, seed, vectors=True)


def _sigmoid_moe(
    hidden: int,
    experts: int,
    topk: int,
    moe_intermediate: int,
    dense_layers: int,
    groups: int,
    chosen_groups: int,
    scale: float,
) -> dict[str, Any]:
    """The fields of MoE layers that GLM-4-MoE and DeepSeek-V3 share."""
    return {
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": moe_intermediate,
        "n_routed_experts": experts,
        "num_experts_per_tok": topk,
        "n_shared_experts": 1,
        "first_k_dense_replace": dense_layers,
        "n_group": groups,
        "topk_group": chosen_groups,
        "routed_scaling_factor": scale,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    }


def _trunk(
    vocabulary: int, layers: int, hidden: int, heads: int, kv_heads: int, max_positions: int, initializer_range: float
) -> dict[str, Any]:
    """The fields that every architecture's config shares."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "initializer_range": initializer_range,
        "rms_norm_eps": 1e-6,
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
    }


def _save(model_class: Any, config: Any, path: str | Path, dtype: str, seed: int, *, vectors: bool = False) -> Path:
    """Make and save a model; with ``vectors``, norms and biases are random too, not ones and zeros."""
    import torch

    from rl.models.hf_files import without_progress_bars

    generator_state = torch.random.get_rng_state()  # making a model must not move the caller's random stream
    try:
        torch.manual_seed(seed)
        model = model_class(config)
        if vectors:
            _draw_vectors(model)
        biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith(_ROUTER_BIAS)}
        model = model.to(getattr(torch, dtype))
        for name, buffer in model.named_buffers():
            if name in biases:  # float32 in published models of any dtype
                buffer.data = biases[name]
    finally:
        torch.random.set_rng_state(generator_state)
    path = Path(path)
    with without_progress_bars():
        model.save_pretrained(path)
    _write_published_field_names(path)
    _expect_one_tensor_per_expert(path, config)
    return path


def _draw_vectors(model: Any) -> None:
    """Random norms and biases, the routers' too: ones and zeros would hide that one of them was not loaded."""
    import torch

    with torch.no_grad():
        for name, vector in [*model.named_parameters(), *model.named_buffers()]:
            if vector.dim() == 1 and name.endswith((".weight", ".bias", _ROUTER_BIAS)):
                vector += 0.1 * torch.randn(vector.shape)


def _write_published_field_names(path: Path) -> None:
    """Add the field names of published checkpoints, which transformers >= 5 renames when it saves."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    published = _EXPERTS_FIELD.get(config["model_type"])
    if published and "num_local_experts" in config:
        config[published] = config.pop("num_local_experts")
    if config["model_type"] == "deepseek_v3":
        config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if "num_mtp_layers" in config:
        config["num_nextn_predict_layers"] = config.pop("num_mtp_layers")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if "partial_rotary_factor" in config["rope_parameters"]:
        config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _expect_one_tensor_per_expert(path: Path, config: Any) -> None:
    """transformers >= 5 fuses experts in memory; what is on disk must still be what everyone else reads."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        return
    names = tensor_names(path)
    if not any(f".experts.{experts - 1}." in name for name in names):
        raise RuntimeError(
            f"expected one tensor per expert (names holding '.experts.{experts - 1}.') in {path}, found e.g. "
            f"{[n for n in names if 'expert' in n][:3]}; use a transformers whose save_pretrained unfuses experts"
        )


def tensor_names(path: str | Path) -> list[str]:
    """Names of all tensors in the safetensors files of a model directory, sorted; no tensor is read."""
    names: list[str] = []
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        names.extend(name for name in header if name != "__metadata__")
    return sorted(names)
