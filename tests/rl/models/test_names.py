"""Names of both of Megatron's spellings, and that a model's tensors are each named once."""

import itertools

import pytest

from rl.models import tiny
from rl.models.architecture import architecture, read_architecture
from rl.models.names import logical
from tests.rl.models.test_architecture import LLAMA, MIXTRAL, QWEN3_MOE

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


@pytest.mark.parametrize(
    ("local", "transformer_engine"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_norms_that_transformer_engine_fuses(local, transformer_engine):
    assert find(f"decoder.layers.0.{local}", DENSE) == find(f"decoder.layers.0.{transformer_engine}", DENSE)


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "lm_head.bias"])
def test_what_has_no_counterpart_is_an_error(name):
    with pytest.raises(KeyError, match="no Hugging Face tensor corresponds to"):
        find(name)


MAKERS = {
    "qwen3_moe": lambda path: tiny.qwen3_moe(path, mlp_only_layers=[1], layers=2),
    "mixtral": lambda path: tiny.mixtral(path, layers=2),
    "llama": lambda path: tiny.llama(path, layers=2, tie_word_embeddings=True),
}


@pytest.mark.parametrize("family", MAKERS)
def test_every_tensor_of_a_directory_is_named_once(tmp_path, family):
    directory = MAKERS[family](tmp_path / "m")
    arch = read_architecture(directory)
    attention = ["input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj", "pre_mlp_layernorm"]
    if arch.qk_norm:
        attention += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    for layer in range(arch.layers):
        if layer in arch.moe_layers:
            experts = itertools.product(range(arch.experts), (1, 2))
            mlp = ["mlp.router"] + [f"mlp.experts.local_experts.{e}.linear_fc{i}" for e, i in experts]
        else:
            mlp = ["mlp.linear_fc1", "mlp.linear_fc2"]
        names += [f"decoder.layers.{layer}.{rest}.weight" for rest in attention + mlp]
    found = [logical(n, arch, layer_of={0: 0, 1: 1}, experts=tuple(range(arch.experts))) for n in names]
    entries = [e for e in found if e is not None]
    assert sorted(hf for e in entries for hf in e.hf) == tiny.tensor_names(directory)
    assert len({e.key for e in entries}) == len(entries)
