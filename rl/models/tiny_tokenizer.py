"""Byte-level tokenizers, trained on the spot: the tokenizers of tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, BOS, EOS)  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_DEFAULT_TEXTS = ("0123456789 + - * / = ( ) What is the answer?",)
_VOCABULARY_MULTIPLE = 64


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 320, *, phrases: bool = False) -> Path:
    """Train a byte-level BPE tokenizer and write it to ``path``.

    Digits are always single tokens, so that arithmetic does not depend on which numbers the texts held.
    ``<pad>``, ``<bos>``, ``<eos>`` are ids 0, 1, 2; the 256 bytes follow, then merges.

    Args:
        texts: what the merges are learnt from.
        path: directory to write to; made when missing.
        vocab_size: upper limit of the vocabulary, at least 259 (specials and bytes).
        phrases: let merges run over white space, so that wording that repeats becomes single tokens.

    Raises:
        ValueError: ``vocab_size`` has no room for specials and bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be >= {smallest} (3 special tokens and 256 bytes), got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not phrases),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    return path


def place_tokenizer(path: str | Path, tokenizer: str | Path | None) -> int:
    """Put a tokenizer into ``path``; returns the vocabulary padded to a multiple of 64 (any TP size divides it)."""
    path = Path(path)
    if tokenizer is None:
        train_tokenizer(_DEFAULT_TEXTS, path, len(SPECIAL_TOKENS) + 256)
    elif Path(tokenizer).resolve() != path.resolve():
        path.mkdir(parents=True, exist_ok=True)
        source = Path(tokenizer)
        if not (source / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"expected a tokenizer.json in {source}; make one with train_tokenizer(texts, path)"
            )
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copy(source / name, path / name)
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(path))
    return -(-size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
