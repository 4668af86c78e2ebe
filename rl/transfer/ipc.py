"""Weights of a trainer that shares its GPU with the engine: the engine reads the trainer's memory, nothing is copied.

    shared = SharedWeights(export_weights(model))   # trainer; keep it until every engine has acknowledged
    handles = shared.handles()                      # small, travels through Ray
    for name, tensor in handles.open(): ...         # engine process, the same GPU
    shared.release()                                # trainer, after the acknowledgement

Whole allocations are shared, each once; tensors are places in them. Trainer and engine must see the same GPU; its index
may differ between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from rl.models.names import sent_dtype

_DEVICE = 6  # where torch's rebuild_cuda_tensor takes the device index


@dataclass(frozen=True)
class Place:
    """A tensor in a shared allocation: ``offset`` and ``stride`` in elements."""

    name: str
    storage: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class IpcHandles:
    """What an engine needs to open a trainer rank's tensors.

    Attributes:
        storages: ``(function, arguments)`` of torch's own reduction of each allocation, as bytes.
        places: the tensors.
        rank: of the trainer, for errors.
    """

    storages: tuple[tuple[Any, tuple[Any, ...]], ...]
    places: tuple[Place, ...]
    rank: int

    @property
    def manifest(self) -> dict[str, tuple[int, ...]]:
        return {place.name: place.shape for place in self.places}

    def open(self) -> Iterator[tuple[str, torch.Tensor]]:
        """``(name, tensor)`` of all; tensors are the trainer's own memory: read, do not write or keep them.

        Raises:
            RuntimeError: the memory cannot be opened: another GPU, or its owner has gone.
        """
        opened = []
        for function, arguments in self.storages:
            try:
                opened.append(rebuilt(function, arguments).untyped_storage())
            except RuntimeError as error:
                raise RuntimeError(
                    f"could not open the memory of trainer rank {self.rank}: engine and trainer must share a GPU, and "
                    f"the trainer must keep its weights on it until the engine has them: {error}"
                ) from error
        for place in self.places:
            storage = opened[place.storage]
            tensor = torch.empty(0, dtype=getattr(torch, place.dtype), device=storage.device)
            yield place.name, tensor.set_(storage, place.offset, place.shape, place.stride)


def rebuilt(function: Any, arguments: tuple[Any, ...], device: torch.device | None = None) -> torch.Tensor:
    """What torch's ``reduce_tensor`` made of a tensor, on this process's own index of the same GPU.

    Args:
        function, arguments: what it returned.
        device: that GPU here; None: the current one.

    Raises:
        RuntimeError: the memory cannot be opened.
    """
    values = list(arguments)
    if len(values) > _DEVICE and isinstance(values[_DEVICE], int):
        given = device.index if device is not None else None
        values[_DEVICE] = torch.cuda.current_device() if given is None else given
    return function(*values)


class SharedWeights:
    """Keeps tensors, and whatever was made to export them, until :meth:`release`.

    Args:
        pairs: ``(name, tensor)``; views of live weights cost nothing.
        rank: of the trainer.
        dtype: cast tensors of another dtype; those are copies.
    """

    def __init__(self, pairs: Iterable[tuple[str, torch.Tensor]], rank: int, dtype: torch.dtype | None = None) -> None:
        self.rank = rank
        self._tensors = [(name, tensor.detach().to(sent_dtype(name, dtype or tensor.dtype))) for name, tensor in pairs]

    def handles(self) -> IpcHandles:
        """Handles of everything; waits until what was written to it has been."""
        numbers: dict[int, int] = {}
        storages: list[tuple[Any, tuple[Any, ...]]] = []
        places = []
        for name, tensor in self._tensors:
            storage = tensor.untyped_storage()
            number = numbers.setdefault(storage.data_ptr(), len(storages))
            if number == len(storages):
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                storages.append(reduce_tensor(whole))
            dtype = str(tensor.dtype).removeprefix("torch.")
            places.append(
                Place(name, number, dtype, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
            )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return IpcHandles(tuple(storages), tuple(places), self.rank)

    def release(self) -> None:
        """Let go, once every engine has acknowledged."""
        self._tensors.clear()
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
