"""Files that survive a crash: atomic replacement, durable appends, and JSON lines whose last line may be torn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def sync_directory(path: Path) -> None:
    """Make names created, renamed or removed in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file: after a crash it holds either the old or the new content, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    sync_directory(path.parent)


def append_durably(path: Path, content: bytes) -> None:
    """Append and return only when the content is on disk; a failed write leaves the file as it was.

    Raises:
        OSError: the disk is full or gone.
    """
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        length = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, length)
            raise
    finally:
        os.close(descriptor)
    if is_new:
        sync_directory(path.parent)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def json_line(value: Any) -> bytes:
    """One line of JSON; not-a-number and infinities are kept as Python writes and reads them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True)
class JsonLines:
    """The content of a file of JSON lines.

    Attributes:
        values: the lines that are whole, in order.
        torn: what is left of a last line that a crash cut off; empty when there is none.
    """

    values: tuple[Any, ...]
    torn: bytes


def read_json_lines(path: Path) -> JsonLines:
    """Read a file of JSON lines; a missing file is an empty one.

    A last line without its newline, or that is not JSON, was being written when the writer died: it is returned as
    `torn`. A line is whole only with its newline, even if the text before it happens to parse.

    Raises:
        ValueError: a line before the last is not JSON.
    """
    if not path.exists():
        return JsonLines((), b"")
    *lines, torn = path.read_bytes().split(b"\n")
    values: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not torn:
                return JsonLines(tuple(values), line + b"\n")
            raise ValueError(
                f"{path} line {number}: expected JSON, came {line[:60]!r}; only a last line may be cut off by a "
                "crash, so "
                "the file was damaged otherwise; restore it from a copy."
            ) from error
    return JsonLines(tuple(values), torn)


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Replace a file of JSON lines atomically."""
    write_atomic(path, b"".join(map(json_line, values)))
