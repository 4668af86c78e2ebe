"""Rows of a data set, and those that a reasoning-gym task generates; ``rl.data.files`` reads them from files.

1. A ``Row`` is checked where it enters: everything after may trust its types.
2. All bad rows of a source are collected before one ``DataError`` names them (at most 20), each with its place and what
   was expected; no row is skipped silently.
3. A row's values are JSON values, so that rows can be digested, stored and sent between processes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.data.jsonable import to_json

Message = dict[str, Any]
MAX_REPORTED = 20


class DataError(ValueError):
    """The data cannot be used; the message names every bad row (at most 20) and what was expected of it."""


@dataclass(frozen=True)
class Row:
    """One problem before it is tokenised.

    Attributes:
        prompt: text, or chat messages, each with ``role`` and ``content``.
        label: what the reward compares with; any JSON value.
        metadata: whatever else the source carries; JSON values.
        answer: a right answer as text, for supervised warm-up; None when the source has none.
        origin: where the row comes from, for error messages: ``"data/train.jsonl:17"``.
    """

    prompt: str | tuple[Message, ...]
    label: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    answer: str | None = None
    origin: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        place: where it is: ``"data/train.jsonl:17"``.
        reason: what was expected and what came.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def raise_bad_rows(what: str, problems: Sequence[BadRow], rows: int) -> None:
    """Raise one ``DataError`` for all ``problems``; none, no error.

    Args:
        what: whose rows they are: a file, or what is made of them.
        problems: of bad rows.
        rows: good and bad ones together.
    """
    if problems:
        raise DataError(
            f"{what}: {len(problems)} of {rows} rows cannot be used; correct or remove them:\n  {listing(problems)}"
        )


def listing(problems: Sequence[BadRow]) -> str:
    """At most ``MAX_REPORTED`` problems, one per line, and how many more there are."""
    more = [f"... and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
    return "\n  ".join([*map(str, problems[:MAX_REPORTED]), *more])


def check_labels(rows: Sequence[Row], check: Callable[[Any], None]) -> tuple[list[Row], list[BadRow]]:
    """Rows whose label a reward can use, and the others.

    Args:
        rows: in order.
        check: raises ValueError saying what label was expected.
    """
    good: list[Row] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            check(row.label)
            good.append(row)
        except ValueError as error:
            bad.append(BadRow(row.origin or "row", f"label: {error}"))
    return good, bad


def reasoning_gym_rows(task: str, size: int, seed: int, args: Mapping[str, Any] | None = None) -> list[Row]:
    """Problems of a reasoning-gym task.

    Problem i is a function of ``seed + i`` in nearly all tasks: sets whose ranges ``seed .. seed + size - 1`` overlap
    share problems.

    The label holds all that the task's own scoring needs, ``{"task", "args", "entry"}``, with ``entry`` as
    ``jsonable.to_json`` writes it (it keeps tuples and integer keys apart from lists and text).

    Args:
        task: name in reasoning-gym, for example ``"chain_sum"``.
        size: number of problems.
        seed: of the generator, >= 0.
        args: the task's own settings.

    Raises:
        DataError: unknown task, settings that it refuses, or problems that cannot be made.
    """
    settings = dict(args or {})
    data = create_task(task, {**settings, "size": size, "seed": seed})
    rows: list[Row] = []
    problems: list[BadRow] = []
    for index in range(size):
        origin = f"reasoning-gym {task} seed {seed} problem {index}"
        try:
            rows.append(_gym_row(task, settings, data[index], origin))
        except Exception as error:
            problems.append(BadRow(origin, f"{type(error).__name__}: {error}"))
    raise_bad_rows(f"reasoning-gym task {task!r}", problems, size)
    return rows


def create_task(task: str, settings: Mapping[str, Any]) -> Any:
    """The reasoning-gym data set of that name with these settings.

    Raises:
        DataError: reasoning-gym is missing, there is no such task, or it refuses the settings.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f"reasoning-gym cannot be imported ({error}); install it: pip install reasoning-gym") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(DATASETS)} tasks, e.g. chain_sum"
        raise DataError(f"reasoning-gym has no task {task!r}; {hint}")
    try:
        return reasoning_gym.create_dataset(task, **settings)
    except Exception as error:
        known = sorted(getattr(DATASETS[task][1], "__dataclass_fields__", {}))
        raise DataError(
            f"reasoning-gym task {task!r} refuses the settings {dict(settings)}: {type(error).__name__}: {error}; "
            f"its settings are {', '.join(known)}"
        ) from error


def digest(rows: Iterable[Row]) -> str:
    """``"sha256:..."`` of prompts, labels and metadata in order; where the rows were found does not matter."""
    total = hashlib.sha256()
    for row in rows:
        value = {"prompt": row.prompt, "label": row.label, "metadata": dict(row.metadata)}
        total.update(canonical(value).encode() + b"\n")
    return "sha256:" + total.hexdigest()


def question(row: Row) -> str:
    """What makes two problems the same: the prompt, without white space at its ends."""
    if isinstance(row.prompt, str):
        return row.prompt.strip()
    return canonical([[message["role"], message["content"].strip()] for message in row.prompt])


def overlap(train_rows: Iterable[Row], eval_rows: Iterable[Row]) -> int:
    """How many of ``eval_rows`` ask a question that ``train_rows`` ask too."""
    known = {question(row) for row in train_rows}
    return sum(question(row) in known for row in eval_rows)


def drop_overlap(train_rows: Iterable[Row], eval_rows: Iterable[Row]) -> list[Row]:
    """``eval_rows`` without those that ask a question of ``train_rows``, in order: problems truly held out.

    Raises:
        DataError: nothing is left.
    """
    known = {question(row) for row in train_rows}
    rows = list(eval_rows)
    kept = [row for row in rows if question(row) not in known]
    if rows and not kept:
        raise DataError(
            f"all {len(rows)} held-out problems are also trained on, so nothing is left to evaluate; "
            "choose a task with more different problems, fewer training problems, or another file"
        )
    return kept


def canonical(value: Any) -> str:
    """A JSON value as text, the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _gym_row(task: str, settings: dict[str, Any], entry: Mapping[str, Any], origin: str) -> Row:
    text = entry["question"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a question as text, got {text!r}")
    answer = entry["answer"]
    return Row(
        prompt=str(text),
        label={"task": task, "args": to_json(settings), "entry": to_json(dict(entry))},
        answer=str(answer) if isinstance(answer, str) else None,
        origin=origin,
    )
