"""In-place weight updates: new tensors into a running engine, without a restart.

The update is one call that starts, loads and finishes between two engine steps; as three calls, a step could run on
half-loaded weights. Three stages, so that most mistakes cost nothing:

1. Before anything is touched, names and shapes that are announced (the *manifest*) are compared with those of the
   checkpoint that the engine was started from (:func:`check_manifest`).
2. Chunks are fetched one at a time and each tensor is compared with the manifest before it is handed to vLLM.
3. At the end, every announced tensor must have come.

A mistake found in stages 2 or 3 leaves a mixture of old and new weights: the engine then refuses to generate until a
whole update succeeds.

Memory: vLLM keeps the tensors of a layer until the layer is complete. Chunks in layer order cost one layer's weights
above the engine's own; any order works.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.rollout import compat

if TYPE_CHECKING:  # they import torch, which who only checks manifests does without
    from rl.transfer.links import Membership
    from rl.transfer.receiver import Receiver

Manifest = Mapping[str, Sequence[int]]
_SHOWN = 5


class WeightMismatch(ValueError):
    """Names or shapes are not those of the engine's checkpoint; the engine's weights are as before."""


class TornWeights(RuntimeError):
    """An update broke off half-way; the engine holds a mixture of old and new weights."""


def checkpoint_manifest(model_path: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face directory, from the headers of its safetensors files.

    Raises:
        FileNotFoundError: no safetensors file is there.
    """
    manifest: dict[str, tuple[int, ...]] = {}
    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"expected *.safetensors in {model_path}: convert the checkpoint to safetensors")
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        manifest.update({n: tuple(entry["shape"]) for n, entry in header.items() if n != "__metadata__"})
    return manifest


def ties_embeddings(model_path: str | Path) -> bool:
    """Whether the output layer is the embedding, so that ``lm_head.weight`` may be absent."""
    return bool(json.loads((Path(model_path) / "config.json").read_text()).get("tie_word_embeddings", False))


def manifest_of(chunks: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in chunks that are plain dicts.

    Raises:
        ValueError: a chunk is a reference: its names are not known before it is fetched.
    """
    manifest: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        if not isinstance(chunk, Mapping):
            raise ValueError(
                f"expected a manifest (name -> shape) beside chunks that are references, got none and a "
                f"{type(chunk).__name__}: pass manifest="
            )
        manifest.update({name: tuple(tensor.shape) for name, tensor in chunk.items()})
    return manifest


def check_manifest(given: Manifest, expected: Manifest, optional: Iterable[str] = ()) -> None:
    """Compare announced names and shapes with those of the checkpoint.

    Args:
        given: what an update announces.
        expected: what the engine was started from.
        optional: names that may be absent from either (a tied output layer).

    Raises:
        WeightMismatch: naming the first few that are missing, unknown or of another shape.
    """
    optional = set(optional)
    missing = sorted(expected.keys() - given.keys() - optional)
    unknown = sorted(given.keys() - expected.keys() - optional)
    shapes = [
        f"{name}: expected {list(expected[name])}, got {list(shape)}"
        for name, shape in given.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise WeightMismatch(
            f"weight update refused, the engine keeps its weights. Expected the {len(expected)} Hugging Face tensors "
            f"of its checkpoint, got {len(given)}; {'; '.join(problems)}. Export full tensors under their Hugging "
            "Face names, one per expert."
        )


def fetch(chunks: Iterable[Any], timeout_s: float, receiver: Receiver | None = None) -> Iterator[tuple[str, Any]]:
    """``(name, torch tensor)`` of all chunks; one chunk is held at a time.

    Args:
        chunks: each a dict from HF name to torch tensor or numpy array, or a Ray reference to one; or an ``Incoming``
            transfer; or ``IpcHandles`` of a trainer on the same GPU (see ``rl.transfer``).
        timeout_s: limit of each fetch, seconds; direct transfers have limits of their own.
        receiver: of this worker, for incoming transfers.

    Raises:
        TimeoutError: a chunk did not arrive in time.
        TransferError: a direct transfer broke off, or this worker has joined none.
    """
    from rl.transfer.ipc import IpcHandles
    from rl.transfer.links import TransferError
    from rl.transfer.receiver import Incoming

    for number, chunk in enumerate(chunks):
        if isinstance(chunk, Incoming):
            if receiver is None:
                raise TransferError("this engine has joined no transfer: call its transfer_join first")
            yield from receiver.receive(chunk.plan)
        elif isinstance(chunk, IpcHandles):
            yield from chunk.open()
        else:
            yield from ((name, _as_tensor(tensor)) for name, tensor in _resolve(chunk, number, timeout_s).items())


def _resolve(chunk: Any, number: int, timeout_s: float) -> Mapping[str, Any]:
    if isinstance(chunk, Mapping):
        return chunk
    try:
        # As a future, not with ray.get, which the engine's actor would be warned of: it is an async actor.
        return chunk.future().result(timeout_s)
    except TimeoutError as error:
        raise TimeoutError(
            f"weight chunk {number} did not arrive within {timeout_s:g} s: is the trainer that owns it alive?"
        ) from error


def _as_tensor(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value
    # Arrays from the object store are read-only views, which torch does not know.
    return torch.from_numpy(value if value.flags.writeable else np.array(value))


def checked(pairs: Iterable[tuple[str, Any]], manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """Pass pairs on; raise at the first that was not announced, came before, or has another shape, or if one lacks.

    Raises:
        WeightMismatch: see above.
    """
    pending = {name: tuple(shape) for name, shape in manifest.items()}
    for name, tensor in pairs:
        shape = pending.pop(name, None)
        if shape is None:
            state = "twice" if name in manifest else "without being in the manifest"
            raise WeightMismatch(f"tensor {name} came {state}: send each announced tensor once")
        if tuple(tensor.shape) != shape:
            raise WeightMismatch(f"tensor {name}: announced {list(shape)}, came {list(tensor.shape)}")
        yield name, tensor
    if pending:
        raise WeightMismatch(f"{len(pending)} announced tensors never came: {', '.join(sorted(pending)[:_SHOWN])}")


class WeightUpdateExtension:
    """What the engine's worker can do besides (vLLM mixes this into its worker class, ``worker_extension_cls``)."""

    model_runner: Any
    vllm_config: Any
    rank: int
    _ultraep_receiver: Receiver | None = None

    def ultraep_transfer_join(self, membership: Membership, engine: int) -> None:
        """Join a generation of direct transfers, leaving the one before; all of an engine's workers are called.

        Raises:
            TransferTimeout: naming the members that did not come.
        """
        from rl.transfer.receiver import Receiver, receiver_name

        if self._ultraep_receiver is None:
            name = receiver_name(engine, self.rank)
            self._ultraep_receiver = Receiver(name, next(self.model_runner.model.parameters()).device)
        self._ultraep_receiver.join(membership)

    def ultraep_moe_layer_ids(self) -> list[int]:
        """Indices of the MoE layers among all decoder layers."""
        return compat.moe_layer_ids(self.model_runner.model)

    def ultraep_update_weights(self, chunks: Sequence[Any], manifest: Manifest, timeout_s: float) -> int:
        """Load all chunks in place, in one call between two steps; returns the number of tensors.

        Raises:
            Exception: of fetching, checking or loading. The weights are then a mixture.
        """
        with compat.layerwise_reload(self.model_runner.model, self.vllm_config) as load:
            load(checked(fetch(chunks, timeout_s, self._ultraep_receiver), manifest))
        return len(manifest)
