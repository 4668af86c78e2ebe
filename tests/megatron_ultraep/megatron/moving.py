"""MoE layers under Megatron's DDP and optimizers, with made-up gradients, whose experts change their homes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat, cpu, migrate
from megatron_ultraep.megatron.checkpoint import home_slot_of, local_experts
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.megatron.migrate import MoveReport, expert_bytes, expert_parameters, make_move_group, move_experts
from megatron_ultraep.megatron.optimizer import held_by
from megatron_ultraep.megatron.support import Unsupported
from tests.megatron_ultraep.megatron.moe import Case, moe_config

LAYERS = (2, 5, 6)  # numbers as layers of a larger model would have


@dataclass(frozen=True)
class Kind:
    """An optimizer, and how many expert-parallel ranks.

    Attributes:
        ep: expert-parallel ranks; the rest of the world is expert-data-parallel.
        experts: of a layer. An odd number on each rank makes two expert-data-parallel ranks cut inside a parameter.
        dtype: of parameters.
        distributed: shard optimizer states.
        overlap: of gradients and parameters with computing.
        config: of the model.
        optimizer: fields of Megatron's ``OptimizerConfig``.
    """

    ep: int = 2
    experts: int = 6
    dtype: torch.dtype = torch.float32
    distributed: bool = False
    overlap: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


class Job:
    """Three MoE layers in DDP with an optimizer; steps take gradients that depend on (step, layer, logical expert)."""

    def __init__(self, kind: Kind) -> None:
        cpu.install()
        world = dist.get_world_size()
        case = Case(dtype=kind.dtype, layout={"ep": kind.ep}, config={"num_moe_experts": kind.experts} | kind.config)
        self.groups = create_groups(ParallelLayout(world=world, ep=kind.ep), timeout_s=60)
        compat.ensure_scratch_buffer()
        where = self.groups.coordinates
        compat.seed_rng(1, tp_rank=0, ep_rank=where["ep"], etp_rank=0)
        config = moe_config(case)
        config.calculate_per_token_loss = True
        self.layers = [
            compat.moe_layer(config, self.groups.collection, transformer_engine=False, layer_number=number)
            for number in LAYERS
        ]
        model = _module(config)
        model.tp_group = self.groups.collection.tp  # or sharded_state_dict asks Megatron's globals
        for layer in self.layers:
            model.add_module(f"layer{layer.layer_number}", layer)
        model.to(kind.dtype)
        for layer in self.layers:
            for name, parameter in layer.router.named_parameters():
                fill(parameter.data, f"router {layer.layer_number} {name}")
            for (place, name), parameter in expert_parameters(layer).items():
                fill(parameter.data, f"{layer.layer_number} {local_experts(layer)[place]} {name}")
        self.chunks = compat.distributed_data_parallel(
            config,
            [compat.float16_module(config, model) if kind.dtype == torch.bfloat16 else model],
            self.groups.collection,
            distributed_optimizer=kind.distributed,
            grad_dtype_fp32=kind.dtype != torch.float64,
            overlap=kind.overlap,
        )
        self.optimizer = compat.optimizer(
            self.chunks,
            self.groups.collection,
            **{
                "lr": 1e-2,
                "clip_grad": 0.0,
                "bf16": kind.dtype == torch.bfloat16,
                "params_dtype": kind.dtype,
                "use_distributed_optimizer": kind.distributed,
            }
            | kind.optimizer,
        )
        self.group = make_move_group(self.chunks, self.optimizer, self.groups.collection, timeout_s=30)

    def step(self, number: int) -> None:
        """One optimizer step; gradients are the same on every replica."""
        self.empty()
        for layer in self.layers:
            for name, parameter in layer.router.named_parameters():
                fill(parameter.main_grad, f"gradient {number} router {layer.layer_number} {name}")
            mine = local_experts(layer)
            for (place, name), parameter in expert_parameters(layer).items():
                fill(parameter.main_grad, f"gradient {number} {layer.layer_number} {mine[place]} {name}")
        self.optimizer.step()
        self.empty()

    def empty(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def move(self, homes: dict[int, tuple[int, ...]], **more: Any) -> MoveReport:
        return move_experts(self.chunks, self.optimizer, homes, self.group, **more)

    def states(self) -> dict[tuple[Any, ...], np.ndarray]:
        """What this rank holds of every expert: ``(layer, expert, name, kind, first element)`` -> values."""
        compat.synchronize_parameters(self.chunks)
        held = held_by(self.optimizer)
        found = {}
        for layer in self.layers:
            mine = local_experts(layer)
            for (place, name), parameter in expert_parameters(layer).items():
                key = (layer.layer_number, mine[place], name)
                found[*key, "weight", 0] = parameter
                if parameter in held:
                    found |= {(*key, kind, held[parameter].start): t for kind, t in held[parameter].tensors().items()}
        return {key: tensor.detach().double().flatten().numpy().copy() for key, tensor in found.items()}


def _module(config: Any) -> torch.nn.Module:
    from megatron.core.transformer.module import MegatronModule

    return MegatronModule(config)


def fill(tensor: torch.Tensor, name: str) -> None:
    """Values that depend on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensor.copy_(values * 0.2)


