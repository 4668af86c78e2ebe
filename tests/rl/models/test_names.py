"""Names of both of Megatron's spellings, and that a model's tensors are each named once."""

import itertools

import pytest
import torch

from rl.models import tiny
from rl.models.architecture import architecture, read_architecture
from rl.models.names import is_kept, logical, sent_dtype
from tests.rl.models.test_architecture import DEEPSEEK_V3, GLM4_MOE, LLAMA, MIXTRAL, QWEN3_MOE

QWEN, DENSE, MIX = architecture(QWEN3_MOE), architecture(LLAMA), architecture(MIXTRAL)


def find(name, arch=QWEN, layers=None, experts=(4, 6)):
    return logical(name, arch, layer_of=layers or {0: 2, 1: 3}, experts=experts)


def test_by_hand():
    assert find("embedding.word_embeddings.weight").hf == ("model.embed_tokens.weight",)
    assert find("output_layer.weight").hf == ("lm_head.weight",)
    assert find("output_layer.weight", DENSE) is None  # tied
    qkv = find("decoder.layers.1.self_attention.linear_qkv.weight")
    assert qkv.hf == tuple(f"model.layers.3.self_attn.{x}_proj.weight" for x in "qkv")
    assert (qkv.key, qkv.kind, qkv.tp_dim, qkv.expert) == ((3, 1, 0), "qkv", 0, None)
    router = find("decoder.layers.0.mlp.router.weight")
    assert (router.hf, router.tp_dim) == (("model.layers.2.mlp.gate.weight",), None)
    assert find("decoder.layers.0.mlp.router.weight", MIX).hf == ("model.layers.2.block_sparse_moe.gate.weight",)


@pytest.mark.parametrize("spelling", ["mlp.experts.local_experts.1.{}.weight", "mlp.experts.{}.weight1"])
def test_experts_are_named_by_who_they_are_not_where(spelling):
    first = find("decoder.layers.0." + spelling.format("linear_fc1"))
    assert first.hf == tuple(f"model.layers.2.mlp.experts.6.{x}_proj.weight" for x in ("gate", "up"))
    assert (first.key, first.kind, first.tp_dim, first.expert) == ((2, 9, 6), "gated", 0, 6)
    second = find("decoder.layers.0." + spelling.format("linear_fc2"), MIX)
    assert second.hf == ("model.layers.2.block_sparse_moe.experts.6.w2.weight",)
    assert (second.kind, second.tp_dim, second.expert) == ("plain", 1, 6)


def test_router_biases_are_kept_and_sent_in_float32():
    assert is_kept("decoder.layers.0.mlp.router.expert_bias")
    assert not is_kept("decoder.layers.0.mlp.router.local_tokens_per_expert")
    entry = find("decoder.layers.1.mlp.router.expert_bias", architecture(GLM4_MOE))
    assert (entry.hf, entry.tp_dim) == (("model.layers.3.mlp.gate.e_score_correction_bias",), None)
    assert sent_dtype(entry.hf[0], torch.bfloat16) == torch.float32
    assert sent_dtype("model.layers.3.mlp.gate.weight", torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("local", "transformer_engine"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_norms_that_transformer_engine_fuses(local, transformer_engine):
    assert find(f"decoder.layers.0.{local}", DENSE) == find(f"decoder.layers.0.{transformer_engine}", DENSE)


def test_norms_of_latents_that_transformer_engine_fuses():
    arch = architecture(DEEPSEEK_V3)
    for latent in ("q", "kv"):
        local = find(f"decoder.layers.0.self_attention.{latent}_layernorm.weight", arch)
        assert local == find(f"decoder.layers.0.self_attention.linear_{latent}_up_proj.layer_norm_weight", arch)
        assert local.hf == (f"model.layers.2.self_attn.{latent}_a_layernorm.weight",)


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "lm_head.bias"])
def test_what_has_no_counterpart_is_an_error(name):
    with pytest.raises(KeyError, match="no Hugging Face tensor corresponds to"):
        find(name)


MAKERS = {
    "qwen3_moe": lambda path: tiny.qwen3_moe(path, mlp_only_layers=[1], layers=2),
    "mixtral": lambda path: tiny.mixtral(path, layers=2),
    "llama": lambda path: tiny.llama(path, layers=2, tie_word_embeddings=True),
    "qwen2_moe": lambda path: tiny.qwen2_moe(path, layers=2),
    "olmoe": lambda path: tiny.olmoe(path, layers=2),
    "glm4_moe": lambda path: tiny.glm4_moe(path, layers=2),
    "deepseek_v3": lambda path: tiny.deepseek_v3(path, layers=2),
}
LATENT = ["q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj"]


def in_layer(arch, moe):
    """Megatron's names in one layer, as its local modules spell them."""
    linear = [f"linear_{name}" for name in LATENT] if arch.latent else ["linear_qkv"]
    names = [f"self_attention.{name}.weight" for name in [*linear, "linear_proj"]]
    names += ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
    if arch.qk_norm:
        norms = ["q_layernorm", "kv_layernorm" if arch.latent else "k_layernorm"]
        names += [f"self_attention.{name}.weight" for name in norms]
    if arch.attention_bias:
        names.append("self_attention.linear_qkv.bias")
    if not moe:
        return [*names, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    experts = itertools.product(range(arch.experts), (1, 2))
    names += ["mlp.router.weight", *(f"mlp.experts.local_experts.{e}.linear_fc{i}.weight" for e, i in experts)]
    if arch.routing.scores == "sigmoid":
        names.append("mlp.router.expert_bias")
    if arch.shared_ffn:
        names += [f"mlp.shared_experts.linear_fc{i}.weight" for i in (1, 2)]
    if arch.shared_gate:
        names.append("mlp.shared_experts.gate_weight")
    return names


@pytest.mark.parametrize("family", MAKERS)
def test_every_tensor_of_a_directory_is_named_once(tmp_path, family):
    directory = MAKERS[family](tmp_path / "m")
    arch = read_architecture(directory)
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    for layer in range(arch.layers):
        names += [f"decoder.layers.{layer}.{rest}" for rest in in_layer(arch, layer in arch.moe_layers)]
    found = [logical(n, arch, layer_of={0: 0, 1: 1}, experts=tuple(range(arch.experts))) for n in names]
    entries = [e for e in found if e is not None]
    assert sorted(hf for e in entries for hf in e.hf) == tiny.tensor_names(directory)
    assert len({e.key for e in entries}) == len(entries)
