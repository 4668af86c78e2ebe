"""docs/migration.md names fields that exist."""

from __future__ import annotations

import re
from pathlib import Path

from rl.config import field_paths

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migration.md"
SECTIONS = {path.split(".")[0] for path in field_paths()}


def rows() -> list[tuple[str, str]]:
    """The cells of every table: there, here."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 2 and cells[1] != "here":
            found.append((cells[0], cells[1]))
    return found


def test_every_field_that_is_named_exists():
    known = {*field_paths(), *(".".join(path.split(".")[:n]) for path in field_paths() for n in (1, 2))}
    named = [
        name
        for _, here in rows()
        for text in re.findall(r"`([^`]+)`", here)
        for name in [text.split(":")[0]]
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name.split(".")[0] in SECTIONS
    ]
    assert len(named) > 100
    assert [name for name in named if name not in known] == []


def test_the_tables_are_whole():
    assert len(rows()) > 80
    assert all(there and here for there, here in rows())
