"""A trace on disk: the routes of a batch of samples, for planning, viewing and checking offline.

File format, version 1. One safetensors file with

========================  =========================  ===========================================================
tensor                    type and shape             meaning
========================  =========================  ===========================================================
``routes``                uint8/uint16 ``[N, L, K]`` expert ids of all rows of all samples, sample after sample
``row_offsets``           int64 ``[S + 1]``          rows ``row_offsets[i] .. row_offsets[i+1]`` are sample i's
``prompt_lengths``        int64 ``[S]``              tokens of the prompt of each sample
``version_offsets``       int64 ``[S + 1]``          spans of sample i in ``version_spans``
``version_spans``         int64 ``[V, 2]``           (first row, weight version): rows from there on
========================  =========================  ===========================================================

and, in the file's metadata, ``format="megatron-ultraep-routing-trace"``, ``version="1"``, ``experts``, ``sample_ids``
(a JSON list), ``model`` (a JSON object) and ``sha256`` (of the bytes of the five tensors, little-endian, in the order
of the table). Readers refuse other versions, and files whose parts do not fit together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from megatron_ultraep.replay.histogram import histogram
from megatron_ultraep.replay.validation import check_routes, route_dtype

FORMAT = "megatron-ultraep-routing-trace"
VERSION = 1


@dataclass(frozen=True)
class TraceSample:
    """The routes of one sample.

    Attributes:
        sample_id: unique in the trace.
        routes: uint8/uint16 ``[rows, moe_layers, topk]``.
        prompt_length: tokens of the prompt.
        weight_versions: spans ``(first row, version)``, the first starting at row 0.
    """

    sample_id: str
    routes: npt.NDArray[np.unsignedinteger]
    prompt_length: int = 0
    weight_versions: tuple[tuple[int, int], ...] = ((0, 0),)


@dataclass(frozen=True)
class RoutingTrace:
    """The routes of a batch of samples of one model.

    Attributes:
        experts: number of experts E.
        moe_layers: number of MoE layers L.
        topk: experts per token K.
        samples: the samples.
        model: anything worth knowing of the model, JSON values.

    Raises:
        ValueError: a sample whose routes are not valid, with its id and the reason.
    """

    experts: int
    moe_layers: int
    topk: int
    samples: tuple[TraceSample, ...]
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [s.sample_id for s in self.samples]
        if len(set(ids)) != len(ids):
            raise ValueError("expected distinct sample ids in a trace, got duplicates")
        for s in self.samples:
            reason = check_routes(
                s.routes, rows=len(s.routes), moe_layers=self.moe_layers, experts=self.experts, topk=self.topk
            )
            if reason:
                raise ValueError(f"sample {s.sample_id}: {reason}")
            starts = [row for row, _ in s.weight_versions]
            if not starts or starts[0] != 0 or starts != sorted(set(starts)):
                raise ValueError(
                    f"sample {s.sample_id}: expected weight-version spans that start at row 0 and increase, "
                    f"got {s.weight_versions}"
                )

    def histogram(self) -> npt.NDArray[np.int64]:
        """int64 ``[moe_layers, experts]``: tokens per expert over the whole trace."""
        total = np.zeros((self.moe_layers, self.experts), dtype=np.int64)
        for s in self.samples:
            total += histogram(s.routes, self.experts)
        return total

    def save(self, path: str | Path) -> None:
        """Write the file described above; replaces an existing one atomically."""
        path = Path(path)
        dtype = route_dtype(self.experts)
        empty = np.zeros((0, self.moe_layers, self.topk), dtype=dtype)
        spans = [span for s in self.samples for span in s.weight_versions]
        tensors = {
            "routes": np.concatenate([empty, *(s.routes.astype(dtype) for s in self.samples)]),
            "row_offsets": _offsets([len(s.routes) for s in self.samples]),
            "prompt_lengths": np.array([s.prompt_length for s in self.samples], dtype=np.int64),
            "version_offsets": _offsets([len(s.weight_versions) for s in self.samples]),
            "version_spans": np.array(spans, dtype=np.int64).reshape(-1, 2),
        }
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "sha256": _checksum(tensors),
            "experts": str(self.experts),
            "sample_ids": json.dumps([s.sample_id for s in self.samples]),
            "model": json.dumps(self.model),
        }
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Read a trace and check every row of it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a trace, another version, damaged, or routes that are not valid.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"expected a routing trace at {path}, found no such file")
        try:
            with safe_open(str(path), framework="numpy") as f:
                metadata = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:
            raise ValueError(
                f"{path}: expected a routing trace (a safetensors file), could not read it: {error}"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}")
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path}: expected version {VERSION}, got {metadata.get('version')}: convert or re-record it"
            )
        missing = sorted({"experts", "sample_ids", "model", "sha256"} - set(metadata)) + sorted(
            set(_TENSORS) - set(tensors)
        )
        if missing:
            raise ValueError(f"{path}: the trace has no {', '.join(missing)}: record it again")
        if _checksum(tensors) != metadata["sha256"]:
            raise ValueError(f"{path}: the trace is damaged (its checksum does not match): record it again")
        routes, rows = tensors["routes"], tensors["row_offsets"]
        spans, span_rows = tensors["version_spans"], tensors["version_offsets"]
        sample_ids = json.loads(metadata["sample_ids"])
        wrong = [
            name
            for name, offsets, total in (("row_offsets", rows, len(routes)), ("version_offsets", span_rows, len(spans)))
            if len(offsets) != len(sample_ids) + 1
            or offsets[0] != 0
            or offsets[-1] != total
            or (np.diff(offsets) < 0).any()
        ]
        if len(tensors["prompt_lengths"]) != len(sample_ids):
            wrong.append("prompt_lengths")
        if wrong or routes.ndim != 3:
            raise ValueError(f"{path}: {', '.join(wrong or ['routes'])} do not fit the {len(sample_ids)} samples")
        samples = tuple(
            TraceSample(
                sample_id=sample_id,
                routes=routes[rows[i] : rows[i + 1]],
                prompt_length=int(tensors["prompt_lengths"][i]),
                weight_versions=tuple((int(a), int(b)) for a, b in spans[span_rows[i] : span_rows[i + 1]]),
            )
            for i, sample_id in enumerate(sample_ids)
        )
        return RoutingTrace(
            experts=int(metadata["experts"]),
            moe_layers=int(routes.shape[1]),
            topk=int(routes.shape[2]),
            samples=samples,
            model=json.loads(metadata["model"]),
        )


_TENSORS = ("routes", "row_offsets", "prompt_lengths", "version_offsets", "version_spans")


def _checksum(tensors: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _offsets(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]).astype(np.int64)
