"""Rewards that come along: a reasoning-gym task's own scoring, and exact match."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from rl.data.jsonable import from_json
from rl.data.sources import create_task
from rl.types import Sample

_EXTRACTION = {"answer_regex", "answer_tag"}


def reasoning_gym(sample: Sample, args: Mapping[str, Any]) -> float:
    """The score that the task itself gives the answer: its ``score_answer``, 1.0 for a right one.

    Many tasks give part of the credit to a wrong answer, for example one that contains the right one.

    Args:
        sample: with a label of ``rl.data.sources.reasoning_gym_rows``.
        args: ``answer_regex``, ``answer_tag``: see ``extract_answer``; ``full_credit_only`` (False): count a score
            below 1 as 0.

    Raises:
        ValueError: a label of another kind, or unknown args.
    """
    _check_args(args, {"full_credit_only"})
    label = sample.prompt.label
    _check_gym_label(label)
    answer = extract_answer(sample.response_text, args)
    if answer is None:
        return 0.0
    score = float(_scorer(label["task"], json.dumps(label["args"], sort_keys=True))(answer, from_json(label["entry"])))
    return (1.0 if score >= 1.0 else 0.0) if args.get("full_credit_only") else score


def exact_match(sample: Sample, args: Mapping[str, Any]) -> float:
    """1.0 when the answer is the label (or one of them, if the label is a list), else 0.0.

    White space at the ends does not count; a label that is a number is compared as text.

    Args:
        sample: with a label of text, number, or a list of these.
        args: ``answer_regex``, ``answer_tag``: see ``extract_answer``; ``ignore_case`` (False).

    Raises:
        ValueError: a label of another kind, or unknown args.
    """
    _check_args(args, {"ignore_case"})
    label = sample.prompt.label
    _check_text_label(label)
    labels = label if isinstance(label, list) else [label]
    answer = extract_answer(sample.response_text, args)
    if answer is None:
        return 0.0
    fold: Callable[[str], str] = str.casefold if args.get("ignore_case") else str
    return float(any(fold(answer) == fold(str(right).strip()) for right in labels))


def _check_gym_label(label: Any) -> None:
    if not isinstance(label, Mapping) or not {"task", "args", "entry"} <= set(label):
        raise ValueError(
            f"expected a label with task, args and entry, got {str(label)[:100]!r}; "
            "use this reward with data.train.reasoning_gym, or exact_match with a file"
        )


def _check_text_label(label: Any) -> None:
    labels = label if isinstance(label, list) else [label]
    if not labels or not all(isinstance(right, str | int | float) for right in labels):
        raise ValueError(f"expected a label of text or a number, or a list of these, got {str(label)[:100]!r}")


def extract_answer(text: str, args: Mapping[str, Any]) -> str | None:
    """The answer in a response, without white space at its ends; None where the pattern asked for is missing.

    Args:
        text: the response.
        args: at most one of ``answer_tag``: what stands in the last ``<tag>...</tag>``, for example ``"answer"``;
            ``answer_regex``: the first group (or all) of the pattern's last match. None of both: the whole text.

    Raises:
        ValueError: both are given, or the pattern is not valid.
    """
    tag, pattern = args.get("answer_tag"), args.get("answer_regex")
    if tag is not None and pattern is not None:
        raise ValueError("expected answer_tag or answer_regex, got both; leave one out")
    if tag is not None:
        pattern = rf"<{re.escape(tag)}>((?:(?!<{re.escape(tag)}>).)*?)</{re.escape(tag)}>"
    if pattern is None:
        return text.strip()
    try:
        matches = list(re.finditer(pattern, text, re.DOTALL))
    except re.error as error:
        raise ValueError(f"expected a regular expression as answer_regex, got {pattern!r}: {error}") from error
    if not matches:
        return None
    found = matches[-1]
    answer = found.group(1) if found.re.groups else found.group()
    return None if answer is None else answer.strip()


@lru_cache(maxsize=64)
def _scorer(task: str, args_json: str) -> Callable[[str, dict[str, Any]], float]:
    """``score_answer`` of the task with the settings that its problems were made with."""
    score: Callable[[str, dict[str, Any]], float] = create_task(task, from_json(json.loads(args_json))).score_answer
    return score


def _check_args(args: Mapping[str, Any], own: set[str]) -> None:
    unknown = set(args) - own - _EXTRACTION
    if unknown:
        raise ValueError(f"unknown reward args {sorted(unknown)}; known are {sorted(own | _EXTRACTION)}")


reasoning_gym.check_args = lambda args: _check_args(args, {"full_credit_only"})  # type: ignore[attr-defined]
reasoning_gym.check_label = _check_gym_label  # type: ignore[attr-defined]
exact_match.check_args = lambda args: _check_args(args, {"ignore_case"})  # type: ignore[attr-defined]
exact_match.check_label = _check_text_label  # type: ignore[attr-defined]
