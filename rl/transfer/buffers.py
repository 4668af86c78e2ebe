"""Buckets in memory: views of a byte buffer, and copies of many tensors at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rl.transfer.plan import Bucket


def new_buffer(bucket: Bucket, device: torch.device, *, pinned: bool = False) -> torch.Tensor:
    """uint8 ``[bucket.nbytes]``, uninitialised."""
    return torch.empty(bucket.nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)


def views(buffer: torch.Tensor, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """``(name, tensor)`` of every piece, without a copy; they keep the buffer's memory alive."""
    return [
        (
            p.tensor.name,
            buffer[p.offset : p.offset + p.tensor.nbytes].view(getattr(torch, p.tensor.dtype)).view(p.tensor.shape),
        )
        for p in bucket.pieces
    ]


def pack(buffer: torch.Tensor, bucket: Bucket, tensors: Sequence[torch.Tensor]) -> None:
    """Copy tensors, cast to the announced dtypes, into a bucket; a few kernels for all of them on a GPU.

    Raises:
        ValueError: another shape than announced.
    """
    targets = views(buffer, bucket)
    for (name, target), tensor in zip(targets, tensors, strict=True):
        if target.shape != tensor.shape:
            raise ValueError(f"tensor {name}: announced {list(target.shape)}, came {list(tensor.shape)}")
    torch._foreach_copy_([target for _, target in targets], list(tensors), non_blocking=True)


@contextmanager
def on_stream(stream: Any | None) -> Iterator[None]:
    """Run on a CUDA stream; on CPUs (None) as always."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
