"""Find a reward function by its import path and learn, before the run starts, how it wants to be called."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rl.types import Sample

CallStyle = Literal["sample", "compute_score"]
_VERL_PARAMETERS = ("data_source", "solution_str", "ground_truth")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*)?")


class RewardLoadError(ValueError):
    """The reward function cannot be found or called; the message says what was expected."""


@dataclass(frozen=True)
class Reward:
    """A reward function, ready to be called.

    Attributes:
        path: the import path it came from.
        function: the function itself.
        style: ``"sample"``: called as ``function(sample, args)``; ``"compute_score"``: as verl does.
        is_async: it is a coroutine function.
        takes_extra_info: a ``compute_score`` function that accepts ``extra_info``.
    """

    path: str
    function: Callable[..., Any]
    style: CallStyle
    is_async: bool
    takes_extra_info: bool = False

    def call(self, sample: Sample, args: Mapping[str, Any]) -> Any:
        """What the function returns: a coroutine if ``is_async``.

        In verl's style, ``data_source`` is that of the prompt's metadata (else ``""``), ``ground_truth`` its label,
        ``extra_info`` its metadata, and ``args`` are further keyword arguments.
        """
        if self.style == "sample":
            return self.function(sample, args)
        keywords: dict[str, Any] = dict(args)
        if self.takes_extra_info:
            keywords["extra_info"] = dict(sample.prompt.metadata)
        return self.function(
            data_source=sample.prompt.metadata.get("data_source", ""),
            solution_str=sample.response_text,
            ground_truth=sample.prompt.label,
            **keywords,
        )


def load_reward(path: str, args: Mapping[str, Any] | None = None) -> Reward:
    """Import a reward function and check how it can be called.

    Two signatures are known: ``reward(sample: rl.types.Sample, args: Mapping) -> float``, and verl's
    ``compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float``, recognised by the names of its
    parameters. Both may be ``async``.

    Args:
        path: ``"package.module:function"`` or ``"package.module.function"``. The current directory is searched last.
        args: what the function will be given; for verl's style they must be keyword arguments that it accepts.

    Raises:
        RewardLoadError: nothing is found there, it fails to import, or it cannot be called in either way.
    """
    function = _import(path)
    if inspect.isclass(function) or not callable(function):
        raise RewardLoadError(f"reward {path!r}: expected a function, got {_article(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RewardLoadError(f"reward {path!r}: its signature cannot be read ({error}); wrap it in a def") from error
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - objects with an async __call__
    )
    if all(name in signature.parameters for name in _VERL_PARAMETERS):
        return _verl_reward(path, function, signature, is_async, dict(args or {}))
    try:
        signature.bind(object(), {})
    except TypeError as error:
        raise RewardLoadError(
            f"reward {path!r} has the signature {signature}; expected (sample, args) or verl's "
            f"(data_source, solution_str, ground_truth, extra_info=None): {error}"
        ) from None
    return Reward(path, function, "sample", is_async)


def _verl_reward(
    path: str, function: Callable[..., Any], signature: inspect.Signature, is_async: bool, args: dict[str, Any]
) -> Reward:
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    takes_extra_info = takes_any or "extra_info" in signature.parameters
    given = dict.fromkeys(_VERL_PARAMETERS) | ({"extra_info": None} if takes_extra_info else {})
    try:
        signature.bind(**given, **args)
    except TypeError as error:
        raise RewardLoadError(
            f"reward {path!r} has the signature {signature} and would be called with {', '.join([*given, *args])}: "
            f"{error}; change the reward's args"
        ) from None
    return Reward(path, function, "compute_score", is_async, takes_extra_info)


def _import(path: str) -> Any:
    if not _IMPORT_PATH.fullmatch(path) or not re.search(r"[.:]", path):
        raise RewardLoadError(f"reward {path!r}: expected an import path like package.module:function")
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    found: Any = _import_module(path, module_name)
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [known for known in dir(found) if not known.startswith("_")]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RewardLoadError(f"reward {path!r}: {module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    return found


def _import_module(path: str, module_name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # A console script does not search the directory it was started in.
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise RewardLoadError(
                f"reward {path!r}: there is no module {error.name!r}; expected package.module:function, "
                f"importable from {here} or PYTHONPATH"
            ) from error
        raise RewardLoadError(f"reward {path!r}: {module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise RewardLoadError(
            f"reward {path!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error


def _article(value: Any) -> str:
    return f"the class {value.__qualname__}" if inspect.isclass(value) else f"a {type(value).__qualname__}"
