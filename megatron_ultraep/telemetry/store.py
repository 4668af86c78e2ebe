"""Chunk files of one recording process, on a bounded part of a disk.

Files are ``<name>.<number>.loads.npz``; numbers grow in the order of recording. A file appears whole (written beside,
then renamed), so a process that is killed leaves at most a temporary file behind.

What is kept when the disk bound is reached: all records of every ``2**k``-th step, with the smallest ``k`` at which
they fill at most half of the bound, and the oldest and the newest step. What is recorded later is kept whole until the
bound is reached again. So the history is a uniform sample of steps, and the newest part is dense. Where two whole
steps are too much, every ``2**k``-th micro-batch, and then layer, of them is kept.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultraep.telemetry.blocks import Block, join

logger = logging.getLogger(__name__)

SUFFIX = ".loads.npz"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MOST_CHUNK_BYTES = 1 << 20


@dataclass
class _Chunk:
    path: Path
    size: int


class ChunkStore:
    """Writes blocks as chunk files and keeps their sum under a bound, thinning them when it is reached.

    Used by one thread. Only one store at a time may write under a name.

    Args:
        directory: made if it does not exist.
        name: letters, digits, ``-`` and ``_``; chunks that are already there under it are continued.
        max_bytes: bound of all files of this name.

    Raises:
        ValueError: a bound that is too small, a name with other characters.
        RuntimeError: another process records under this name.
    """

    def __init__(self, directory: Path, name: str, max_bytes: int):
        if not _NAME.fullmatch(name):
            raise ValueError(f"expected a name of letters, digits, - and _, got {name!r}")
        if max_bytes < 1 << 16:
            raise ValueError(f"expected a bound of at least 64 KiB for load records, got {max_bytes} bytes")
        self.directory, self.name, self.max_bytes = directory, name, max_bytes
        # A chunk is small beside the bound, so that thinning can write a new one before it removes old ones.
        self.chunk_bytes = min(_MOST_CHUNK_BYTES, max_bytes // 16)
        self.thinned = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(directory / f".{name}.lock", "w")  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RuntimeError(
                f"expected to be the only one that records loads as {name!r} in {directory}, but another recorder "
                "does: give every recording process its own name"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.debug("%s cannot be locked: %s", directory, error)
        for leftover in directory.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)
        self._chunks = [_Chunk(path, path.stat().st_size) for path in chunk_files(directory, name)]
        self._next = 1 + max((chunk_number(c.path) for c in self._chunks), default=-1)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(c.size for c in self._chunks)

    def write(self, block: Block) -> None:
        """Store a block.

        Raises:
            OSError: the disk is full or gone; what was stored before stays.
        """
        data = block.to_bytes()
        if self.size + len(data) > self.max_bytes - 2 * self.chunk_bytes:
            self._thin()
        if self.size + len(data) > self.max_bytes:
            self.thinned += len(block)
            return
        path = self.directory / f"{self.name}.{self._next:06d}{SUFFIX}"
        self._replace(path, data)
        self._chunks.append(_Chunk(path, len(data)))
        self._next += 1

    def close(self) -> None:
        """Let others record under this name."""
        self._lock.close()

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = self.directory / f".{path.name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _thin(self) -> None:
        index = _Index.read(self._chunks)
        keep = index.choose((self.max_bytes - 2 * self.chunk_bytes) // 2)
        remaining: list[_Chunk] = []
        for chunks, block in self._merged(keep):
            if block is not None:
                data = block.to_bytes()
                if self.size + len(data) > self.max_bytes:  # cannot rewrite beside: remove first
                    self._remove(chunks)
                self._replace(chunks[0].path, data)
                remaining.append(_Chunk(chunks[0].path, len(data)))
                chunks = chunks[1:]
            self._remove(chunks)
        self._chunks = remaining

    def _remove(self, chunks: Sequence[_Chunk]) -> None:
        for chunk in chunks:
            chunk.path.unlink(missing_ok=True)
            chunk.size = 0

    def _merged(self, keep: Sequence[npt.NDArray[np.bool_] | None]) -> Iterator[tuple[list[_Chunk], Block | None]]:
        """Neighbouring chunks with what is kept of them, joined up to the size of a chunk; None: nothing is kept."""
        files: list[_Chunk] = []
        blocks: list[Block] = []
        for chunk, mask in zip(list(self._chunks), keep, strict=True):
            if mask is None or not mask.any():
                self.thinned += 0 if mask is None else len(mask)
                yield [chunk], None
                continue
            try:
                block = Block.read(chunk.path).select(mask)
            except ValueError as error:
                logger.warning("removing load records that cannot be read: %s", error)
                yield [chunk], None
                continue
            self.thinned += int(len(mask) - mask.sum())
            if blocks and (
                block.shape != blocks[0].shape
                or block.meta != blocks[0].meta  # planned with other settings: a resumed run measures its costs anew
                or sum(b.nbytes for b in [*blocks, block]) > self.chunk_bytes
            ):
                yield files, join(blocks)
                files, blocks = [], []
            files.append(chunk)
            blocks.append(block)
        if blocks:
            yield files, join(blocks)


@dataclass
class _Index:
    """Step, micro-batch and layer of every record of every chunk; None for a chunk that cannot be read."""

    sizes: list[int]
    keys: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]] | None]

    @staticmethod
    def read(chunks: Sequence[_Chunk]) -> _Index:
        keys: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]] | None] = []
        for chunk in chunks:
            try:
                block = Block.read(chunk.path, only_keys=True)
                keys.append((block.step, block.microbatch, block.layer))
            except (ValueError, OSError) as error:
                logger.warning("removing load records that cannot be read: %s", error)
                keys.append(None)
        return _Index([c.size for c in chunks], keys)

    def choose(self, target: int) -> list[npt.NDArray[np.bool_] | None]:
        """Masks of what to keep, at most ``target`` bytes of it, by the rule of this module."""
        known = [k for k in self.keys if k is not None]
        if not known:
            return [None for _ in self.keys]
        steps, microbatches, layers = (np.unique(np.concatenate([k[i] for k in known])) for i in range(3))
        span = int(steps[-1] - steps[0])
        strides = [1, 1, 1]
        for axis, count in itertools.chain(
            [(0, 1 << i) for i in range(1, span.bit_length() + 1)],
            [(1, 1 << i) for i in range(1, len(microbatches).bit_length() + 1)],
            [(2, 1 << i) for i in range(1, len(layers).bit_length() + 1)],
        ):
            keep = self._masks(steps, microbatches, layers, strides)
            size = sum(s * m.mean() for s, m in zip(self.sizes, keep, strict=True) if m is not None and len(m))
            if size <= target:
                return keep
            strides[axis] = count
        return self._masks(steps, microbatches, layers, strides)

    def _masks(
        self, steps: npt.NDArray[Any], microbatches: npt.NDArray[Any], layers: npt.NDArray[Any], strides: Sequence[int]
    ) -> list[npt.NDArray[np.bool_] | None]:
        masks: list[npt.NDArray[np.bool_] | None] = []
        for key in self.keys:
            if key is None:
                masks.append(None)
                continue
            step, microbatch, layer = key
            kept = (step % strides[0] == 0) | (step == steps[0]) | (step == steps[-1])
            kept &= np.searchsorted(microbatches, microbatch) % strides[1] == 0
            kept &= np.searchsorted(layers, layer) % strides[2] == 0
            masks.append(kept)
        return masks


def chunk_number(path: Path) -> int:
    """The place of a chunk file among those of its name."""
    return int(path.name.removesuffix(SUFFIX).rpartition(".")[2])


def chunk_files(directory: Path, name: str = "*") -> list[Path]:
    """Chunk files in a directory, of one name or of all, in the order of recording."""
    found = [p for p in directory.glob(f"{name}.*{SUFFIX}") if p.name.removesuffix(SUFFIX).rpartition(".")[2].isdigit()]
    return sorted(found, key=lambda p: (p.name.removesuffix(SUFFIX).rpartition(".")[0], chunk_number(p)))
