"""The safetensors files of a Hugging Face model directory: read lazily, written as they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers loads and saves without drawing bars."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class ModelFiles:
    """A model directory, its headers read and its tensors not.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its files.

    Raises:
        FileNotFoundError: no safetensors, or a file that the index names is missing.
        ValueError: a tensor of a dtype that is not plain floating point.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index = self.directory / _INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (self.directory / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise FileNotFoundError(
                f"expected model.safetensors or {_INDEX} in {self.directory}; convert other formats to safetensors"
            )
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, dict[str, str] | None] = {}
        self._open: dict[str, object] = {}
        for file in files:
            path = self.directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{_INDEX} names {file}, which is missing in {self.directory}")
            with path.open("rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            self.metadata[file] = header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] not in _DTYPES:
                    raise ValueError(
                        f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of {sorted(_DTYPES)}: "
                        "dequantize the checkpoint first"
                    )
                self.tensors[name] = TensorInfo(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            KeyError: with names that are similar.
        """
        if name not in self.tensors:
            import difflib

            close = difflib.get_close_matches(name, self.tensors, 3)
            raise KeyError(f"{self.directory} has no tensor {name!r}; similar: {close}")
        file = self.tensors[name].file
        if file not in self._open:
            self._open[file] = safe_open(str(self.directory / file), framework="pt")
        return self._open[file].get_tensor(name)  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        self._open.clear()


class ModelWriter:
    """Writes a model directory tensor by tensor, into files cut as another directory's are.

    Tensors are kept until their file is complete, so memory is bounded by the files that are being filled: one, when
    tensors come in the order of the layers. The new directory appears at the end, whole.

    Args:
        source: directory to take config, tokenizer, file cuts, dtypes and metadata from.
        target: directory to make; must not exist or be empty.
    """

    def __init__(self, source: str | Path, target: str | Path) -> None:
        self.files = ModelFiles(source)
        self.target = Path(target)
        if self.target.exists() and any(self.target.iterdir()):
            raise FileExistsError(f"{self.target} exists and is not empty: choose another directory or remove it")
        self.partial = self.target.with_name(f"{self.target.name}.partial-{os.getpid()}")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._missing = {
            file: {n for n, t in self.files.tensors.items() if t.file == file} for file in self.files.metadata
        }
        self._held: dict[str, dict[str, torch.Tensor]] = {file: {} for file in self.files.metadata}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it is cast to the dtype it had in the source.

        Raises:
            ValueError: a name the source does not have, came before, or has another shape.
        """
        info = self.files.tensors.get(name)
        if info is None or name not in self._missing[info.file]:
            raise ValueError(f"tensor {name!r} is not expected (unknown, or written already)")
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"tensor {name!r}: expected shape {info.shape}, got {tuple(tensor.shape)}")
        self._held[info.file][name] = tensor.detach().to("cpu", info.dtype, copy=True).contiguous()
        self._missing[info.file].remove(name)
        if not self._missing[info.file]:
            save_file(self._held.pop(info.file), self.partial / info.file, metadata=self.files.metadata[info.file])

    def finish(self) -> Path:
        """Copy config, tokenizer and what else is no weights, and let the directory appear.

        Raises:
            ValueError: tensors that never came.
        """
        missing = sorted(n for names in self._missing.values() for n in names)
        if missing:
            raise ValueError(f"{len(missing)} tensors were not written, the first are {missing[:5]}")
        for path in self.files.directory.iterdir():
            if path.is_file() and path.name not in self.files.metadata and not _holds_weights(path.name):
                shutil.copy2(path, self.partial / path.name)
        if self.target.exists():
            self.target.rmdir()
        self.partial.rename(self.target)
        return self.target


def _holds_weights(name: str) -> bool:
    """Whether a file holds (or lists) the source's weights in another form, which would be stale beside new ones."""
    if name.endswith(".index.json"):
        return name != _INDEX
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"))
