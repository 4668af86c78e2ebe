"""Prompts in a fixed order, with a position that is all a run needs to go on where it stopped.

1. An epoch takes every row once. Its order is a pure function of (seed, epoch, number of rows): the ranking of raw
   64-bit outputs of the Philox generator with (seed, epoch) as its key, a stream that numpy never changes.
2. An *ordinal* is a place in that order, from 0. A ``Cursor`` (epoch, ordinal) names the next prompt to take; there is
   no other state.
3. Batches are never short: one that reaches the end of an epoch goes on with the first prompts of the next. Taking
   batches of any sizes one after another takes every ordinal of every epoch exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.data.encoding import PLACEHOLDER, PromptEncoder
from rl.data.sources import BadRow, DataError, Row, digest, listing, raise_bad_rows
from rl.types import Prompt


@dataclass(frozen=True, order=True)
class Cursor:
    """The next prompt to take: ``ordinal`` of ``epoch``, both from 0."""

    epoch: int = 0
    ordinal: int = 0

    def to_json(self) -> dict[str, int]:
        """For the ledger and checkpoints."""
        return {"epoch": self.epoch, "ordinal": self.ordinal}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cursor:
        """The inverse of ``to_json``.

        Raises:
            ValueError: not two integers >= 0 named epoch and ordinal.
        """
        numbers = [value.get("epoch"), value.get("ordinal")]
        if set(value) != {"epoch", "ordinal"} or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"expected epoch and ordinal, both integers >= 0, got {dict(value)}")
        return cls(value["epoch"], value["ordinal"])


class PromptDataset:
    """Tokenised rows, taken by cursor. Immutable; all rows are checked and tokenised at once when it is made."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        seed: int = 0,
        template: str = PLACEHOLDER,
        chat: bool = False,
        chat_args: Mapping[str, Any] | None = None,
        shuffle: bool = True,
        max_prompt_tokens: int | None = None,
        split: str = "train",
        limit: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        """Tokenise ``rows``.

        Args:
            rows: at least one.
            tokenizer: a Hugging Face tokenizer.
            seed: of the shuffling, 0 .. 2^64 - 1.
            template: see ``PromptEncoder``.
            chat, chat_args: see ``PromptEncoder``.
            shuffle: another order in each epoch; False takes the rows as they come.
            max_prompt_tokens: longest prompt allowed; None for no limit.
            split: first part of the prompts' uids.
            limit: take the first so many usable rows; None: all.
            skip_bad: leave out rows that cannot be used, see ``skipped``; else they are an error.

        Raises:
            DataError: no rows, or rows that cannot be used (all are named).
            ValueError: a seed out of range, or settings that ``PromptEncoder`` refuses.
        """
        if not rows:
            raise DataError(f"the {split} data has no rows; expected at least one")
        if not 0 <= seed < 2**64:
            raise ValueError(f"expected a seed in 0..2^64-1, got {seed}")
        encoder = PromptEncoder(tokenizer, template, chat, max_prompt_tokens, chat_args or {})
        kept, skipped = encoder.encode_each(rows, limit)
        if not skip_bad:
            raise_bad_rows("prompts", skipped, len(kept) + len(skipped))
        if not kept:
            raise DataError(f"the {split} data has no rows that can be used:\n  {listing(skipped)}")
        self._rows = tuple(row for row, _ in kept)
        self._encoded = tuple(encoded for _, encoded in kept)
        self._skipped = tuple(skipped)
        self._seed = seed
        self._shuffle = shuffle
        self._split = split
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are used, in the order they came."""
        return self._rows

    @property
    def skipped(self) -> tuple[BadRow, ...]:
        """Rows left out because they cannot be used."""
        return self._skipped

    @property
    def digest(self) -> str:
        """``"sha256:..."`` of the rows in the order they came."""
        return digest(self._rows)

    def order(self, epoch: int) -> np.ndarray:
        """Which row has which ordinal in that epoch: int64 ``[len(self)]``, a permutation."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self), self._seed, epoch, self._shuffle))
        return self._order[1]

    def prompt(self, epoch: int, ordinal: int) -> Prompt:
        """The prompt at that place. Its metadata also holds ``origin``, unless the row has one of its own."""
        index = int(self.order(epoch)[ordinal])
        row, encoded = self._rows[index], self._encoded[index]
        return Prompt(
            uid=f"{self._split}/{epoch}/{ordinal}",
            ordinal=ordinal,
            epoch=epoch,
            text=encoded.text,
            tokens=encoded.tokens,
            label=row.label,
            metadata={"origin": row.origin, **row.metadata},
        )

    def batch(self, cursor: Cursor, size: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """The next ``size`` prompts and the cursor after them; a batch may span epochs and is never short.

        Raises:
            ValueError: ``size`` below 1, or a cursor outside the epoch (the data has changed).
        """
        if size < 1:
            raise ValueError(f"expected a batch of at least 1 prompt, got {size}")
        if not 0 <= cursor.ordinal < len(self) or cursor.epoch < 0:
            raise ValueError(
                f"expected an ordinal in 0..{len(self) - 1}, got {cursor}; "
                "it belongs to other data: resume with the data that the run began with"
            )
        prompts = []
        for _ in range(size):
            prompts.append(self.prompt(cursor.epoch, cursor.ordinal))
            cursor = self._after(cursor)
        return tuple(prompts), cursor

    def consumed(self, cursor: Cursor) -> int:
        """Prompts taken from the beginning of epoch 0 up to that cursor."""
        return cursor.epoch * len(self) + cursor.ordinal

    def _after(self, cursor: Cursor) -> Cursor:
        if cursor.ordinal + 1 < len(self):
            return Cursor(cursor.epoch, cursor.ordinal + 1)
        return Cursor(cursor.epoch + 1, 0)


def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Order of an epoch, int64 ``[rows]``, see the module's point 1; without ``shuffle``, 0, 1, 2 and so on.

    Source:
        Philox: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    if not shuffle:
        return np.arange(rows, dtype=np.int64)
    ranks = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(ranks, kind="stable").astype(np.int64)
