"""Memory of trainer ranks and engines, by part.

Parameters, gradients, optimizer states and replica slots are counted exactly; activations from ``activations``; what
libraries take, and what the allocator holds beyond tensors, from ``constants``. Every pipeline stage is looked at,
since the first holds most activations and the last holds logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture
from rl.planning import activations, constants
from rl.planning.activations import Workload
from rl.planning.parameters import Sharing, Sizes, buffer_elements, chunks_of_stage, stage_sizes, total_parameters

_SLOT_ALIGNMENT = 256  # bytes, see megatron_ultraep.runtime.slots
_GRADIENT = {2: 4, 4: 4, 8: 8}  # bytes of a gradient by those of a parameter: 16-bit models reduce in float32


@dataclass(frozen=True)
class Part:
    """One use of a GPU's memory.

    Attributes:
        name: what it is.
        bytes: how much.
        note: how it was counted, or what it depends on.
    """

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """Of one rank or one engine's GPU.

    Attributes:
        what: whose.
        parts: in the order in which they are printed.
    """

    what: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)

    def bytes_of(self, name: str) -> int:
        """Of one part, 0 where there is none."""
        return sum(part.bytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class ModelOnRanks:
    """One model on the trainer's ranks.

    Attributes:
        name: as micro-batch keys have it.
        arch: its architecture.
        parallel: its layout.
        trained: with gradients and optimizer; otherwise weights alone.
        work: its micro-batches.
    """

    name: str
    arch: Architecture
    parallel: ParallelSection
    trained: bool
    work: Workload


@dataclass(frozen=True)
class Balancing:
    """What balancing reserves.

    Attributes:
        slots, slot_sets: as in ``megatron_ultraep.BalanceConfig``.
        staged: gradients arrive in buffers of their own (transport ``collective``).
    """

    slots: int
    slot_sets: int = 1
    staged: bool = False


def optimizer_bytes(sizes: Sizes, sharing: Sharing, width: int, *, distributed: bool) -> int:
    """Main parameters and Adam's two moments of a rank.

    Args:
        sizes: parameters of the rank.
        sharing: with how many ranks it shares them.
        width: bytes of a parameter. 16-bit parameters have main parameters; others are their own.
        distributed: sharded over ranks: then of the fullest rank, whose share holds no padding.
    """
    each = 3 * 4 if width == 2 else 2 * width
    if not distributed:
        return each * sizes.total
    shares = (
        buffer_elements(part, ranks, distributed_optimizer=True) // ranks
        for part, ranks in ((sizes.dense, sharing.dense), (sizes.experts, sharing.experts))
    )
    return each * sum(shares)


def static_parts(model: ModelOnRanks, stage: int, ranks: int, *, distributed_optimizer: bool) -> tuple[Part, ...]:
    """What a model takes between steps, on a rank of one of its stages: weights, gradients, optimizer."""
    sharing, width = Sharing.of(ranks, model.parallel), model.work.width
    weights = gradients = optimizer = 0
    for sizes in stage_sizes(model.arch, model.parallel, stage):
        chunk = sizes.in_buffers(model.parallel)
        if not model.trained:
            weights += chunk.total * width
            continue
        elements = sum(
            buffer_elements(part, shared, distributed_optimizer=distributed_optimizer)
            for part, shared in ((chunk.dense, sharing.dense), (chunk.experts, sharing.experts))
        )
        weights += (elements if distributed_optimizer else chunk.total) * width
        gradients += elements * _GRADIENT[width]
        optimizer += optimizer_bytes(chunk, sharing, width, distributed=distributed_optimizer)
    parts = [Part(f"{model.name}: parameters", weights)]
    if model.trained:
        held = f"shared by {sharing.dense} ranks, experts by {sharing.experts}" if distributed_optimizer else "whole"
        parts += [
            Part(f"{model.name}: gradients", gradients, "float32" if width < 8 else "float64"),
            Part(f"{model.name}: optimizer", optimizer, held),
        ]
    return tuple(parts)


def kept(model: ModelOnRanks, stage: int, micro_batches: int) -> int:
    """Bytes of activations that a stage holds at its fullest."""
    chunks = chunks_of_stage(model.arch, model.parallel, stage)
    each = [
        sum(
            activations.kept_by_layer(model.arch, model.parallel, model.work, moe=layer in model.arch.moe_layers)
            for layer in layers
        )
        for layers in chunks
    ]
    if stage == model.parallel.pp - 1:
        each[-1] += activations.before_head(model.arch, model.parallel, model.work)
    return activations.in_flight(model.parallel, stage, micro_batches) * max(each)


def passing(model: ModelOnRanks, stage: int) -> int:
    """Bytes that come and go in the backward of a stage, at their fullest: of one layer, or of logits."""
    most = passing_layer(model, stage)
    if stage == model.parallel.pp - 1:
        most = max(most, activations.logits(model.arch, model.parallel, model.work))
    return most


def passing_layer(model: ModelOnRanks, stage: int) -> int:
    """The same of one layer alone, the stage's fullest."""
    layers = [layer for chunk in chunks_of_stage(model.arch, model.parallel, stage) for layer in chunk]
    return max(
        activations.needed_by_layer(model.arch, model.parallel, model.work, moe=moe) + (_dispatch(model) if moe else 0)
        for moe in {layer in model.arch.moe_layers for layer in layers}
    )


