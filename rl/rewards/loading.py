"""Find a reward function by its import path and learn, before the run starts, how it wants to be called."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rl.rewards.slime import slime_args, slime_sample, slime_types
from rl.types import Sample

CallStyle = Literal["sample", "samples", "compute_score", "compute_scores", "slime", "slime_group"]
_VERL_PARAMETERS = ("data_source", "solution_str", "ground_truth")
_VERL_BATCH_PARAMETERS = ("data_sources", "solution_strs", "ground_truths")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*)?")
_FILE_PATH = re.compile(r"(.+\.py):([^\W\d]\w*)")


class RewardLoadError(ValueError):
    """The reward function cannot be found or called; the message says what was expected."""


@dataclass(frozen=True)
class Reward:
    """A reward function, ready to be called.

    Attributes:
        path: the import path it came from.
        function: the function itself.
        style: how it is called, see ``load_reward``.
        is_async: it is a coroutine function.
        takes_extra_info: a function of verl's that accepts ``extra_info`` (or ``extra_infos``).
        key: entry of the reward where the function returns a mapping; None: ``"score"``. It is ``reward_key`` of the
            args, as slime's flag of that name.
    """

    path: str
    function: Callable[..., Any]
    style: CallStyle
    is_async: bool
    takes_extra_info: bool = False
    key: str | None = None

    @property
    def of_groups(self) -> bool:
        """It is called with all samples of a prompt that are there, and returns as many rewards."""
        return self.style in ("samples", "compute_scores", "slime_group")

    def call(self, samples: Sample | Sequence[Sample], args: Mapping[str, Any]) -> Any:
        """What the function returns for one sample, or for several (``of_groups``): a coroutine if ``is_async``.

        In verl's style, ``data_source`` is that of the prompt's metadata (else ``""``), ``ground_truth`` its label,
        ``extra_info`` that of its metadata (else all of it), and ``args`` are further keyword arguments. In slime's,
        ``args`` are attributes, and the sample is seen under slime's names.
        """
        given = [samples] if isinstance(samples, Sample) else list(samples)
        if self.style == "sample":
            return self.function(given[0], args)
        if self.style == "samples":
            return self.function(given, args)
        if self.style == "slime":
            return self.function(slime_args(args), slime_sample(given[0]))
        if self.style == "slime_group":
            return self.function(slime_args(args), [slime_sample(sample) for sample in given])
        values = {
            "data_source": [sample.prompt.metadata.get("data_source", "") for sample in given],
            "solution_str": [sample.response_text for sample in given],
            "ground_truth": [sample.prompt.label for sample in given],
        }
        if self.takes_extra_info:
            values["extra_info"] = [_extra_info(sample) for sample in given]
        args = _without_key(args)
        if self.style == "compute_scores":
            return self.function(**{f"{name}s": value for name, value in values.items()}, **args)
        return self.function(**{name: value[0] for name, value in values.items()}, **args)


def load_reward(path: str, args: Mapping[str, Any] | None = None) -> Reward:
    """Import a reward function and check how it can be called.

    These signatures are known, by the names of their parameters; all may be ``async``:

    - ``reward(sample: rl.types.Sample, args: Mapping) -> float``; with ``samples`` in place of ``sample`` it gets the
      samples of a prompt and returns a list;
    - verl's ``compute_score(data_source, solution_str, ground_truth, extra_info=None)``, and its batched form with an
      ``s`` at the end of each name;
    - slime's ``custom_rm(args, sample, **kwargs)``, and its group form with ``samples``.

    Args:
        path: ``"package.module:function"``, ``"package.module.function"`` or
            ``"path/to/file.py:function"``. The current directory is searched last.
        args: what the function will be given; for verl's style they must be keyword arguments that it accepts.

    A function may bring a check of its args as the attribute ``check_args`` (args -> None, raises ValueError).

    Raises:
        RewardLoadError: nothing is found there, it fails to import, it refuses the args, or it cannot be called in any
            of these ways.
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
    if check := getattr(function, "check_args", None):
        try:
            check(_without_key(args or {}))
        except ValueError as error:
            raise RewardLoadError(f"reward {path!r}: {error}") from error
    names = list(signature.parameters)
    key = (args or {}).get("reward_key")
    if key is not None and not isinstance(key, str):
        raise RewardLoadError(f"reward {path!r}: expected a text as reward_key in its args, got {key!r}")
    for style, parameters in (("compute_score", _VERL_PARAMETERS), ("compute_scores", _VERL_BATCH_PARAMETERS)):
        if all(name in names for name in parameters):
            reward = _verl_reward(path, function, signature, is_async, _without_key(args or {}), style, parameters)
            return replace(reward, key=key)
    try:
        signature.bind(object(), {})
    except TypeError as error:
        raise RewardLoadError(
            f"reward {path!r} has the signature {signature}; expected (sample, args), verl's "
            f"(data_source, solution_str, ground_truth, extra_info=None) or slime's (args, sample, **kwargs): {error}"
        ) from None
    style = {("args", "sample"): "slime", ("args", "samples"): "slime_group"}.get(tuple(names[:2]))
    return Reward(path, function, style or ("samples" if names[0] == "samples" else "sample"), is_async, key=key)


