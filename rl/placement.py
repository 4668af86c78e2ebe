"""Where everything runs: which trainer rank has which coordinates, and what each actor asks of Ray.

Coordinates follow Megatron's default order ``tp-cp-ep-dp-pp``: tensor-parallel ranks are neighbours, pipeline
stages are furthest apart, and expert ranks are laid over the same ranks of a stage.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rl.config import ParallelSection, RunConfig


@dataclass(frozen=True)
class RankPlacement:
    """Coordinates of one trainer rank; ``edp`` is the rank among copies of the same experts."""

    rank: int
    tp: int
    pp: int
    dp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Placement:
    """What a run starts.

    Attributes:
        ranks: trainer ranks, by rank.
        data_parallel: number of data-parallel ranks, dense parameters.
        expert_data_parallel: number of copies of each expert.
        engines: number of rollout engines.
        engine_ranks: tensor-parallel ranks of each engine.
        ray_cpus: Ray CPU tokens that all actors ask for together, one for each rank.
        ray_gpus: GPUs that all actors ask for together.
    """

    ranks: tuple[RankPlacement, ...]
    data_parallel: int
    expert_data_parallel: int
    engines: int
    engine_ranks: int
    ray_cpus: int
    ray_gpus: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger."""
        return asdict(self)


def rank_placement(rank: int, ranks: int, parallel: ParallelSection) -> RankPlacement:
    """Coordinates of one rank; ``ranks`` must be a multiple of tp*pp and of etp*ep*pp."""
    per_stage = ranks // parallel.pp
    stage, inside = divmod(rank, per_stage)
    return RankPlacement(
        rank=rank,
        tp=inside % parallel.tp,
        pp=stage,
        dp=inside // parallel.tp,
        etp=inside % parallel.etp,
        ep=inside // parallel.etp % parallel.ep,
        edp=inside // (parallel.etp * parallel.ep),
    )


def place(config: RunConfig) -> Placement:
    """The placement of a run."""
    ranks, parallel, rollout = config.trainer.ranks, config.trainer.parallel, config.rollout
    engine_ranks = rollout.engines * rollout.tensor_parallel
    return Placement(
        ranks=tuple(rank_placement(rank, ranks, parallel) for rank in range(ranks)),
        data_parallel=ranks // (parallel.tp * parallel.pp),
        expert_data_parallel=ranks // (parallel.etp * parallel.ep * parallel.pp),
        engines=rollout.engines,
        engine_ranks=rollout.tensor_parallel,
        ray_cpus=ranks + max(engine_ranks, (config.stream.elastic.max_engines or 0) * rollout.tensor_parallel),
        ray_gpus=_gpus(config),
    )


def _gpus(config: RunConfig) -> int:
    """GPUs of trainer ranks and of as many engines as there may be; colocated ones share theirs."""
    rollout = config.rollout
    ranks = config.trainer.ranks if config.trainer.backend == "nccl" else 0
    most = max(rollout.engines, config.stream.elastic.max_engines or 0) * rollout.tensor_parallel
    engines = most if rollout.device == "cuda" else 0
    return max(ranks, engines) if config.stream.colocated else ranks + engines


def render(config: RunConfig) -> str:
    """The placement as a table for people."""
    placement = place(config)
    trainer, rollout = config.trainer, config.rollout
    device = "GPU" if trainer.backend == "nccl" else "CPU"
    header = f"{'trainer rank':>12}  {'tp':>3} {'pp':>3} {'dp':>3} {'etp':>4} {'ep':>3} {'edp':>4}  runs on"
    rows = [
        f"{r.rank:>12}  {r.tp:>3} {r.pp:>3} {r.dp:>3} {r.etp:>4} {r.ep:>3} {r.edp:>4}  1 {device} ({trainer.backend})"
        + (f", node {r.rank // trainer.ranks_per_node}" if trainer.ranks_per_node is not None else "")
        for r in placement.ranks
    ]
    engine_device = "GPU" if rollout.device == "cuda" else "CPU"
    engines = [
        f"{index:>12}  {rollout.tensor_parallel} {engine_device}, {rollout.kv_cache_gib:g} GiB of key-value cache, "
        f"{config.engine_dtype}"
        for index in range(rollout.engines)
    ]
    if config.ray.address is not None:
        ray = f"joins the cluster at {config.ray.address}"
    else:
        cpus = config.ray.num_cpus or placement.ray_cpus
        ray = f"private local instance, {cpus} CPU tokens, {config.ray.object_store_mib} MiB object store"
    return "\n".join(
        [
            f"{_count(trainer.ranks, 'trainer rank')}: data parallel {placement.data_parallel}, copies of each expert "
            f"{placement.expert_data_parallel}",
            header,
            *rows,
            _count(rollout.engines, "rollout engine"),
            f"{'engine':>12}  runs on",
            *engines,
            f"Ray: {ray}; actors ask for {placement.ray_cpus} CPUs, {placement.ray_gpus} GPUs",
            f"run directory: {config.output_dir}",
        ]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
