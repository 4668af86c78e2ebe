"""Replica slots: the memory that replicas of one expert shape live in, shared by all layers that have that shape.

A pool is made once; nothing is allocated after the first backward. Weights and gradients are separate buffers, and so
are the staging buffers in which a home rank receives gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_ALIGNMENT = 256  # bytes: what copy kernels and symmetric memory want

Allocate = Callable[[int], torch.Tensor]
"""Bytes to a uint8 tensor of zeros."""


@dataclass(frozen=True)
class ExpertShape:
    """The parameters of one expert, in a fixed order.

    Attributes:
        names: of the parameters inside the expert, e.g. ``linear_fc1.weight``.
        shapes: of the parameters.
        dtype: of all of them.
        device: where they are.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(names: Sequence[str], parameters: Sequence[torch.Tensor]) -> ExpertShape:
        """The shape of an expert with these parameters.

        Raises:
            ValueError: parameters of several dtypes or devices.
        """
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(
                f"expected the parameters of an expert to share dtype and device, got {sorted(map(str, kinds))}"
            )
        dtype, device = kinds.pop()
        return ExpertShape(tuple(names), tuple(tuple(p.shape) for p in parameters), dtype, device)

    @property
    def numel(self) -> int:
        """Elements of one expert."""
        return sum(math.prod(shape) for shape in self.shapes)


class Buffers:
    """``count`` copies of an expert's parameters in one allocation, each parameter aligned.

    Args:
        shape: of one expert.
        count: how many.
        dtype: of the elements, which need not be the expert's.
        allocate: where the memory comes from; torch's allocator by default.

    Attributes:
        flat: ``[count, elements of a copy]``.
        offsets, sizes: of each parameter inside a copy (bytes).
        stride: from copy to copy (bytes).
    """

    def __init__(self, shape: ExpertShape, count: int, dtype: torch.dtype, allocate: Allocate | None = None) -> None:
        width = torch.empty((), dtype=dtype).element_size()
        self.sizes = tuple(math.prod(each) * width for each in shape.shapes)
        offsets, self.stride = [], 0
        for size in self.sizes:
            offsets.append(self.stride)
            self.stride += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.offsets = tuple(offsets)
        self.bytes = count * self.stride
        if allocate is None:
            memory = torch.zeros(self.bytes, dtype=torch.uint8, device=shape.device)
        else:
            memory = allocate(self.bytes)
        self.flat = memory.view(dtype).view(count, self.stride // width)
        self._views = [
            tuple(
                row[offset // width : (offset + size) // width].view(each)
                for offset, size, each in zip(self.offsets, self.sizes, shape.shapes, strict=True)
            )
            # .data: writes through these views do not count as modifications of what autograd has saved; the slot is
            # filled with the same weights again before autograd reads it.
            for row in self.flat.data
        ]

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """The parameters of one copy, to write to."""
        return self._views[index]

    def aliases(self, index: int) -> tuple[torch.Tensor, ...]:
        """Fresh tensors over the same memory, to give to autograd."""
        return tuple(view.data for view in self._views[index])


class SlotPool:
    """Slots of one rank for one expert shape.

    Args:
        shape: of the experts.
        slots: slots of this rank.
        staging: gradients that a home rank receives at a time.
        allocate: where slots come from; torch's allocator by default.
    """

    def __init__(self, shape: ExpertShape, slots: int, staging: int, allocate: Allocate | None = None) -> None:
        self.shape = shape
        self.slots = slots
        self._staging = staging
        self._allocate = allocate
        self.weights = Buffers(shape, slots, shape.dtype, allocate)
        self._gradients: dict[torch.dtype, Buffers] = {}
        self._received: Buffers | None = None
        # Whose replicas lie in the weight slots; the same on all ranks of the group, because all place in one order.
        self.holder: object | None = None

    def gradients(self, dtype: torch.dtype) -> Buffers:
        """Gradient slots: what replicas on this rank send home. The first call of a dtype allocates."""
        if dtype not in self._gradients:
            self._gradients[dtype] = Buffers(self.shape, self.slots, dtype, self._allocate)
        return self._gradients[dtype]

    def received(self, dtype: torch.dtype) -> Buffers:
        """Staging: where gradients of other ranks' replicas arrive, for transports that cannot read them in place."""
        if self._received is None or self._received.flat.dtype != dtype:
            self._received = Buffers(self.shape, self._staging, dtype)
        return self._received

    @property
    def buffers(self) -> tuple[Buffers, ...]:
        """What has been allocated so far."""
        return tuple(b for b in (self.weights, self._received, *self._gradients.values()) if b is not None)

    @property
    def bytes(self) -> int:
        """Memory taken so far."""
        return sum(buffers.bytes for buffers in self.buffers)
