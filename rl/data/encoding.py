"""From rows to prompt text and tokens: one place, so that warm-up, training and evaluation tokenise alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl.data.sources import BadRow, Row, raise_bad_rows

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model sees it: ``text`` after template or chat template, ``tokens`` int32 ``[P]``."""

    text: str
    tokens: np.ndarray


@dataclass(frozen=True)
class PromptEncoder:
    """Turns rows into text and tokens.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: text around a prompt, with ``{prompt}`` where it goes (other braces are left alone).
        chat: apply the tokenizer's chat template instead; a prompt that is text becomes one message of the user.
            Special tokens then come from the template; without ``chat`` the tokenizer adds those it always adds.
        max_prompt_tokens: P at most, special tokens included.
        chat_args: further arguments of the chat template, for example ``{"enable_thinking": False}``.

    Raises:
        ValueError: a template without ``{prompt}``, or chat without a chat template.
    """

    tokenizer: Any
    template: str = PLACEHOLDER
    chat: bool = False
    max_prompt_tokens: int | None = None
    chat_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if PLACEHOLDER not in self.template:
            raise ValueError(f"expected a prompt template with {PLACEHOLDER}, got {self.template!r}")
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "expected a tokenizer with a chat template, this one has none; "
                "set chat to false and use a prompt template"
            )
        if self.chat and self.template != PLACEHOLDER:
            raise ValueError(
                f"expected a chat template or a prompt template, got both ({self.template!r}); leave one out"
            )

    def encode(self, rows: Sequence[Row]) -> list[EncodedPrompt]:
        """Text and tokens of every row.

        Raises:
            DataError: rows that are too long, empty after tokenisation, or of the other kind (chat or text); all of
                them are named.
        """
        kept, problems = self.encode_each(rows)
        raise_bad_rows("prompts", problems, len(rows))
        return [encoded for _, encoded in kept]

    def encode_each(
        self, rows: Sequence[Row], limit: int | None = None
    ) -> tuple[list[tuple[Row, EncodedPrompt]], list[BadRow]]:
        """Rows that can be used, each with its text and tokens, and those that cannot, in order.

        Args:
            rows: in order.
            limit: stop after so many that can be used; None: take all.
        """
        kept: list[tuple[Row, EncodedPrompt]] = []
        problems: list[BadRow] = []
        for row in rows:
            if limit is not None and len(kept) == limit:
                break
            try:
                kept.append((row, self._encode_row(row)))
            except Exception as error:
                reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                problems.append(BadRow(row.origin or "row", reason))
        return kept, problems

    def _encode_row(self, row: Row) -> EncodedPrompt:
        text = self._render(row)
        tokens = np.asarray(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"], dtype=np.int32)
        if len(tokens) == 0:
            raise ValueError("expected a prompt of at least 1 token, got 0")
        if self.max_prompt_tokens is not None and len(tokens) > self.max_prompt_tokens:
            raise ValueError(
                f"expected a prompt of at most {self.max_prompt_tokens} tokens, got {len(tokens)}; "
                "raise max_prompt_tokens or shorten it"
            )
        return EncodedPrompt(text, tokens)

    def _render(self, row: Row) -> str:
        if self.chat:
            messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_args
            )
            return text
        if not isinstance(row.prompt, str):
            raise ValueError("expected a prompt of text, got chat messages; set chat to true")
        return self.template.replace(PLACEHOLDER, row.prompt)
