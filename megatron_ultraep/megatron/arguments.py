"""``--ultraep-*`` flags: one for every field of :class:`BalanceConfig`, named as Megatron names its own.

``min_tokens`` is ``--ultraep-min-tokens N``; a boolean ``gate`` is ``--ultraep-gate`` and ``--no-ultraep-gate``. When a
flag is given twice, the last one counts, so a script may append to a given command line. Everything wrong with the
flags stops the program before anything is built: a sentence on stderr and exit code 2, as argparse does.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_ultraep.config import BalanceConfig

_PREFIXES = ("--ultraep-", "--no-ultraep-")


def is_flag(argument: str) -> bool:
    """Whether a word of a command line is meant for us, known or not."""
    return argument.startswith(_PREFIXES)


def option_strings(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The flags of a field: one, or with its negation where the field is a boolean."""
    name = field.name.replace("_", "-")
    return tuple(prefix + name for prefix in (_PREFIXES if _type_of(field) is bool else _PREFIXES[:1]))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag to a parser, in a group of its own."""
    group = parser.add_argument_group("balancing of experts")
    for field in dataclasses.fields(BalanceConfig):
        options: dict[str, Any] = {
            "dest": f"ultraep_{field.name}",
            "default": field.default,
            "help": f"{field.metadata['help']} (default: {shown_default(field)})".replace("%", "%%"),
        }
        if _type_of(field) is bool:
            options["action"] = _Switch
        else:
            options["type"] = _type_of(field)
            options["metavar"] = field.metadata["metavar"]
            options["choices"] = field.metadata["choices"]
        group.add_argument(*option_strings(field), **options)
    return parser


def parse(flags: Sequence[str], parser: argparse.ArgumentParser | None = None) -> BalanceConfig:
    """The config that these flags describe.

    Args:
        flags: words of a command line, ours only.
        parser: whose usage and name to show when they are wrong.

    Raises:
        SystemExit: code 2, when a flag is unknown or malformed, or the values contradict each other.
    """
    parser = add_arguments(parser or argparse.ArgumentParser(allow_abbrev=False))
    unknown = [flag for flag in flags if is_flag(flag) and _name(flag) not in _takes_value()]
    if unknown:
        unknown_flag(parser, unknown[0])
    values = vars(parser.parse_args(list(flags)))
    names = [field.name for field in dataclasses.fields(BalanceConfig)]
    try:
        return BalanceConfig(**{name: values[f"ultraep_{name}"] for name in names})
    except ValueError as error:
        parser.error(f"--ultraep-* flags contradict each other or are out of range. {error}")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our words of a command line, with their values, and the others; the order of each is kept."""
    ours: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if is_flag(word):
            ours += _with_value(word, words)
        else:
            others.append(word)
    return ours, others


def leading(arguments: Sequence[str]) -> int:
    """How many words at the beginning of a command line are ours."""
    count = 0
    while count < len(arguments) and is_flag(arguments[count]):
        count += len(_with_value(arguments[count], iter(arguments[count + 1 :])))
    return count


def unknown_flag(parser: argparse.ArgumentParser, flag: str) -> NoReturn:
    """End the program because this flag does not exist, and name the one that was probably meant."""
    close = difflib.get_close_matches(_name(flag), list(_takes_value()), n=1)
    parser.error(f"there is no flag {_name(flag)}" + (f"; is {close[0]} meant?" if close else "; --help lists them"))


def shown_default(field: dataclasses.Field[Any]) -> str:
    """A field's default as help texts and the documentation show it."""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default) or "empty"


def markdown_table() -> str:
    """The flags as the documentation lists them."""
    rows = ["| flag | meaning | default |", "|---|---|---|"]
    for field in dataclasses.fields(BalanceConfig):
        flags = ", ".join(
            f"`{' '.join(filter(None, (flag, field.metadata['metavar'])))}`" for flag in option_strings(field)
        )
        rows.append(f"| {flags} | {field.metadata['help']} | {shown_default(field)} |")
    return "\n".join(rows)


class _Switch(argparse.Action):
    """A flag and its negation, neither of which takes a value."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


def _type_of(field: dataclasses.Field[Any]) -> type:
    hint = typing.get_type_hints(BalanceConfig)[field.name]
    return str if typing.get_origin(hint) is typing.Literal else hint


def _takes_value() -> dict[str, bool]:
    """Every flag, and whether a value follows it."""
    return {
        option: _type_of(field) is not bool
        for field in dataclasses.fields(BalanceConfig)
        for option in option_strings(field)
    }


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def _with_value(flag: str, following: Any) -> list[str]:
    if "=" in flag or not _takes_value().get(flag, False):
        return [flag]
    # Without a value after it, argparse says so.
    return [flag, *(word for word in (next(following, None),) if word is not None)]
