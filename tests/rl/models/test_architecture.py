"""What is read from a config, and what is refused, with a sentence."""

import json

import pytest
from transformers import LlamaConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from rl.models.architecture import (
    LatentAttention,
    Routing,
    UnsupportedModel,
    Yarn,
    architecture,
    read_architecture,
)

COMMON = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
MIXTRAL = COMMON | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "sliding_window": None,
}
LLAMA = COMMON | {"model_type": "llama", "tie_word_embeddings": True, "dtype": "float32"}

# Fields of published models, with sizes of the common part.
QWEN2_MOE = COMMON | {
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 192,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
OLMOE = COMMON | {
    "model_type": "olmoe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "attention_bias": False,
    "clip_qkv": None,
    "rope_scaling": None,
}
GLM4_MOE = COMMON | {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK_V3 = COMMON | {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 256,
    "n_shared_experts": 2,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rope_scaling": YARN,
    "num_nextn_predict_layers": 0,
}


def test_qwen3_moe():
    arch = architecture(QWEN3_MOE)
    assert (arch.family, arch.layers, arch.moe_layers, arch.is_moe) == ("qwen3_moe", 6, tuple(range(6)), True)
    assert (arch.hidden, arch.heads, arch.kv_heads, arch.head_dim) == (64, 4, 2, 32)
    assert (arch.ffn, arch.moe_ffn, arch.experts, arch.topk, arch.normalize_topk) == (96, 48, 8, 2, True)
    assert (arch.qk_norm, arch.attention_bias, arch.tied, arch.vocab) == (True, False, False, 320)
    assert (arch.norm_eps, arch.rope_theta, arch.max_positions, arch.dtype) == (1e-5, 1e6, 512, "bfloat16")


def test_mixtral():
    arch = architecture(MIXTRAL)
    assert (arch.moe_layers, arch.experts, arch.topk, arch.moe_ffn) == (tuple(range(6)), 4, 3, 96)
    assert (arch.normalize_topk, arch.qk_norm, arch.head_dim) == (True, False, 16)


def test_qwen2_moe():
    arch = architecture(QWEN2_MOE)
    assert (arch.moe_layers, arch.experts, arch.topk, arch.moe_ffn) == (tuple(range(6)), 60, 4, 48)
    assert (arch.shared_ffn, arch.shared_gate, arch.attention_bias) == (192, True, True)
    assert (arch.normalize_topk, arch.qk_norm, arch.routing) == (False, False, Routing())
    assert not architecture(QWEN2_MOE | {"qkv_bias": False}).attention_bias
    assert architecture(QWEN2_MOE | {"mlp_only_layers": [0], "decoder_sparse_step": 2}).moe_layers == (1, 3, 5)


def test_olmoe():
    arch = architecture(OLMOE)
    assert (arch.experts, arch.topk, arch.moe_ffn, arch.shared_ffn) == (64, 8, 96, 0)
    assert (arch.normalize_topk, arch.qk_norm, arch.qk_norm_whole, arch.attention_bias) == (False, True, True, False)


def test_glm4_moe():
    arch = architecture(GLM4_MOE)
    assert (arch.moe_layers, arch.experts, arch.topk, arch.moe_ffn, arch.shared_ffn) == ((3, 4, 5), 128, 8, 48, 48)
    assert (arch.qk_norm, arch.qk_norm_whole, arch.attention_bias, arch.rotary_fraction) == (True, False, True, 0.5)
    assert (arch.routing, arch.shared_gate) == (Routing("sigmoid", 1, 1, 2.5), False)
    as_transformers_5 = GLM4_MOE | {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}
    assert architecture(as_transformers_5).rotary_fraction == 0.25


def test_deepseek_v3():
    arch = architecture(DEEPSEEK_V3)
    assert (arch.moe_layers, arch.experts, arch.topk, arch.moe_ffn, arch.shared_ffn) == ((3, 4, 5), 256, 8, 48, 96)
    assert arch.latent == LatentAttention(q_rank=48, kv_rank=32, plain_dim=24, rotary_dim=8, value_dim=20)
    assert (arch.heads, arch.kv_heads, arch.head_dim) == (4, 4, 32)
    assert arch.routing == Routing("sigmoid", groups=8, chosen_groups=4, scale=2.5)
    assert arch.yarn == Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert architecture(DEEPSEEK_V3 | {"rope_scaling": None}).yarn is None


def test_dense():
    arch = architecture(LLAMA)
    assert (arch.moe_layers, arch.is_moe, arch.experts, arch.topk, arch.moe_ffn) == ((), False, 0, 0, 0)
    assert (arch.tied, arch.dtype, arch.qk_norm, arch.rope_theta) == (True, "float32", False, 10000.0)
    assert architecture(COMMON | {"model_type": "qwen3"}).qk_norm


@pytest.mark.parametrize(
    ("change", "moe_layers"),
    [
        ({"mlp_only_layers": [0, 3]}, (1, 2, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
    ],
)
def test_mixed_dense_and_moe_layers(change, moe_layers):
    arch = architecture(QWEN3_MOE | change)
    assert arch.moe_layers == moe_layers
    assert arch.moe_layer_of() == {layer + 1: i for i, layer in enumerate(moe_layers)}


@pytest.mark.parametrize(
    "config_class", [Qwen3MoeConfig, MixtralConfig, LlamaConfig, Qwen3Config, Qwen2MoeConfig, OlmoeConfig]
)
def test_configs_as_transformers_writes_them(tmp_path, config_class):
    """transformers 5 renames fields (``rope_parameters``, ``num_local_experts``, ``dtype``) when it saves."""
    extra = {"sliding_window": None} if config_class is MixtralConfig else {}
    config = config_class(**COMMON, rope_theta=5e5, **extra)
    config.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.layers, arch.hidden) == (config.model_type, 6, 64)
    assert arch.head_dim == (getattr(config, "head_dim", None) or 16)
    assert arch.rope_theta == json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"]
    assert arch.experts == (getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (COMMON | {"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: qwen3_moe, mixtral, llama"),
        (COMMON, "model_type None is not supported"),
        (LLAMA | {"hidden_act": "gelu"}, r"llama: not supported: hidden_act 'gelu' \(expected 'silu'\)"),
        (LLAMA | {"mlp_bias": True}, "biases in the MLP"),
        (LLAMA | {"attention_bias": True}, "attention_bias"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "a quantized checkpoint .convert it to bf16 first"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "rope_type 'llama3' is not supported, only 'default'"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        (MIXTRAL | {"sliding_window": 128}, "sliding_window=128; set it to null"),
        (QWEN3_MOE | {"sliding_window": 128, "use_sliding_window": True}, "sliding-window attention"),
        (MIXTRAL | {"num_experts_per_tok": 1}, r"mixtral: one expert a token \(top-1\) .* choose top-2 or more"),
        (QWEN3_MOE | {"num_nextn_predict_layers": 1}, "multi-token-prediction heads"),
        (LLAMA | {"hidden_act": "gelu", "mlp_bias": True}, "hidden_act .*; biases in the MLP"),
        (OLMOE | {"clip_qkv": 8.0}, "olmoe: clip_qkv=8.0 is not supported"),
        (OLMOE | {"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06 is not supported, only 1e-05: vLLM has that one"),
        (QWEN2_MOE | {"rope_scaling": YARN}, "rope_type 'yarn' is not supported, only 'default'"),
        (
            GLM4_MOE | {"num_nextn_predict_layers": 1},
            r"heads \(num_nextn_predict_layers=1; remove the tensors model.layers.6 and above .* set it to 0",
        ),
        (DEEPSEEK_V3 | {"num_mtp_layers": 1}, "multi-token-prediction heads"),
        (
            DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8"}},
            r"a quantized checkpoint \(convert it to bf16 first; it is 'fp8'\)",
        ),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, "the router scoring_func='sigmoid', topk_method='greedy'"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "the router scoring_func='softmax'"),
        (DEEPSEEK_V3 | {"topk_group": 2}, "num_experts_per_tok=8 and topk_group=2: a group's score is the sum"),
        (DEEPSEEK_V3 | {"norm_topk_prob": False}, "norm_topk_prob=false with sigmoid scores"),
        (GLM4_MOE | {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with sigmoid scores"),
        (DEEPSEEK_V3 | {"moe_layer_freq": 2}, r"moe_layer_freq=2 \(expected 1\)"),
        (DEEPSEEK_V3 | {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported, only 1e-06: norms of the latents"),
        (DEEPSEEK_V3 | {"rope_interleave": False}, "rope_interleave=false is not supported"),
        (DEEPSEEK_V3 | {"q_lora_rank": None}, r"q_lora_rank=null \(Moonlight\) is not supported"),
        (DEEPSEEK_V3 | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0}}, "mscale=0.7 without"),
        (DEEPSEEK_V3 | {"rope_scaling": YARN | {"truncate": False}}, "in a yarn embedding: truncate=False"),
    ],
)
def test_what_is_not_covered_is_refused(config, message):
    with pytest.raises(UnsupportedModel, match=message):
        architecture(config)


@pytest.mark.parametrize("name", ["scoring_func", "topk_method"])
def test_routers_that_engines_would_take_for_others_are_refused(name):
    config = {key: value for key, value in DEEPSEEK_V3.items() if key != name}
    with pytest.raises(UnsupportedModel, match=rf'config.json has no {name}.*add "scoring_func": "sigmoid"'):
        architecture(config)


def test_an_unused_sliding_window_is_fine():
    assert architecture(QWEN3_MOE | {"sliding_window": 128, "use_sliding_window": False}).layers == 6


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a Hugging Face model directory with a config.json, found none in"):
        read_architecture(tmp_path)
