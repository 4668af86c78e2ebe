"""Functions of vLLM's are exchanged only where they look as they did in the versions that this was tried with."""

from __future__ import annotations

import inspect
from typing import Any

from rl.rollout.compat import UnexpectedVllm

_MARK = "_ultraep_patched"


def expect(owner: type, name: str, parameters: tuple[str, ...], fragments: tuple[str, ...]) -> Any | None:
    """The function to be patched, or None when it already is.

    Raises:
        UnexpectedVllm: it is missing, takes other parameters, or its source lacks one of ``fragments``.
    """
    target = owner.__dict__.get(name)
    where = f"{owner.__module__}.{owner.__qualname__}.{name}"
    if target is None:
        raise UnexpectedVllm(f"expected {where} to exist; use a tested vLLM version (rl/rollout/compat.py)")
    if getattr(target, _MARK, False):
        return None
    found = tuple(inspect.signature(target).parameters)
    if found != parameters:
        raise UnexpectedVllm(f"expected {where} to take {parameters}, it takes {found}; use a tested vLLM version")
    source = inspect.getsource(target)
    missing = [fragment for fragment in fragments if fragment not in source]
    if missing:
        raise UnexpectedVllm(f"expected {missing[0]!r} in {where}, it is gone; use a tested vLLM version")
    return target


def replace(owner: type, name: str, replacement: Any) -> None:
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)
