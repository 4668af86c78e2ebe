"""Rows from JSONL and parquet files, with the columns of this project, of verl or of slime.

1. The columns ``prompt`` and ``label`` (or those that ``Columns`` names) become a row's prompt and label; without
   ``label``, verl's ``reward_model.ground_truth`` does. All other columns become metadata, unchanged: a reward finds
   verl's ``data_source`` and ``extra_info`` and slime's ``metadata`` there.
2. A row is good, or it is a ``BadRow`` that names its file and line (JSONL) or row (parquet), both counted from 1. One
   bad row changes nothing about the others.
3. Both formats give the same rows: values become JSON values. In parquet, where rows share columns, a missing number
   (NaN) is null, and dates and decimals are text.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rl.data.sources import BadRow, DataError, Message, Row, canonical

VERL_LABEL = "reward_model.ground_truth"
MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Columns:
    """Where prompt and label are; a dot goes into a column of objects (``reward_model.ground_truth``).

    Attributes:
        prompt: text, or a list of chat messages ``{"role": ..., "content": ...}``.
        label: any JSON value; None: ``label``, or verl's.
        label_optional: a row without that column has a null label; else it is a bad row.
    """

    prompt: str = "prompt"
    label: str | None = None
    label_optional: bool = False


@dataclass(frozen=True)
class RawRow:
    """A row as the file has it.

    Attributes:
        number: its line or row, from 1.
        values: by column; None if it cannot be read.
        problem: what was expected, if it cannot be read.
    """

    number: int
    values: dict[str, Any] | None
    problem: str = ""


def read_files(
    paths: Sequence[str | Path], columns: Columns | None = None, limit: int | None = None
) -> tuple[list[Row], list[BadRow]]:
    """Rows of files in order: those that can be used, and the others.

    Args:
        paths: names that end in ``.jsonl`` or ``.parquet``.
        columns: where prompt and label are; None: ``Columns()``.
        limit: look at the first so many rows of all files together; None for all.

    Raises:
        DataError: a file that cannot be read, or no rows at all.
    """
    columns = columns or Columns()
    rows: list[Row] = []
    bad: list[BadRow] = []
    for path in map(Path, paths):
        left = None if limit is None else limit - len(rows) - len(bad)
        if left == 0:
            break
        before = len(rows) + len(bad)
        for raw in islice(read_values(path), left):
            place = f"{path}:{raw.number}"
            try:
                if raw.values is None:
                    raise ValueError(raw.problem)
                rows.append(make_row(raw.values, columns, place))
            except ValueError as error:
                bad.append(BadRow(place, str(error)))
        if len(rows) + len(bad) == before:
            raise DataError(f"{path} has no rows; expected rows with {columns.prompt} and {columns.label or 'label'}")
    return rows, bad


def read_values(path: str | Path) -> Iterator[RawRow]:
    """The rows of one file as they are, one after the other.

    Raises:
        DataError: the file cannot be read, or is of another kind.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a name that ends in {' or '.join(readers)}; convert or rename the file")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; expected a file of rows") from error


def make_row(values: Mapping[str, Any], columns: Columns, origin: str) -> Row:
    """A row from the columns of one row of a file.

    Raises:
        ValueError: saying what was expected; the caller adds the place.
    """
    label_column = columns.label or ("label" if "label" in values else VERL_LABEL)
    has_prompt, prompt = lookup(values, columns.prompt)
    has_label, label = lookup(values, label_column)
    wanted = (columns.prompt, columns.label or "label")
    missing = [
        name for name, found in zip(wanted, (has_prompt, has_label or columns.label_optional), strict=True) if not found
    ]
    if missing:
        found = ", ".join(sorted(values)) or "nothing"
        hint = {
            (True, True): "; set prompt_key and label_key",
            (True, False): "; set prompt_key to the prompt's column",
            (False, True): "; set label_key to the label's column, or write null if the reward needs no label "
            "(or set reward.needs_label to false)",
        }[not has_prompt, wanted[1] in missing]
        raise ValueError(
            f"expected the columns {' and '.join(wanted)}, {' and '.join(missing)} missing (found {found}){hint}"
        )
    for name in MEDIA:
        if values.get(name):
            raise ValueError(f"{name}: expected text only, got {len(values[name])}; prompts with {name} are refused")
    prompt = parse_prompt(prompt, columns.prompt)
    used = {columns.prompt, label_column}
    return Row(
        prompt=prompt,
        label=label,
        metadata={name: value for name, value in values.items() if name not in used},
        answer=label if isinstance(label, str) and label.strip() else None,
        origin=origin,
    )


def lookup(values: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether there is such a column, and its value; a dot goes into objects unless a column has it in its name."""
    if column in values:
        return True, values[column]
    found: Any = values
    for name in column.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return False, None
        found = found[name]
    return True, found


def parse_prompt(prompt: Any, name: str = "prompt") -> str | tuple[Message, ...]:
    """Text, or chat messages; columns that other messages have and this one lacks (null) are left out.

    Raises:
        ValueError: neither, or nothing is asked.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{name}: expected text, got none")
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"{name}: expected text or a list of chat messages, got {kind(prompt)}")
    if not prompt:
        raise ValueError(f"{name}: expected chat messages, got an empty list")
    for index, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{index}]: expected an object with role and content, got {kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{name}[{index}].{key}: expected text, got {kind(message.get(key))}")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"{name}: expected the last message to ask something, got the assistant's own")
    return tuple({key: value for key, value in message.items() if value is not None} for message in prompt)


def kind(value: Any) -> str:
    """What a JSON value is, for error messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null or nothing"}
    return kinds.get(type(value), "a number")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield RawRow(number, _parse_line(line))
            except ValueError as error:
                yield RawRow(number, None, str(error))


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, byte {error.start} is not") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
        # Lone surrogates are JSON but not text: no tokenizer takes them.
        canonical(value).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {_shown(text)} ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("expected text, got half of a surrogate pair (\\ud800..\\udfff)") from None
    except RecursionError:
        raise ValueError("expected a JSON object, got one nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with a row's columns, got {kind(value)}")
    return value


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f"{path}: expected each column once, got {', '.join(twice)} twice; rename one")
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch, index, number)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no such file; pages that are damaged have no number
        where = f" after row {number}" if number else ""
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: expected a parquet file, cannot be read{where}: {reason}; write it again") from error


def _parquet_row(batch: Any, index: int, number: int) -> RawRow:
    try:
        values = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[name] = _plain(column[index].as_py(), name)
            except UnicodeDecodeError:
                raise ValueError(f"{name}: expected UTF-8 text, got bytes that are not") from None
        return RawRow(number, values)
    except ValueError as error:
        return RawRow(number, None, str(error))


def _plain(value: Any, name: str) -> Any:
    """An Arrow value as a JSON value."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"{name}: expected finite numbers, got {value}")
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):  # an Arrow map is a list of pairs
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise ValueError(f"{name}: expected text, numbers, lists or objects, got {type(value).__name__}; drop the column")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"expected JSON numbers, got {name}")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected each key once, got {', '.join(twice)} twice")
    return value


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