def random_homes(seed: int, experts: int) -> dict[int, tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return {number: tuple(int(slot) for slot in rng.permutation(experts)) for number in LAYERS}


def steps_and_moves(kind: Kind, seeds: tuple[int | None, ...], limit_bytes: int = 1 << 20) -> dict[str, Any]:
    """States after each step, moving experts before it; ``None`` moves nothing.

    The last entry of ``states`` is taken after a move and before a step.
    """
    job = Job(kind)
    states, reports, places = [], [], _places(job)
    for step, seed in enumerate(seeds):
        if seed is not None:
            reports.append(job.move(random_homes(seed, kind.experts), limit_bytes=limit_bytes))
            now = {int(layer.layer_number): home_slot_of(layer) for layer in job.layers}
            assert now == random_homes(seed, kind.experts)
        if step == len(seeds) - 1:
            states.append(job.states())
            break
        job.step(step)
        states.append(job.states())
    assert _places(job) == places, "buffers were allocated again"
    return {"states": states, "reports": reports}


def _places(job: Job) -> list[int]:
    return [p.data_ptr() for chunk in job.chunks for p in chunk.parameters()]


def merged(results: list[dict[str, Any]], step: int) -> dict[tuple[Any, ...], np.ndarray]:
    """Whole tensors by ``(layer, expert, name, kind)``; copies on several ranks must have the same bits."""
    parts: dict[tuple[Any, ...], dict[int, np.ndarray]] = {}
    for result in results:
        for (*key, first), values in result["states"][step].items():
            known = parts.setdefault(tuple(key), {}).setdefault(first, values)
            assert np.array_equal(known, values), f"copies of {key} differ"
    return {key: np.concatenate([some[first] for first in sorted(some)]) for key, some in parts.items()}


def refusal(kind: Kind, spoil: str) -> tuple[str, bool]:
    """What a move says when something speaks against it, and whether everything is where it was."""
    job = Job(kind)
    job.step(0)
    before = job.states()
    homes, more = random_homes(1, kind.experts), {}
    if spoil == "gradients":
        next(iter(expert_parameters(job.layers[0]).values())).main_grad[0] = 1
    elif spoil == "homes" and dist.get_rank() == 1:
        homes = random_homes(2, kind.experts)
    elif spoil == "steps" and dist.get_rank() == 0:
        inner = job.optimizer.chained_optimizers[-1].optimizer
        next(iter(inner.state.values()))["step"] += 1
    elif spoil == "unknown state" and dist.get_rank() == 0:
        inner = job.optimizer.chained_optimizers[-1].optimizer
        next(iter(inner.state.values()))["max_exp_avg_sq"] = torch.zeros(1)
    elif spoil == "layer":
        homes = {3: tuple(range(kind.experts))}
    elif spoil == "permutation":
        homes = {2: (0,) * kind.experts}
    elif spoil == "limit":
        more = {"limit_bytes": 8}
    elif spoil == "limits":
        more = {"limit_bytes": 10_000 + dist.get_rank()}
    try:
        job.move(homes, **more)
    except (Unsupported, ValueError) as error:
        after = job.states()
        same = set(before) == set(after) and all(np.array_equal(before[k], after[k]) for k in before)
        return f"{type(error).__name__}: {error}", same
    return "moved", False


def exchanged(kind: Kind) -> tuple[int, MoveReport]:
    """The bytes of an expert, and what a move of two experts between two ranks reports after a step."""
    job = Job(kind)
    job.step(0)
    last = kind.experts - 1
    return expert_bytes(job.chunks, job.group), job.move({LAYERS[1]: (last, *range(1, last), 0)})


def torn(kind: Kind) -> str:
    """What a move says that breaks after some waves, on every rank alike."""
    job = Job(kind)
    job.step(0)
    run, count = migrate._Exchange.run, 0

    def breaks(self: Any, wave: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("the network is gone")
        run(self, wave)

    migrate._Exchange.run = breaks
    try:
        job.move(random_homes(1, kind.experts), limit_bytes=6000)
    except migrate.TornStateError as error:
        return str(error)
    finally:
        migrate._Exchange.run = run
    return ""


# ------------------------------------------------------------------ checkpoints


def save(job: Job, path: str, distributed: bool, **metadata: Any) -> None:
    """Write weights and optimizer as Megatron's training does."""
    metadata = compat.checkpoint_metadata(job.groups.collection, distributed_optimizer=distributed) | metadata
    state = {"model": compat.unwrap(job.chunks[0]).sharded_state_dict(metadata=metadata)}
    state["optimizer"] = job.optimizer.sharded_state_dict(state, is_loading=False, metadata=metadata)
    compat.save_checkpoint(state, path)


def load(job: Job, path: str, distributed: bool) -> None:
    """Read :func:`save` back; the optimizer must have made a step before."""
    metadata = compat.checkpoint_metadata(job.groups.collection, distributed_optimizer=distributed)
    model = compat.unwrap(job.chunks[0])
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = job.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    loaded = compat.load_checkpoint(state, path)
    model.load_state_dict(loaded["model"])
    job.optimizer.load_state_dict(loaded["optimizer"])
    for inner in job.optimizer.chained_optimizers:
        # Loading puts one tensor of steps into every parameter's state, which torch's Adam would count up for each.
        for moments in inner.optimizer.state.values():
            moments["step"] = moments["step"].clone()


def saved(kind: Kind, seed: int | None, path: str) -> dict[str, Any]:
    """Two steps, a move to random homes if there is a seed, a checkpoint, one more step; the states after each part."""
    job = Job(kind)
    job.step(0)
    job.step(1)
    if seed is not None:
        job.move(random_homes(seed, kind.experts))
    save(job, path, kind.distributed)
    states = [job.states()]
    job.step(2)
    return {"states": [*states, job.states()]}


def resumed(kind: Kind, seed: int | None, path: str) -> dict[str, Any]:
    """What :func:`saved` returns, of a job that has done other things, under other homes, and loads the checkpoint."""
    job = Job(kind)
    job.step(7)
    if seed is not None:
        job.move(random_homes(seed, kind.experts))
    load(job, path, kind.distributed)
    states = [job.states()]
    job.step(2)
    return {"states": [*states, job.states()]}


def sharded(kind: Kind, seed: int | None, **metadata: Any) -> dict[tuple[Any, ...], tuple[str, np.ndarray]]:
    """``(key, offset)`` of every sharded tensor of the model on this rank -> its name here and its values."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    job = Job(kind)
    if seed is not None:
        job.move(random_homes(seed, kind.experts))
    found: dict[tuple[Any, ...], tuple[str, np.ndarray]] = {}
    state = compat.unwrap(job.chunks[0]).sharded_state_dict(
        metadata=compat.checkpoint_metadata(job.groups.collection, distributed_optimizer=False) | metadata
    )
    apply_factories(state)

    def walk(entry: Any, name: str) -> None:
        if isinstance(entry, ShardedTensor):
            key = (entry.key, entry.global_offset)
            assert key not in found
            found[key] = name, entry.data.detach().double().numpy().copy()
        elif isinstance(entry, dict):
            for inner, value in entry.items():
                walk(value, inner)
        elif isinstance(entry, list):
            for value in entry:
                walk(value, name)

    walk(state, "")
    return found


def formats(kind: Kind) -> list[str]:
    """What saving in a format that follows the optimizer's buffers says: before a move, after it, after the return."""
    job = Job(kind)
    job.step(0)
    said = []
    for homes in ({}, random_homes(1, kind.experts), {n: tuple(range(kind.experts)) for n in LAYERS}):
        job.move(homes)
        try:
            metadata = compat.checkpoint_metadata(job.groups.collection, distributed_optimizer=True)
            metadata["distrib_optim_sharding_type"] = "dp_reshardable"
            compat.unwrap(job.chunks[0]).sharded_state_dict(metadata=metadata)
            said.append("written")
        except Unsupported as error:
            said.append(str(error))
    assert all("sharded_state_dict" not in layer.experts.__dict__ for layer in job.layers), "not given back"
    return said
