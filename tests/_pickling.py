"""Pickling between pytest and the ranks: tensors by value, and independent of what either side has imported.

multiprocessing's own pickler would send tensors as handles of shared memory, which die with their rank. Plain pickle
names the function that loads a storage, which megatron-core 0.19 replaces by one of its own: pytest would then import
Megatron to read an answer.
"""

import io
import pickle
from typing import Any

import torch


def dumps(value: Any) -> bytes:
    """As `pickle.dumps`."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.storage.TypedStorage):
            return NotImplemented
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=False)
        return _load_storage, (buffer.getvalue(),)


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
