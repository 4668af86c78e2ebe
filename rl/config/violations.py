"""What is wrong with a configuration, and the form of the rules that find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rl.config.sections import RunConfig


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a configuration.

    Attributes:
        path: the field to look at first, dotted.
        message: what was expected, what came, what to do.
        fields: every field the message speaks of, dotted; a prefix stands for the whole section.
    """

    path: str
    message: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


Rule = Callable[[RunConfig], Iterator[Violation]]
