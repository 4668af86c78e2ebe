"""What is read from a config, and what is refused, with a sentence."""

import json

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from rl.models.architecture import UnsupportedModel, architecture, read_architecture

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


@pytest.mark.parametrize("config_class", [Qwen3MoeConfig, MixtralConfig, LlamaConfig, Qwen3Config])
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
        (QWEN3_MOE | {"num_nextn_predict_layers": 1}, "multi-token-prediction heads"),
        (LLAMA | {"hidden_act": "gelu", "mlp_bias": True}, "hidden_act .*; biases in the MLP"),
    ],
)
def test_what_is_not_covered_is_refused(config, message):
    with pytest.raises(UnsupportedModel, match=message):
        architecture(config)


def test_an_unused_sliding_window_is_fine():
    assert architecture(QWEN3_MOE | {"sliding_window": 128, "use_sliding_window": False}).layers == 6


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a Hugging Face model directory with a config.json, found none in"):
        read_architecture(tmp_path)