def passing_forward(model: ModelOnRanks, stage: int) -> int:
    """The same of a pass without backward: one layer's, or logits."""
    layers = [layer for chunk in chunks_of_stage(model.arch, model.parallel, stage) for layer in chunk]
    whole = dataclasses.replace(model.work, recompute="none", modules=())
    most = max(
        activations.kept_by_layer(model.arch, model.parallel, whole, moe=moe) + (_dispatch(model) if moe else 0)
        for moe in {layer in model.arch.moe_layers for layer in layers}
    )
    if stage == model.parallel.pp - 1:
        most = max(most, activations.logits_forward(model.arch, model.parallel, model.work))
    return most


def _dispatch(model: ModelOnRanks) -> int:
    rows = activations.expert_rows(model.arch, model.parallel, model.work)
    return constants.DISPATCH_COPIES * rows * model.arch.hidden * model.work.width


def slot_bytes(model: ModelOnRanks, balancing: Balancing) -> int:
    """Replica slots of a rank: weights, gradients, and where gradients arrive when they are staged."""
    arch, width = model.arch, model.work.width
    shapes = (2 * arch.moe_ffn * arch.hidden, arch.moe_ffn * arch.hidden)

    def buffers(element: int) -> int:
        return sum(-(-size * element // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT for size in shapes)

    sets = balancing.slots * balancing.slot_sets
    staging = balancing.slots * buffers(_GRADIENT[width]) if balancing.staged else 0
    return sets * (buffers(width) + buffers(_GRADIENT[width])) + staging


def trainer_memory(
    models: Sequence[ModelOnRanks],
    ranks: int,
    micro_batches: int,
    *,
    distributed_optimizer: bool,
    balancing: Balancing | None = None,
    replayed_rows: int = 0,
    asleep: bool = False,
    staging: int = 0,
) -> tuple[Memory, ...]:
    """Memory of a rank of each of the first model's pipeline stages.

    Args:
        models: on the ranks; the first is the actor, whose stages are looked at. Others stand with the part that lies
            on the same ranks.
        ranks: of the trainer.
        micro_batches: of a mini-batch, on a data-parallel rank.
        distributed_optimizer: optimizer states are sharded.
        balancing: of experts; None: none.
        replayed_rows: rows of a mini-batch on a data-parallel rank whose routes are replayed.
        asleep: an engine sleeps on the same GPU.
        staging: bytes through which it takes weights.
    """
    actor = models[0]
    found = []
    for stage in range(actor.parallel.pp):
        parts: list[Part] = []
        dynamic = []
        for model in models:
            # Stages of another layout that lie on the same ranks: ranks of a stage are consecutive.
            own = stage * model.parallel.pp // actor.parallel.pp
            parts += static_parts(model, own, ranks, distributed_optimizer=distributed_optimizer)
            held = kept(model, own, micro_batches) if model.trained else 0
            dynamic.append((held, passing(model, own) if model.trained else passing_forward(model, own)))
        held, moving = max(dynamic, key=sum)  # models take turns
        if balancing is not None and actor.arch.is_moe:
            parts.append(Part("replica slots", slot_bytes(actor, balancing), f"{balancing.slots} experts, all layers"))
        if replayed_rows and actor.arch.is_moe:
            layers = [layer for chunk in chunks_of_stage(actor.arch, actor.parallel, stage) for layer in chunk]
            moe = sum(layer in actor.arch.moe_layers for layer in layers)
            routes = activations.kept_by_routes(actor.arch, actor.parallel, replayed_rows, moe)
            parts.append(Part("routes", routes, "replayed, and taken, of a mini-batch"))
        flying = activations.in_flight(actor.parallel, stage, micro_batches)
        parts += [
            Part("activations", held, f"{flying} micro-batch{'es' * (flying > 1)} in flight"),
            Part("coming and going", moving, "the fullest of a layer's backward and logits"),
            Part("allocator", round(constants.ALLOCATOR_SHARE * (held + moving)), "held beyond tensors"),
            Part("libraries", _libraries(actor.parallel, ranks), "communicators, workspaces"),
            Part("context", constants.CONTEXT_BYTES, "CUDA"),
        ]
        if asleep:
            parts.append(Part("engine asleep", constants.ASLEEP_BYTES, "on the same GPU"))
        if staging:
            parts.append(Part("staging", staging, "weights on their way to engines"))
        found.append(Memory(f"trainer rank, stage {stage}", tuple(parts)))
    return tuple(found)


def residue_bytes(model: ModelOnRanks, ranks: int, balancing: Balancing | None, staging: int = 0) -> int:
    """What an offloaded trainer rank leaves on its GPU; arguments as in :func:`trainer_memory`."""
    slots = slot_bytes(model, balancing) if balancing is not None and model.arch.is_moe else 0
    return constants.CONTEXT_BYTES + _libraries(model.parallel, ranks) + slots + staging


def engine_memory(
    arch: Architecture,
    *,
    width: int,
    tensor_parallel: int,
    kv_cache_bytes: int,
    seats: int,
    trainer_residue: int = 0,
) -> Memory:
    """Memory of one GPU of an engine.

    Args:
        width: bytes of a weight.
        tensor_parallel: GPUs of the engine.
        kv_cache_bytes: of each of its GPUs.
        seats: samples computed at the same time.
        trainer_residue: of a trainer rank on the same GPU.
    """
    parts = [
        Part("weights", total_parameters(arch) * width // tensor_parallel),
        Part("key-value cache", kv_cache_bytes, "rollout.kv_cache_gib"),
        # Logits of a step in the model's type, in float32, and their log-softmax.
        Part("logits", seats * -(-arch.vocab // tensor_parallel) * (width + 8), f"{seats} samples at a time"),
        Part("engine", constants.ENGINE_WORKSPACE_BYTES, "context, workspaces, activations of a step"),
    ]
    if trainer_residue:
        parts.append(Part("trainer offloaded", trainer_residue, "on the same GPU: context, libraries, slots, staging"))
    return Memory("engine GPU", tuple(parts))


def kv_bytes_per_token(arch: Architecture, width: int, tensor_parallel: int) -> int:
    """Key-value cache of one token on one GPU of an engine. Latent attention keeps its latent, on every GPU."""
    latent = arch.latent
    if latent is not None:
        return int(arch.layers * (latent.kv_rank + latent.rotary_dim) * width)
    heads = max(1, arch.kv_heads // tensor_parallel)
    return int(arch.layers * 2 * heads * arch.head_dim * width)


def _libraries(parallel: ParallelSection, ranks: int) -> int:
    neighbours = min(parallel.pp, 3)  # of a pipeline stage, itself counted
    peers = max(parallel.ep * parallel.etp, ranks // (parallel.tp * parallel.pp), parallel.tp, neighbours) - 1
    return constants.WORKSPACE_BYTES + constants.PEER_BYTES * min(peers, constants.MOST_PEERS)
