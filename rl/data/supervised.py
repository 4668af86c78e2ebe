"""Supervised pairs for a warm-up: prompt, right answer, end of sequence.

The prompt is tokenised exactly as for rollout, and the answer on its own after it, because that is how a model that
generates token by token will have to write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.data.encoding import PLACEHOLDER, PromptEncoder
from rl.data.sources import BadRow, Row, raise_bad_rows


@dataclass(frozen=True)
class SupervisedExample:
    """One solved problem.

    Attributes:
        text: the prompt after the template.
        answer: the right answer.
        tokens: int32 ``[T]``: prompt, answer, end of sequence.
        loss_mask: bool ``[T]``, True for tokens to be learnt as *targets*: those of the answer and the end of sequence,
            or all but the first, which nothing comes before.
            With inputs ``tokens[:-1]`` and targets ``tokens[1:]``, the mask of the targets is ``loss_mask[1:]``.
    """

    text: str
    answer: str
    tokens: np.ndarray
    loss_mask: np.ndarray


def sft_examples(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    template: str = PLACEHOLDER,
    chat: bool = False,
    chat_args: Mapping[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
    answer_template: str = "{answer}",
    learn_prompts: bool = False,
) -> list[SupervisedExample]:
    """Solved problems from rows with an ``answer``.

    Args:
        rows: take them from a seed (or file) that is used for nothing else.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        template: see ``PromptEncoder``.
        chat, chat_args: see ``PromptEncoder``.
        max_prompt_tokens: longest prompt allowed; None for no limit.
        answer_template: text around each answer, with ``{answer}`` where it goes.
        learn_prompts: learn the tokens of prompts too, as a language model does.

    Raises:
        DataError: rows without an answer, or with prompts that cannot be used; all are named.
        ValueError: a tokenizer without end of sequence, or a template without its placeholder.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an end-of-sequence token; set tokenizer.eos_token")
    if "{answer}" not in answer_template:
        raise ValueError(f"expected an answer template with {{answer}}, got {answer_template!r}")
    problems = [BadRow(row.origin or "row", "expected an answer as text, got none") for row in rows if not row.answer]
    raise_bad_rows("supervised pairs", problems, len(rows))

    prompts = PromptEncoder(tokenizer, template, chat, max_prompt_tokens, chat_args or {}).encode(rows)
    examples = []
    for row, prompt in zip(rows, prompts, strict=True):
        answer = answer_template.replace("{answer}", str(row.answer))
        target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens = np.concatenate([prompt.tokens, np.asarray(target, dtype=np.int32)])
        learnt = np.arange(len(tokens)) >= (1 if learn_prompts else len(prompt.tokens))
        examples.append(SupervisedExample(prompt.text, answer, tokens, learnt))
    return examples
