"""In-place weight updates: new tensors into a running engine, without a restart.

The update starts, loads and finishes between two engine steps, in one command to the engine's thread: otherwise a step
could run on half-loaded weights. Three stages, so that most mistakes cost nothing:

1. Before anything is touched, names and shapes that are announced (the *manifest*) are compared with those of the
   checkpoint that the engine was started from (:func:`check_manifest`).
2. Chunks are fetched one at a time and each tensor is compared with the manifest before it is handed to vLLM.
3. At the end, every announced tensor must have come.

A mistake found in stages 2 or 3 leaves a mixture of old and new weights: the engine then refuses to generate until a
whole update succeeds.

Memory: vLLM keeps the tensors of a layer until the layer is complete. Chunks in layer order cost one layer's weights
above the engine's own; any order works.

Ranks of an engine (``tensor_parallel`` > 1) are processes of their own that do not know Ray: the engine fetches
each chunk once, and vLLM's message queue copies it to every rank. A direct transfer reaches each rank by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.rollout import compat
from rl.rollout.expert_stacks import ExpertStacks
from rl.rollout.ranks import answered, call_ranks, end_with_engine, shared_memory_names, unlink_once

if TYPE_CHECKING:  # they import torch, which who only checks manifests does without
    from megatron_ultraep.runtime.profiler import ProfileSettings
    from rl.transfer.links import Membership
    from rl.transfer.receiver import Receiver
    from rl.transfer.staged_receiver import StagedReceiver
    from rl.transfer.staging import StagingHandles

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


def fetch(
    chunks: Iterable[Any], timeout_s: float, receiver: Receiver | StagedReceiver | None = None
) -> Iterator[tuple[str, Any]]:
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
    for number, chunk in enumerate(chunks):
        yield from _pairs(here(chunk, number, timeout_s), receiver)


def here(chunk: Any, number: int, timeout_s: float) -> Any:
    """A chunk whose tensors are in this process, or that a rank's process can take from where they are.

    References become dicts of torch tensors: a rank's process does not know Ray.

    Raises:
        TimeoutError: it did not arrive in time.
    """
    from rl.transfer.ipc import IpcHandles
    from rl.transfer.receiver import Incoming

    if isinstance(chunk, (Incoming, IpcHandles)):
        return chunk
    return {name: _as_tensor(tensor) for name, tensor in _resolve(chunk, number, timeout_s).items()}


def _pairs(chunk: Any, receiver: Receiver | StagedReceiver | None) -> Iterator[tuple[str, Any]]:
    """Of a chunk from :func:`here`."""
    from rl.transfer.ipc import IpcHandles
    from rl.transfer.links import TransferError
    from rl.transfer.receiver import Incoming

    if isinstance(chunk, Incoming):
        if receiver is None:
            raise TransferError("this engine has joined no transfer: call its transfer_join first")
        yield from receiver.receive(chunk.plan)
    elif isinstance(chunk, IpcHandles):
        yield from chunk.open()
    else:
        yield from chunk.items()


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


class Announced:
    """Holds tensors, as they come, against a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._pending = {name: tuple(shape) for name, shape in manifest.items()}

    def checked(self, pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Pass pairs on; raise at the first that was not announced, came before, or has another shape.

        Raises:
            WeightMismatch: see above.
        """
        for name, tensor in pairs:
            shape = self._pending.pop(name, None)
            if shape is None:
                state = "twice" if name in self._manifest else "without being in the manifest"
                raise WeightMismatch(f"tensor {name} came {state}: send each announced tensor once")
            if tuple(tensor.shape) != shape:
                raise WeightMismatch(f"tensor {name}: announced {list(shape)}, came {list(tensor.shape)}")
            yield name, tensor

    def all_came(self) -> None:
        """
        Raises:
            WeightMismatch: an announced tensor has not come.
        """
        if self._pending:
            lacking = ", ".join(sorted(self._pending)[:_SHOWN])
            raise WeightMismatch(f"{len(self._pending)} announced tensors never came: {lacking}")


def checked(pairs: Iterable[tuple[str, Any]], manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """Pass all pairs of an update on, held against its manifest, at the end of which none may lack.

    Raises:
        WeightMismatch: see :class:`Announced`.
    """
    announced = Announced(manifest)
    yield from announced.checked(pairs)
    announced.all_came()


def update_ranks(engine: Any, chunks: Sequence[Any], manifest: Manifest, timeout_s: float) -> None:
    """Load all chunks in place on every rank of an engine; to be called between two of its steps.

    Each rank is handed whole tensors, one chunk at a time, and keeps its part of them.

    Raises:
        Exception: of fetching, checking or loading. The weights are then a mixture.
    """
    call_ranks(engine, "ultraep_begin_update", manifest)
    whole = False
    try:
        for number, chunk in enumerate(chunks):
            call_ranks(engine, "ultraep_load", here(chunk, number, timeout_s))
        whole = True
    finally:
        # Puts layers back into the form that they compute with, also after a mistake.
        call_ranks(engine, "ultraep_end_update", whole)


class WeightUpdateExtension:
    """What the engine's workers can do besides (vLLM mixes this into its worker class, ``worker_extension_cls``).

    All methods are for ``ranks.call_ranks``. An update is three calls, between which no step may run.
    """

    model_runner: Any
    vllm_config: Any
    rank: int
    _ultraep_receiver: Receiver | StagedReceiver | None = None
    _ultraep_update: tuple[ExitStack, Any, Announced, ExpertStacks] | None = None
    _ultraep_window: Any = None

    @answered
    def ultraep_settle_in(self) -> tuple[str, ...]:
        """To be called once all ranks are up; returns what :func:`ranks.forget_shared_memory` wants."""
        end_with_engine()
        unlink_once()
        return shared_memory_names()

    @answered
    def ultraep_transfer_join(self, membership: Membership, engine: int, staging: StagingHandles | None) -> None:
        """Join a generation of direct transfers, leaving the one before.

        Args:
            membership: the generation.
            engine: index of this one.
            staging: of the trainer rank on the same GPU, if weights come through its memory; None: they are broadcast
                to this rank.

        Raises:
            TransferTimeout: naming the members that did not come.
            TransferError: staging memory cannot be opened.
        """
        from rl.transfer.receiver import Receiver, receiver_name
        from rl.transfer.staged_receiver import StagedReceiver

        name, device = receiver_name(engine, self.rank), next(self.model_runner.model.parameters()).device
        kind = Receiver if staging is None else StagedReceiver
        if not isinstance(self._ultraep_receiver, kind):
            if self._ultraep_receiver is not None:
                self._ultraep_receiver.close()
            self._ultraep_receiver = kind(name, device)
        if isinstance(self._ultraep_receiver, StagedReceiver):
            assert staging is not None
            self._ultraep_receiver.join(membership, staging)
        else:
            self._ultraep_receiver.join(membership)

    @answered
    def ultraep_moe_layer_ids(self) -> list[int]:
        """Indices of the MoE layers among all decoder layers."""
        return compat.moe_layer_ids(self.model_runner.model)

    @answered
    def ultraep_begin_update(self, manifest: Manifest) -> None:
        """Make every layer ready to be loaded."""
        stack = ExitStack()
        load = stack.enter_context(compat.layerwise_reload(self.model_runner.model, self.vllm_config))
        self._ultraep_update = stack, load, Announced(manifest), ExpertStacks(manifest)

    @answered
    def ultraep_load(self, chunk: Any) -> None:
        """Load a chunk from :func:`here`; each layer becomes ready to compute with its last tensor."""
        assert self._ultraep_update is not None
        _, load, announced, stacks = self._ultraep_update
        load(stacks.feed(announced.checked(_pairs(chunk, self._ultraep_receiver))))

    @answered
    def ultraep_end_update(self, whole: bool) -> None:
        """End the update; ``whole``: all chunks were loaded, so every announced tensor must have come."""
        assert self._ultraep_update is not None
        (stack, _, announced, _), self._ultraep_update = self._ultraep_update, None
        with stack:
            if whole:
                announced.all_came()

    @answered
    def ultraep_profile(self, settings: ProfileSettings, path: str) -> None:
        """Begin a profiled window on rank 0; vLLM computes on this thread, so its own profiler is not needed."""
        if self.rank == 0:
            from megatron_ultraep.runtime.profiler import Window

            window = Window(settings, Path(path))
            window.start()
            self._ultraep_window = window

    @answered
    def ultraep_end_profile(self) -> str | None:
        """End the window, if one is open; the trace that was written."""
        window, self._ultraep_window = self._ultraep_window, None
        trace = None if window is None else window.stop()
        return None if trace is None else str(trace)
