"""Tiny models are complete directories under the names that everyone else reads."""

import json
from pathlib import Path

import pytest
import torch

from rl.models import tiny

TEXTS = ["What is 12 + 34? The answer is 46."] * 20


def test_digits_are_single_tokens_and_specials_come_first(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.train_tokenizer(TEXTS, tmp_path, 300))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) > 259, "no merge was learnt"
    text = "What is 12345 + 67?"
    ids = tokenizer(text)["input_ids"]
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in token)]
    assert digits == list("1234567")
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<bos>user: hi\nassistant: "


def test_small_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be >= 259"):
        tiny.train_tokenizer(TEXTS, tmp_path, 258)


def test_qwen3_moe_has_published_names(tmp_path: Path) -> None:
    tokenizer = tiny.train_tokenizer(TEXTS, tmp_path / "tokenizer", 300)
    path = tiny.qwen3_moe(tmp_path / "model", tokenizer=tokenizer, mlp_only_layers=(1,))
    names = tiny.tensor_names(path)
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" in names
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert not any(name.startswith("model.layers.1.mlp.experts") for name in names)
    config = json.loads((path / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["rope_theta"] == 10000.0
    assert config["vocab_size"] % 64 == 0
    assert (path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_mixtral_has_published_names(tmp_path: Path) -> None:
    names = tiny.tensor_names(tiny.mixtral(tmp_path))
    assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_weights_depend_on_the_seed_only(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    weights = [
        (tiny.llama(tmp_path / str(i), layers=1, seed=seed) / "model.safetensors").read_bytes()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_norms_and_biases_of_the_wider_families_are_random(tmp_path: Path) -> None:
    """Ones and zeros would hide that one of them was not loaded."""
    from safetensors.torch import load_file

    for make in (tiny.qwen2_moe, tiny.olmoe, tiny.glm4_moe, tiny.deepseek_v3):
        for name, tensor in load_file(make(tmp_path / make.__name__, layers=2) / "model.safetensors").items():
            assert tensor.std() > 1e-3, name


@pytest.mark.parametrize(
    "make", [tiny.qwen3_moe, tiny.mixtral, tiny.llama, tiny.qwen2_moe, tiny.olmoe, tiny.glm4_moe, tiny.deepseek_v3]
)
def test_transformers_loads_what_was_made(make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make(tmp_path, layers=2, dtype="bfloat16")
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(path)) <= model.config.vocab_size
