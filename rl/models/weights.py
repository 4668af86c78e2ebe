"""Weights both ways between Hugging Face files and Megatron chunks, one parameter (one expert) at a time.

Loading: every rank reads just the tensors of its own parameters and cuts its tensor-parallel part out of each.
Exporting: every parameter is gathered over its tensor-parallel group only; experts and pipeline stages are never
gathered, since each rank hands over what it is home to. Both speak in logical experts, whatever rank is their home.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.checkpoint import local_experts
from rl.models.architecture import Architecture
from rl.models.builder import BuiltModel, chunk_layers, padded_vocabulary
from rl.models.hf_files import ModelFiles, ModelWriter
from rl.models.names import Logical, is_kept, logical, sent_dtype
from rl.transfer.plan import Holding, TensorSpec

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank, or a buffer that is kept with them, and what it is in the whole model."""

    logical: Logical
    parameter: torch.Tensor
    name: str

    @property
    def trained(self) -> bool:
        return isinstance(self.parameter, torch.nn.Parameter)


def local_parameters(model: BuiltModel) -> list[LocalParameter]:
    """This rank's parameters in layer order; a tied output layer is left out, its values are the embedding's."""
    found = []
    for chunk in model.chunks:
        layers = chunk_layers(model.arch, model.groups, getattr(chunk, "vp_stage", None))
        layer_of = dict(enumerate(layers))
        experts_of = _local_experts(chunk)
        buffers = [(name, buffer) for name, buffer in chunk.named_buffers() if is_kept(name)]
        for name, parameter in [*chunk.named_parameters(), *buffers]:
            experts = next((some for prefix, some in experts_of.items() if name.startswith(prefix)), ())
            entry = logical(name, model.arch, layer_of=layer_of, experts=experts)
            if entry is not None:
                found.append(LocalParameter(entry, parameter, name))
    return sorted(found, key=lambda p: p.logical.key)


def _local_experts(chunk: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The logical experts of each MoE layer here, in the order of its local experts, by the prefix of its names."""
    kind = compat.moe_layer_class()
    return {f"{name}.": local_experts(layer) for name, layer in chunk.named_modules() if isinstance(layer, kind)}


def _expert_or_dense(model: BuiltModel, entry: Logical) -> tuple[int, int, dist.ProcessGroup, bool]:
    """(rank and size in the tensor-parallel group of this parameter, the group, whether this replica hands it over)."""
    where, layout, groups = model.groups.coordinates, model.groups.layout, model.groups.collection
    if entry.expert is None:
        return where["tp"], layout.tp, groups.tp, where["dp"] == 0
    return where["etp"], layout.etp, groups.expt_tp, where["expert_dp"] == 0


def to_megatron(tensors: list[torch.Tensor], entry: Logical, arch: Architecture, tp_rank: int, tp: int) -> torch.Tensor:
    """One rank's Megatron tensor from the whole Hugging Face tensors of a parameter."""

    def part(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return x.chunk(tp, dim)[tp_rank]

    if entry.kind == "qkv":
        q, k, v = tensors
        groups = arch.kv_heads
        # Per key/value group: its query heads, its key head, its value head.
        rest = q.shape[1:]  # none of a bias
        grouped = torch.cat([x.reshape(groups, -1, *rest) for x in (q, k, v)], dim=1)
        return part(grouped).reshape(-1, *rest)
    if entry.kind == "gated":
        return torch.cat([part(x) for x in tensors])
    (x,) = tensors
    if entry.kind == "vocab":
        rows = padded_vocabulary(arch, tp)
        return part(torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0])))
    return x if entry.tp_dim is None else part(x, entry.tp_dim)


def to_hugging_face(parts: list[torch.Tensor], entry: Logical, arch: Architecture) -> list[torch.Tensor]:
    """The whole Hugging Face tensors of a parameter from the parts of all tensor-parallel ranks, in rank order."""
    if entry.kind == "qkv":
        d, per_group = arch.head_dim, arch.heads // arch.kv_heads * arch.head_dim
        whole = _joined(parts)
        grouped = whole.reshape(arch.kv_heads, per_group + 2 * d, *whole.shape[1:])
        return [x.reshape(-1, *whole.shape[1:]) for x in grouped.split([per_group, d, d], dim=1)]
    if entry.kind == "gated":
        halves = [p.chunk(2) for p in parts]
        return [_joined([h[i] for h in halves]) for i in (0, 1)]
    if entry.kind == "vocab":
        return [_joined(parts)[: arch.vocab]]
    return [parts[0] if entry.tp_dim is None else _joined(parts, entry.tp_dim)]


