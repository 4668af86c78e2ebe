"""Python values as JSON values and back without loss: JSON alone has no tuples and no integer keys.

A reward that compares with ``[(1, 2)]`` gives another score for ``[[1, 2]]``, so what a task needs for scoring must
survive the way through a file or another process unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_TUPLE, _SET, _PAIRS = "__tuple__", "__set__", "__pairs__"
_TAGS = {_TUPLE, _SET, _PAIRS}


def to_json(value: Any) -> Any:
    """A JSON value that ``from_json`` turns back into an equal one.

    Text, numbers, booleans, None, lists and dicts with text keys stay as they are. ``(1, 2)`` becomes
    ``{"__tuple__": [1, 2]}``, ``{3: "c"}`` becomes ``{"__pairs__": [[3, "c"]]}``, a set ``{"__set__": [...]}``; numpy
    scalars become Python numbers.

    Raises:
        TypeError: a value of another type, or a number that is NaN or infinite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"expected finite numbers, got {value}")
        return float(value)
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [to_json(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {_SET: sorted((to_json(item) for item in value), key=repr)}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not (len(value) == 1 and _TAGS & set(value)):
            return {str(key): to_json(item) for key, item in value.items()}
        return {_PAIRS: [[to_json(key), to_json(item)] for key, item in value.items()]}
    raise TypeError(f"expected text, numbers, lists, tuples, sets and dicts, got {type(value).__qualname__}")


def from_json(value: Any) -> Any:
    """The inverse of ``to_json``."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((tag, items),) = value.items()
            if tag == _TUPLE:
                return tuple(from_json(item) for item in items)
            if tag == _SET:
                return {from_json(item) for item in items}
            if tag == _PAIRS:
                return {from_json(key): from_json(item) for key, item in items}
        return {key: from_json(item) for key, item in value.items()}
    return value
