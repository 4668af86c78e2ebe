"""A reward that differs between the samples of any model, however bad: for runs whose numbers are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.types import Sample


def of_tokens(sample: Sample, args: Mapping[str, Any]) -> float:
    """From 0 to 1, by the response's tokens."""
    return int(sample.response_tokens.sum()) % 7 / 6
