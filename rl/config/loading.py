"""From a YAML file and overrides to a `RunConfig`, or to one error that lists everything wrong with it."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rl.config.rules import Violation, check
from rl.config.sections import RunConfig

# Stand-ins for required fields that are missing, so that the cross-field rules can still look at the rest.
_PLACEHOLDERS: dict[str, Any] = {
    "run": {"name": "unnamed"},
    "run.name": "unnamed",
    "model": {"path": "unknown"},
    "model.path": "unknown",
    "data": {"train": {"files": ["unknown.jsonl"]}},
    "data.train": {"files": ["unknown.jsonl"]},
    "reward": {"path": "unknown:unknown"},
    "reward.path": "unknown:unknown",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "path_type": "a path",
    "model_type": "a section (a mapping of fields)",
    "model_attributes_type": "a section (a mapping of fields)",
}


class ConfigError(ValueError):
    """A configuration that cannot be used. ``violations`` lists everything found wrong."""

    def __init__(self, source: str, violations: Sequence[Violation]):
        self.source = source
        self.violations = tuple(violations)
        count = f"{len(violations)} error" + ("s" if len(violations) > 1 else "")
        super().__init__("\n".join([f"{source}: {count} in the configuration", *(f"  - {v}" for v in violations)]))


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: YAML file.
        overrides: ``a.b=c`` each, c in YAML; they win over the file, the last one over earlier ones.

    Raises:
        ConfigError: with every unknown key, wrong value and broken cross-field rule.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            str(path), [Violation("file", f"expected a YAML file, found none at {path}; check the path.")]
        )
    malformed = [
        Violation(text, "expected an override `section.field=value`; write it without spaces around `=`.")
        for text in overrides
        if "=" not in text or not all(text.split("=", 1)[0].split("."))
    ]
    if malformed:
        raise ConfigError(str(path), malformed)
    try:
        base = OmegaConf.load(path)
        if not OmegaConf.is_dict(base):
            raise ConfigError(
                str(path), [Violation("file", "expected a mapping of sections at the top; came a list or text.")]
            )
        raw = OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides))), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            str(path), [Violation("file", f"expected YAML that can be read; {text}; correct it.")]
        ) from error
    assert isinstance(raw, dict)
    return from_dict(raw, source=str(path))


def from_dict(raw: Mapping[Any, Any], source: str = "configuration") -> RunConfig:
    """Validate a nested mapping; ``source`` is named in errors. Raises `ConfigError` like `load`."""
    data = _copy(raw)
    violations: list[Violation] = []
    bad: set[str] = set()
    # Each round takes out what was refused and validates the rest, so that the rules below see a whole configuration.
    for _ in range(10):
        try:
            config = RunConfig.model_validate(data)
            break
        except ValidationError as error:
            for details in error.errors(include_url=False):
                location = _location(details["loc"])
                dotted = ".".join(map(str, location))
                if not any(dotted == known or dotted.startswith(known + ".") for known in bad):
                    violations.append(_translate(details, location))
                bad.add(dotted)
                _take_out(data, location)
    else:
        raise ConfigError(source, violations)
    violations += check(config, ignore=frozenset(bad))
    if violations:
        raise ConfigError(source, violations)
    return config


def to_dict(config: BaseModel) -> dict[str, Any]:
    """Nested plain values (paths as texts, tuples as lists) under the names of the YAML file."""
    return config.model_dump(mode="json", by_alias=True)


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration; loading it gives an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def describe(section: str | None = None) -> str:
    """Every field, its type, default and meaning, as text.

    Args:
        section: dotted section to describe, e.g. ``trainer.optimizer``; None: all.

    Raises:
        ConfigError: there is no such section.
    """
    rows = [row for row in _fields(RunConfig) if section is None or f"{row[0]}.".startswith(f"{section}.")]
    if not rows:
        known = sorted(RunConfig.model_fields)
        raise ConfigError(
            str(section),
            [Violation(str(section), f"no such section; expected one of {', '.join(known)}.{_hint(str(section))}")],
        )
    lines = []
    for path, field in rows:
        default = (
            "required" if field.is_required() else f"default {_show(field.get_default(call_default_factory=True))}"
        )
        lines.append(f"{path} ({_type_name(field.annotation)}, {default})\n    {field.description}")
    return "\n".join(lines)


def field_paths() -> tuple[str, ...]:
    """Dotted names of all fields, in file order."""
    return tuple(path for path, _ in _fields(RunConfig))


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        inner = _inner_model(field.annotation)
        if inner is None:
            yield path, field
        else:
            yield from _fields(inner, f"{path}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `SourceSection | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _inner_model(part))), None)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "list of " + _type_name(typing.get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    names = {int: "int", float: "float", bool: "bool", str: "text", Path: "path"}
    return names.get(annotation, "mapping")


def _location(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The location in the user's file: field names become their aliases."""
    model: type[BaseModel] | None = RunConfig
    result: list[int | str] = []
    for part in loc:
        field = model.model_fields.get(part) if model is not None and isinstance(part, str) else None
        result.append(field.alias or part if field is not None else part)
        model = _inner_model(field.annotation) if field is not None else None
    return tuple(result)


def _translate(details: ErrorDetails, location: tuple[int | str, ...]) -> Violation:
    path = ".".join(map(str, location)) or "file"
    kind, came, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return Violation(path, f"unknown key, came with value {_show(came)}; remove it.{_hint(path)}")
    field = dict(_fields(RunConfig)).get(path)
    meaning = f" ({field.description})" if field is not None and field.description else ""
    if kind == "missing":
        return Violation(path, f"required, but missing; set it.{meaning}")
    if kind == "literal_error":
        expected = f"one of {context['expected']}"
    elif kind == "string_pattern_mismatch" and ":" in context["pattern"]:
        expected = "an import path `package.module:function`"
    elif kind == "string_pattern_mismatch":
        expected = "letters, digits, `_`, `-` and `.` only"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}[kind]
        expected = f"a number {sign} {next(iter(context.values()))}"
    else:
        expected = _EXPECTED.get(kind, details["msg"])
    return Violation(path, f"expected {expected}, came {_show(came)}; correct it.{meaning}")


def _hint(path: str) -> str:
    """``Did you mean ...?``: the nearest name beside it, else the same or nearest name elsewhere."""
    known = field_paths()
    sections = {path_.rsplit(".", n)[0] for path_ in known for n in range(1, path_.count(".") + 1)}
    every = [*known, *sorted(sections)]
    parent, _, name = path.rpartition(".")
    siblings = {path_.rpartition(".")[2]: path_ for path_ in every if path_.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f" Did you mean `{siblings[near[0]]}`?"
    elsewhere: dict[str, list[str]] = {}
    for path_ in every:
        elsewhere.setdefault(path_.rpartition(".")[2], []).append(path_)
    near = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    if near:
        return f" Did you mean {' or '.join(f'`{p}`' for p in elsewhere[near[0]])}?"
    return f" Known here: {', '.join(siblings)}." if siblings else ""


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _take_out(data: Any, location: tuple[int | str, ...]) -> None:
    """Remove the refused value so that its default takes over; put a placeholder where a value is required."""
    node = data
    for depth, part in enumerate(location[:-1]):
        inner = node.get(part) if isinstance(node, dict) else None
        if not isinstance(inner, dict):
            # Inside a list, or through something that is no mapping: the whole field goes.
            location = location[: depth + 1]
            break
        node = inner
    dotted = ".".join(map(str, location))
    if dotted in _PLACEHOLDERS:
        node[location[-1]] = _copy(_PLACEHOLDERS[dotted])
    else:
        node.pop(location[-1], None)
