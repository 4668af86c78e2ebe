"""What runs in the processes of ``rl.rewards.math``: only here are sympy and its parsers imported."""

from __future__ import annotations

import logging
import resource


def start(memory_mib: int) -> None:
    """Limit the process's memory, and import what takes long, before the first answer comes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that it has no time limit of its own


def grade(label: str, response: str) -> bool | None:
    """Whether the last answer in the response equals the label; None if the label is no mathematical expression.

    Source:
        math-verify's ``parse`` and ``verify``. A label without LaTeX delimiters is put in a box.
    """
    import math_verify

    delimited = any(mark in label for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = math_verify.parse(label if delimited else f"\\boxed{{{label}}}", parsing_timeout=None)
    if not gold:
        return None
    answer = math_verify.parse(response, parsing_timeout=None)
    return bool(math_verify.verify(gold, answer, timeout_seconds=None))
