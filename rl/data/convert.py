"""Data sets of other tools as files of this project's columns, and a report of what became of every column.

Nothing has to be converted to be trained on: verl's and slime's files are read as they are, and other columns can be
named (``prompt_key``, ``label_key``). Converting is for files with names of their own, for changing between JSONL and
parquet, and for one look at which rows are bad.

1. Columns are found by name: the one that was asked for, else the first of ``PROMPTS`` and ``LABELS`` that there is.
2. Prompt and label become ``prompt`` and ``label``; all other columns are kept. An object in a parquet file has the
   same keys in every row, so keys that a row lacks are null there.
3. Bad rows stop the conversion, or are left out and listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.data.files import VERL_LABEL, Columns, RawRow, lookup, make_row, read_values
from rl.data.sources import BadRow, DataError, Row, listing, raise_bad_rows
from rl.files import write_json_lines

PROMPTS = ("prompt", "messages", "input", "question", "problem", "query", "instruction", "text")
_NONE = "\0"  # no column has this name
LABELS = ("label", VERL_LABEL, "ground_truth", "answer", "solution", "target", "final_answer", "output")


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        output: the new file.
        columns: what each column became, by its old name, for example ``{"question": "prompt"}``.
        rows: written.
        bad: rows left out.
    """

    output: Path
    columns: dict[str, str]
    rows: int
    bad: tuple[BadRow, ...]

    def render(self) -> str:
        """For people."""
        width = max(map(len, self.columns))
        lines = [f"  {old:<{width}} -> {new}" for old, new in self.columns.items()]
        lines = [f"{self.output}: {self.rows} rows", "columns:", *lines]
        if self.bad:
            lines.append(f"{len(self.bad)} rows are left out:\n  {listing(self.bad)}")
        return "\n".join(lines)


def convert(
    inputs: Sequence[Path],
    output: Path,
    *,
    prompt_key: str | None = None,
    label_key: str | None = None,
    skip_bad: bool = False,
    no_label: bool = False,
) -> Conversion:
    """Write rows of JSONL and parquet files to one file of either format.

    Args:
        inputs: in order.
        output: ends in ``.jsonl`` or ``.parquet``; must not exist.
        prompt_key, label_key: columns, dots for inner ones; None: found by name.
        skip_bad: leave out rows that cannot be used.
        no_label: labels are null.

    Raises:
        DataError: files that cannot be read or written, columns that are not found, or bad rows.
    """
    writers: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
        ".jsonl": _write_jsonl,
        ".parquet": _write_parquet,
    }
    if output.suffix not in writers:
        raise DataError(f"{output}: expected a name that ends in {' or '.join(writers)}; choose one")
    if output.exists():
        raise DataError(f"{output}: expected a file that does not exist; remove it or choose another name")
    raw = [(path, row) for path in map(Path, inputs) for row in read_values(path)]
    readable = [row.values for _, row in raw if row.values is not None]
    if not readable:
        raise_bad_rows(_names(inputs), [BadRow(f"{path}:{row.number}", row.problem) for path, row in raw], len(raw))
        raise DataError(f"{_names(inputs)}: expected rows, found none")
    columns = Columns(
        prompt=_find("prompt", prompt_key, PROMPTS, readable, "--prompt-key"),
        label=_NONE if no_label else _find("label", label_key, LABELS, readable, "--label-key, or --no-label"),
        label_optional=no_label,
    )
    rows, bad = _rows(raw, columns)
    if not skip_bad or not rows:
        raise_bad_rows(_names(inputs), bad, len(raw))
    values = [_written(row) for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    writers[output.suffix](output, values)
    return Conversion(output, _renamed(columns, readable), len(rows), tuple(bad))


def _rows(raw: Sequence[tuple[Path, RawRow]], columns: Columns) -> tuple[list[Row], list[BadRow]]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    for path, row in raw:
        try:
            if row.values is None:
                raise ValueError(row.problem)
            rows.append(make_row(row.values, columns, f"{path}:{row.number}"))
            taken = {"prompt", "label"} & set(rows[-1].metadata)
            if taken:
                rows.pop()
                raise ValueError(
                    f"{' and '.join(sorted(taken))}: the name is needed for another column; rename it first"
                )
        except ValueError as error:
            bad.append(BadRow(f"{path}:{row.number}", str(error)))
    return rows, bad


def _written(row: Row) -> dict[str, Any]:
    prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
    return {"prompt": prompt, "label": row.label, **row.metadata}


def _find(what: str, asked: str | None, known: Sequence[str], rows: Sequence[Mapping[str, Any]], option: str) -> str:
    """The column's name in these rows."""
    names = [asked] if asked is not None else list(known)
    for name in names:
        if any(lookup(values, name)[0] for values in rows):
            return name
    there = ", ".join(sorted({name for values in rows for name in values})) or "none"
    raise DataError(f"expected a column for the {what} ({', '.join(names)}), found {there}; name it with {option}")


def _renamed(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What became of each column, in the order in which they occur."""
    names = list(dict.fromkeys(name for values in rows for name in values))
    became = {name: {columns.prompt: "prompt", columns.label: "label"}.get(name, "kept") for name in names}
    for name, new in ((columns.prompt, "prompt"), (columns.label, "label")):
        if name not in became and name != _NONE:
            became[name] = f"{new} (copied; {name.split('.')[0]} is kept too)"
    return became


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_json_lines(path, rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError) as error:
            kinds = ", ".join(sorted({type(value).__name__ for value in values}))
            raise DataError(
                f"{path}: expected values of one kind in the column {name}, came {kinds} "
                f"({str(error).splitlines()[0]}); write a .jsonl file instead"
            ) from error
    parquet.write_table(pyarrow.table(columns), path)
