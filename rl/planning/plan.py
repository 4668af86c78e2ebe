"""From a run's configuration to what it takes: memory by part, seconds by phase, and whether it fits.

Pure but for ``read_dimensions``, which reads the model's config.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rl.config import RunConfig
from rl.models.architecture import Architecture, UnsupportedModel, architecture, read_architecture
from rl.orchestration.fit import check_against_model
from rl.placement import place
from rl.planning import constants, times
from rl.planning.activations import FP32, Workload
from rl.planning.cluster import GIB, Cluster, cluster_of
from rl.planning.memory import (
    Balancing,
    Memory,
    ModelOnRanks,
    engine_memory,
    kv_bytes_per_token,
    residue_bytes,
    trainer_memory,
)
from rl.planning.parameters import active_parameters, total_parameters
from rl.planning.times import Batch, Phase, Training
from rl.rollout.config import decodes_with_graphs
from rl.transfer.turns import DEPTH, GPU_BUCKET_BYTES

WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}


class PlanError(ValueError):
    """A configuration that nothing can be planned for; says what to change."""


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        name: of the run.
        arch: of the model.
        cluster: its machines.
        gpus: that trainer and engines take together.
        trainer: memory of a rank of each pipeline stage.
        engine: memory of a GPU of an engine.
        limit: bytes of a GPU that may be taken; None on CPUs, where nothing is compared.
        phases: of a step, in order; empty on CPUs.
        step_seconds: expected; ``step_bound`` is its lower bound.
        refused: what stops such a run today, whatever the memory.
        overlapped: generation and training run at the same time.
    """

    name: str
    arch: Architecture
    cluster: Cluster
    gpus: int
    trainer: tuple[Memory, ...]
    engine: Memory
    limit: int | None
    phases: tuple[Phase, ...]
    step_seconds: float
    step_bound: float
    refused: tuple[str, ...]
    overlapped: bool

    @property
    def fullest(self) -> Memory:
        """The stage whose ranks take most."""
        return max(self.trainer, key=lambda memory: memory.total)

    @property
    def over(self) -> tuple[tuple[str, int], ...]:
        """What does not fit, and by how many bytes."""
        if self.limit is None:
            return ()
        return tuple((m.what, m.total - self.limit) for m in (self.fullest, self.engine) if m.total > self.limit)

    @property
    def fits(self) -> bool:
        return not self.over

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes and seconds."""

        def memory(each: Memory) -> dict[str, Any]:
            return {"what": each.what, "bytes": each.total, "parts": [asdict(part) for part in each.parts]}

        return {
            "planned": True,
            "name": self.name,
            "parameters": total_parameters(self.arch),
            "active_parameters": active_parameters(self.arch),
            "gpu": asdict(self.cluster.gpu),
            "gpus": self.gpus,
            "nodes": self.cluster.nodes(self.gpus),
            "limit_bytes": self.limit,
            "fits": self.fits,
            "trainer": [memory(each) for each in self.trainer],
            "engine": memory(self.engine),
            "phases": [asdict(phase) for phase in self.phases],
            "step_seconds": self.step_seconds,
            "step_bound_seconds": self.step_bound,
            "refused": list(self.refused),
        }


def read_dimensions(config: RunConfig) -> Architecture:
    """The model's dimensions: of ``model.path``, or of ``plan.dimensions`` where the model is not there yet.

    Raises:
        PlanError: neither is there, or a model that is not supported.
    """
    path = config.model.path
    try:
        if (path / "config.json").is_file():
            return read_architecture(path)
        if config.plan.dimensions is not None and config.plan.dimensions.is_file():
            return _read(config.plan.dimensions)
    except (UnsupportedModel, KeyError, ValueError) as error:
        raise PlanError(f"{path}: {error}") from error
    raise PlanError(
        f"model.path: expected a Hugging Face directory with config.json at {path}, or the model's config.json named "
        f"by plan.dimensions, found neither (plan.dimensions is {config.plan.dimensions}); download the model, or name "
        "a file such as those in recipes/models"
        + (", or run the recipe once, which creates it" if config.model.create else "")
    )


def _read(file: Path) -> Architecture:
    return architecture(json.loads(file.read_text()))


def make_plan(config: RunConfig, arch: Architecture | None = None, *, with_times: bool = True) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        arch: its model; None reads it.
        with_times: estimate seconds too.

    Raises:
        ConfigError: fields that do not fit the model.
        PlanError: sizes that the model cannot be cut into, or no model.
    """
    arch = arch or read_dimensions(config)
    check_layouts(config, arch)
    section = config.plan
    cluster = cluster_of(section.gpu, section.gpus_per_node, section.network_gbs)
    on_gpus = config.trainer.backend == "nccl"
    models, balancing = models_on_ranks(config, arch), _balancing(config)
    batch = _batch(config)
    data_parallel = config.trainer.ranks // (config.trainer.parallel.tp * config.trainer.parallel.pp)
    per_rank = -(-batch.samples // (batch.mini_batches * data_parallel))
    longest = per_rank * (config.longest_sample - 1)
    replayed = config.algorithm.routes.train == "replay" and config.rollout.capture_routes
    trainer = trainer_memory(
        models,
        config.trainer.ranks,
        -(-longest // config.trainer.tokens_per_micro_batch),
        distributed_optimizer=config.trainer.distributed_optimizer,
        balancing=balancing,
        replayed_rows=per_rank * batch.length if replayed else 0,
        asleep=config.stream.colocated,
        staging=_staging(config, arch),
    )
    engine = _engine(config, arch, models[0], balancing)
    phases = _phases(config, models, cluster, trainer) if on_gpus and with_times else ()
    expected, bound = _step(config, phases)
    return Plan(
        name=config.run.name,
        arch=arch,
        cluster=cluster,
        gpus=_gpus(config),
        trainer=trainer,
        engine=engine,
        limit=round(cluster.gpu.memory_gib * GIB * (1 - section.margin)) if on_gpus else None,
        phases=phases,
        step_seconds=expected,
        step_bound=bound,
        refused=tuple(_refused(config, arch, cluster)),
        overlapped=config.stream.overlapped,
    )


def check_layouts(config: RunConfig, arch: Architecture) -> None:
    """See that every model can be cut as its layout says.

    Raises:
        ConfigError, PlanError: with what to change.
    """
    check_against_model(config, arch)
    from megatron_ultraep.megatron.groups import ParallelLayout
    from rl.models.builder import check_layout

    for path, parallel in config.layouts.items():
        layout = ParallelLayout(
            world=config.trainer.ranks,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp if parallel.vpp > 1 else None,
            ep=parallel.ep,
            etp=parallel.etp,
        )
        groups: Any = SimpleNamespace(layout=layout)
        try:
            check_layout(arch, groups)
        except ValueError as error:
            raise PlanError(f"{path}: {error}") from error


def _imbalance(config: RunConfig, balanced: bool) -> float:
    if config.trainer.parallel.ep == 1:
        return 1.0
    return 1.0 + config.balance.tolerance if balanced else config.plan.imbalance


def models_on_ranks(config: RunConfig, arch: Architecture) -> list[ModelOnRanks]:
    """All models of a run's trainer, the actor first; their micro-batches are as large as they may be."""
    trainer = config.trainer
    width = WIDTH[config.model.dtype]

    def work(recompute: str, modules: tuple[str, ...], balanced: bool, scored: bool = True) -> Workload:
        """``scored``: its log-probs count, so its residual stream may be in float32."""
        wide = scored and config.model.float32_residual and width < FP32
        return Workload(
            tokens=trainer.tokens_per_micro_batch,
            width=width,
            imbalance=_imbalance(config, balanced),
            recompute=recompute,
            modules=modules,
            logprob_chunk=trainer.logprob_chunk_tokens,
            stream=FP32 if wide else None,
        )

    scalar = replace(arch, tied=False, scalar_head=True)
    balanced = config.balance.enabled
    models = [
        ModelOnRanks(
            "actor", arch, trainer.parallel, True, work(trainer.recompute, trainer.recompute_modules, balanced)
        )
    ]
    if config.critic is not None:
        critic = config.critic
        models.append(
            ModelOnRanks(
                "critic",
                scalar,
                critic.parallel or trainer.parallel,
                True,
                work(critic.recompute, critic.recompute_modules, balanced, scored=False),
            )
        )
    if config.keeps_reference:
        layout = config.reference.parallel or trainer.parallel
        models.append(ModelOnRanks("reference", arch, layout, False, work("none", (), balanced)))
    if config.reward.model is not None:
        layout = config.reward.model.parallel or trainer.parallel
        models.append(ModelOnRanks("scorer", scalar, layout, False, work("none", (), balanced, scored=False)))
    return models


def _balancing(config: RunConfig) -> Balancing | None:
    balance = config.balance
    if not balance.enabled:
        return None
    staged = balance.transport == "collective" or config.trainer.backend == "gloo"
    return Balancing(balance.slots, balance.slot_sets, staged)


def _batch(config: RunConfig) -> Batch:
    return Batch(
        samples=config.samples_per_step,
        prompts=config.data.prompts_per_step,
        prompt=config.plan.mean_prompt or max(1, config.data.max_prompt_tokens // 2),
        response=min(config.plan.mean_response or max(1, config.sampling.max_tokens // 2), config.sampling.max_tokens),
        longest=config.sampling.max_tokens,
        mini_batches=config.algorithm.mini_batches,
    )


def _staging(config: RunConfig, arch: Architecture) -> int:
    """Bytes that weights take on a trainer rank on their way to engines.

    By NCCL its share is copied, so that training may go on at once; beside engines buckets pass through a ring, and a
    single rank shares its weights where they are.
    """
    if config.transfer_path == "nccl":
        return total_parameters(arch) * WIDTH[config.engine_dtype] // config.trainer.ranks
    staged = config.transfer_path == "ipc" and config.trainer.ranks > 1
    return DEPTH * GPU_BUCKET_BYTES if staged else 0


def _engine(config: RunConfig, arch: Architecture, actor: ModelOnRanks, balancing: Balancing | None) -> Memory:
    rollout = config.rollout
    residue = 0
    if config.stream.colocated:
        residue = residue_bytes(actor, config.trainer.ranks, balancing, _staging(config, arch))
    return engine_memory(
        arch,
        width=WIDTH[config.engine_dtype],
        tensor_parallel=rollout.tensor_parallel,
        kv_cache_bytes=round(rollout.kv_cache_gib * GIB),
        seats=rollout.max_num_seqs,
        trainer_residue=residue,
    )


def _phases(
    config: RunConfig, models: list[ModelOnRanks], cluster: Cluster, trainer: tuple[Memory, ...]
) -> tuple[Phase, ...]:
    batch, rollout, arch = _batch(config), config.rollout, models[0].arch
    width = WIDTH[config.engine_dtype]
    found = [
        times.generation(
            arch,
            batch,
            cluster,
            engines=rollout.engines,
            tensor_parallel=rollout.tensor_parallel,
            seats=rollout.max_num_seqs,
            kv_cache_bytes=round(rollout.kv_cache_gib * GIB),
            width=width,
            graphs=decodes_with_graphs(
                rollout.cuda_graphs, device=rollout.device, latent_attention=arch.latent is not None
            ),
        )
    ]
    by_name = {model.name: model for model in models}

    def run(name: str, model: ModelOnRanks, backward: bool) -> Phase:
        training = Training(
            model.parallel,
            config.trainer.ranks,
            config.trainer.tokens_per_micro_batch,
            model.work.recompute,
            model.work.modules,
            model.work.imbalance,
            model.work.width,
        )
        return times.one_pass(name, model.arch, batch, cluster, training, backward=backward)

    if config.algorithm.old_logprobs == "recompute":
        found.append(run("old log-probs", by_name["actor"], False))
    for name in ("reference", "scorer"):
        if name in by_name:
            found.append(run(name, by_name[name], False))
    if "critic" in by_name:
        found += [run("values", by_name["critic"], False), run("critic", by_name["critic"], True)]
    found.append(run("training", by_name["actor"], True))
    found.append(
        times.transfer(
            arch,
            cluster,
            path=config.transfer_path,
            engines=rollout.engines,
            tensor_parallel=rollout.tensor_parallel,
            width=width,
        )
    )
    if config.stream.colocated:
        fullest = max(trainer, key=lambda memory: memory.total)
        held = sum(part.bytes for part in fullest.parts if part.name.endswith(("parameters", "optimizer")))
        found.append(times.turns(held))
    found.append(Phase("other", constants.STEP_OVERHEAD_S, 0.0, "rewards, advantages, ledger"))
    return tuple(found)


def _step(config: RunConfig, phases: tuple[Phase, ...]) -> tuple[float, float]:
    """Seconds of a step and their bound: phases one after another, or generation beside all others."""
    if not config.stream.overlapped:
        return sum(p.seconds for p in phases), sum(p.bound for p in phases)
    generation = [p for p in phases if p.name == "generation"]
    others = [p for p in phases if p.name != "generation"]
    return (
        max(sum(p.seconds for p in generation), sum(p.seconds for p in others)),
        max(sum(p.bound for p in generation), sum(p.bound for p in others)),
    )


def _gpus(config: RunConfig) -> int:
    return place(config).ray_gpus


def _refused(config: RunConfig, arch: Architecture, cluster: Cluster) -> list[str]:
    found = []
    rollout = config.rollout
    if rollout.tensor_parallel > cluster.gpus_per_node:
        found.append(
            f"rollout.tensor_parallel = {rollout.tensor_parallel}: an engine must fit on one node, of "
            f"{cluster.gpus_per_node} GPUs; engines over several nodes are refused (docs/support.md)"
        )
    cache = round(rollout.kv_cache_gib * GIB) // kv_bytes_per_token(
        arch, WIDTH[config.engine_dtype], rollout.tensor_parallel
    )
    if cache < config.rollout.max_model_len:
        found.append(
            f"rollout.kv_cache_gib = {rollout.kv_cache_gib:g}: holds {cache} tokens, less than one sample of "
            f"rollout.max_model_len = {rollout.max_model_len}"
        )
    return found
