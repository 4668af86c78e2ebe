"""What an engine reads of a model directory besides its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def is_moe(model_path: Path) -> bool:
    """Whether a Hugging Face config names more than one expert."""
    config = json.loads((model_path / "config.json").read_text())
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((config.get(name) or 0) > 1 for name in names)


def has_latent_attention(model_path: Path) -> bool:
    """Whether keys and values come from a latent (DeepSeek's MLA)."""
    return bool(json.loads((model_path / "config.json").read_text()).get("kv_lora_rank"))


def end_tokens(model_path: Path) -> tuple[int, ...]:
    """The model's end-of-sequence ids: those of its generation config, else of its config."""
    for name in ("generation_config.json", "config.json"):
        file = model_path / name
        if file.is_file():
            value = json.loads(file.read_text()).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
    return ()


def load_tokenizer(model_path: Path) -> Any | None:
    """The directory's tokenizer, None when it has none (responses then have no text)."""
    if not any((model_path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)