def _joined(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """``torch.cat`` that copies nothing where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@torch.no_grad()
def load_weights(model: BuiltModel, directory: str | Path, *, optional: Container[str] = ()) -> None:
    """Fill this rank's parameters from a Hugging Face directory; values are cast to the parameters' dtype.

    Args:
        model: whose parameters.
        directory: of the model.
        optional: names of tensors that files may lack; their parameters stay as they are.

    Raises:
        FileNotFoundError, KeyError: files or tensors that are missing.
        ValueError: a tensor of another shape than the architecture says.
    """
    files = ModelFiles(directory)
    for local in local_parameters(model):
        rank, size, _, _ = _expert_or_dense(model, local.logical)
        if any(name in optional and name not in files.tensors for name in local.logical.hf):
            continue
        tensors = [files.read(name) for name in local.logical.hf]
        value = to_megatron(tensors, local.logical, model.arch, rank, size)
        if value.shape != local.parameter.shape:
            raise ValueError(
                f"{local.logical.hf}: expected values for {local.name} of shape {tuple(local.parameter.shape)}, got "
                f"{tuple(value.shape)}: config.json and the tensors in {directory} disagree"
            )
        local.parameter.copy_(value)
    for chunk in model.chunks:
        # Megatron ties the output layer to the embedding of the first stage by a copy on the last one.
        if model.arch.tied and chunk.post_process and not chunk.pre_process:
            rank, size, _, _ = _expert_or_dense(model, Logical((-1, 0, 0), ()))
            entry = Logical((-1, 0, 0), (_EMBEDDING,), "vocab", 0)
            value = to_megatron([files.read(entry.hf[0])], entry, model.arch, rank, size)
            chunk.shared_embedding_or_output_weight().copy_(value)
    files.close()


@torch.no_grad()
def export_weights(
    model: BuiltModel, *, source: str = "parameter", names: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's share of the model as Hugging Face tensors, parameter by parameter; a collective.

    Over all ranks, every tensor is yielded exactly once. Ranks of one tensor-parallel group must iterate together.

    Args:
        model: whose weights.
        names: Hugging Face names of the parameters that this tensor-parallel group hands over; None: those of the first
            replica. Whoever chooses has every tensor handed over once, see :mod:`rl.transfer.plan`.
        source: ``"parameter"``, or an attribute of parameters that has their shape (``"main_grad"``, ``"grad"``): the
            same mapping then yields, say, gradients in logical order.

    Yields:
        ``(Hugging Face name, tensor on the model's device)``; the tensor may be a view of live weights.
    """
    for local in local_parameters(model):
        if source == "parameter" or local.trained:
            yield from _export_one(model, local, source, names)


@torch.no_grad()
def export_by_parameter(
    model: BuiltModel, names: Container[str]
) -> Iterator[tuple[tuple[int, int, int], list[tuple[str, torch.Tensor]]]]:
    """As :func:`export_weights`, for who must keep in step with other ranks: what this rank takes part in, one by one.

    Yields:
        key of each parameter of this rank, in layer order, and its tensors: none where this rank only gathered, or did
        nothing.
    """
    for local in local_parameters(model):
        yield local.logical.key, _export_one(model, local, "parameter", names)


def holdings(model: BuiltModel, dtype: str) -> list[Holding]:
    """What this rank could hand over or help to gather, in layer order; no communication.

    Args:
        model: whose weights.
        dtype: what tensors will be cast to, a torch name such as ``"bfloat16"``; routers' biases are sent in float32.
    """
    found = []
    for local in local_parameters(model):
        group = _expert_or_dense(model, local.logical)[2]
        shapes = _whole_shapes(model, local)
        sent = str(sent_dtype(local.logical.hf[0], getattr(torch, dtype))).removeprefix("torch.")
        specs = tuple(TensorSpec(name, shape, sent) for name, shape in zip(local.logical.hf, shapes, strict=True))
        found.append(Holding(local.logical.key, specs, dist.get_process_group_ranks(group)[0]))
    return found


def _whole_shapes(model: BuiltModel, local: LocalParameter) -> list[tuple[int, ...]]:
    """Of a parameter's Hugging Face tensors: from the code that makes them, without data."""
    _, size, _, _ = _expert_or_dense(model, local.logical)
    parts = [torch.empty(local.parameter.shape, device="meta") for _ in range(size)]
    return [tuple(t.shape) for t in to_hugging_face(parts, local.logical, model.arch)]


def _export_one(
    model: BuiltModel, local: LocalParameter, source: str, names: Container[str] | None = None
) -> list[tuple[str, torch.Tensor]]:
    rank, size, group, hands_over = _expert_or_dense(model, local.logical)
    if names is not None:
        hands_over = local.logical.hf[0] in names
    if not hands_over:
        return []
    value = local.parameter.data if source == "parameter" else getattr(local.parameter, source)
    parts = [value]
    if size > 1 and local.logical.tp_dim is not None:
        parts = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(parts, value.contiguous(), group=group)
    if rank != 0:
        return []
    return list(zip(local.logical.hf, to_hugging_face(parts, local.logical, model.arch), strict=True))


def save_hf(model: BuiltModel, source: str | Path, target: str | Path) -> None:
    """Write the model as a Hugging Face directory cut into files like ``source``; a collective of all ranks.

    Tensors travel to the model's first rank one parameter at a time. A directory that is loaded and saved unchanged is
    bitwise the same.
    """
    ranks = model.groups.layout.world
    mine = local_parameters(model)
    owners: list[list[tuple[tuple[int, int, int], bool]] | None] = [None] * ranks
    handing = [(p.logical.key, _hands_over_alone(model, p)) for p in mine]
    world = model.groups.collection.intra_dist_opt
    dist.all_gather_object(owners, handing, group=world)
    owner = {key: r for r, entries in enumerate(owners) for key, hands in entries or [] if hands}
    members = dist.get_process_group_ranks(world)
    writer = ModelWriter(source, target) if model.groups.rank == 0 else None
    by_key = {p.logical.key: p for p in mine}
    for key in sorted(owner):
        tensors = _export_one(model, by_key[key], "parameter") if key in by_key else []
        if owner[key] != 0 and model.groups.rank in (0, owner[key]):
            box: list[object] = [tensors]
            if model.groups.rank == owner[key]:
                dist.send_object_list([[(n, t.cpu()) for n, t in tensors]], dst=members[0], group=world)
            else:
                dist.recv_object_list(box, src=members[owner[key]], group=world)
                tensors = box[0]  # type: ignore[assignment]
        if writer is not None:
            for name, tensor in tensors:
                writer.add(name, tensor)
                if model.arch.tied and name == _EMBEDDING and _OUTPUT in writer.files.tensors:
                    writer.add(_OUTPUT, tensor)  # some directories hold the tied tensor twice
    if writer is not None:
        writer.finish()
    dist.barrier(group=world)


def _hands_over_alone(model: BuiltModel, local: LocalParameter) -> bool:
    rank, _, _, hands_over = _expert_or_dense(model, local.logical)
    return hands_over and rank == 0


@torch.no_grad()
def copy_weights(source: BuiltModel, target: BuiltModel) -> None:
    """Give one model the weights of another of any layout; a collective of all ranks of both, which are the same.

    Every parameter is gathered where it is at home and sent to all ranks, one at a time. What only one of the two has
    (a head of another kind) stays as it is.

    Raises:
        ValueError: tensors of different shapes.
    """
    world = source.groups.collection.intra_dist_opt
    mine = {p.logical.key: p for p in local_parameters(source)}
    theirs = {p.logical.hf: p for p in local_parameters(target)}
    told: list[Any] = [None] * source.groups.layout.world
    handing = [
        (p.logical.key, dist.get_rank(), p.logical.hf, _whole_shapes(source, p), p.parameter.dtype)
        for p in mine.values()
        if _hands_over_alone(source, p)
    ]
    dist.all_gather_object(told, handing, group=world)
    for key, owner, hf, shapes, dtype in sorted((each for parts in told for each in parts), key=lambda each: each[0]):
        # All ranks of a tensor-parallel group gather, though one hands over.
        tensors = [t for _, t in _export_one(source, mine[key], "parameter")] if key in mine else []
        if dist.get_rank() == owner:
            tensors = [t.contiguous() for t in tensors]
        else:
            tensors = [torch.empty(shape, dtype=dtype, device=source.device) for shape in shapes]
        for tensor in tensors:
            dist.broadcast(tensor, src=owner, group=world)
        local = theirs.get(hf)
        if local is None:
            continue
        rank, size, _, _ = _expert_or_dense(target, local.logical)
        value = to_megatron(tensors, local.logical, target.arch, rank, size)
        if value.shape != local.parameter.shape:
            raise ValueError(
                f"{hf}: expected values for {local.name} of shape {tuple(local.parameter.shape)} in {target.name}, got "
                f"{tuple(value.shape)} from {source.name}: both must be of one architecture"
            )
        local.parameter.copy_(value)