def label_check(
    path: str, args: Mapping[str, Any] | None = None, needs_label: bool | None = None
) -> Callable[[Any], None] | None:
    """What tells whether a reward can use a row's label: raises ValueError if not. None: nothing is asked of labels.

    A reward function may bring its own check as the attribute ``check_label`` (label -> None, raises ValueError), as
    those of ``rl.rewards`` do.

    Args:
        path, args: as for ``load_reward``.
        needs_label: True: a null or empty label is refused; False: null is never refused; None: the function's own
            check decides.

    Raises:
        RewardLoadError: as ``load_reward``.
    """
    own = getattr(load_reward(path, args).function, "check_label", None)
    if own is None and not needs_label:
        return None

    def check(label: Any) -> None:
        if label is None or (isinstance(label, str) and not label.strip()):
            if needs_label is False and label is None:
                return
            if needs_label:
                shown = "null" if label is None else repr(label)
                raise ValueError(f"expected a value because the reward needs one, got {shown}")
        if own is not None:
            own(label)

    return check


def _without_key(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name != "reward_key"}


def _extra_info(sample: Sample) -> dict[str, Any]:
    """verl's column ``extra_info``, or all metadata of data without one."""
    info = sample.prompt.metadata.get("extra_info")
    return dict(info if isinstance(info, Mapping) else sample.prompt.metadata)


def _verl_reward(
    path: str,
    function: Callable[..., Any],
    signature: inspect.Signature,
    is_async: bool,
    args: dict[str, Any],
    style: CallStyle,
    parameters: Sequence[str],
) -> Reward:
    info = "extra_infos" if style == "compute_scores" else "extra_info"
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    takes_extra_info = takes_any or info in signature.parameters
    given = dict.fromkeys(parameters) | ({info: None} if takes_extra_info else {})
    try:
        signature.bind(**given, **args)
    except TypeError as error:
        raise RewardLoadError(
            f"reward {path!r} has the signature {signature} and would be called with {', '.join([*given, *args])}: "
            f"{error}; change the reward's args"
        ) from None
    return Reward(path, function, style, is_async, takes_extra_info)


def _import(path: str) -> Any:
    try:
        return _find(path)
    except RewardLoadError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError) or error.__cause__.name != "slime":
            raise
    # A reward written for slime imports its Sample, for annotations as a rule.
    with slime_types():
        return _find(path)


def _find(path: str) -> Any:
    if file := _FILE_PATH.fullmatch(path):
        return _attribute(path, _import_file(path, Path(file[1])), file[2], file[1])
    if not _IMPORT_PATH.fullmatch(path) or not re.search(r"[.:]", path):
        raise RewardLoadError(f"reward {path!r}: expected an import path like package.module:function")
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    return _attribute(path, _import_module(path, module_name), attribute, module_name)


def _attribute(path: str, module: Any, attribute: str, module_name: str) -> Any:
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [known for known in dir(found) if not known.startswith("_")]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RewardLoadError(f"reward {path!r}: {module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    return found


def _import_file(path: str, file: Path) -> Any:
    """The module in a file; the same one each time, so that what it keeps is kept."""
    if not file.is_file():
        raise RewardLoadError(f"reward {path!r}: expected a Python file, found none at {file}")
    name = f"rl_reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardLoadError(f"reward {path!r}: importing {file} failed: {type(error).__name__}: {error}") from error
    return module


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
