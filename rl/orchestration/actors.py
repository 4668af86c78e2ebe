"""A run's processes: what engines and trainer ranks are started with, from the run's configuration."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.config import ConfigError, OptimizerSection, RunConfig, Violation
from rl.config.fused_training import fused_partner
from rl.models.builder import Recompute
from rl.rank_nodes import RankNodes, described_nodes, live_nodes
from rl.rollout.config import EngineConfig
from rl.rollout.dispatch import Dispatch, get_dispatch
from rl.rollout.fleet import Engines
from rl.rollout.latency import LatencyProfile
from rl.rollout.pool import EnginePool
from rl.rollout.predictors import LengthPredictor, get_predictor
from rl.rollout.service import GenerationService
from rl.shared_gpus import SharedGpus
from rl.timeline import Timeline
from rl.training.group import Trainer, TrainerLimits
from rl.training.spec import CriticSpec, OptimizerSpec, ScorerSpec, TrainerSpec


def parallel_layout(config: RunConfig, model: str = "actor") -> ParallelLayout:
    """Of a model on the trainer's ranks: ``"actor"``, or ``"critic"``, ``"reference"``, ``"scorer"``.

    Stages of the actor's partner in fused training run against the actor's.
    """
    field = {"critic": "critic.parallel", "reference": "reference.parallel", "scorer": "reward.model.parallel"}
    p = config.layouts.get(field.get(model, ""), config.trainer.parallel)
    layout = ParallelLayout(
        world=config.trainer.ranks, tp=p.tp, pp=p.pp, vpp=p.vpp if p.vpp > 1 else None, ep=p.ep, etp=p.etp, cp=p.cp
    )
    return layout.opposed(config.trainer.parallel.pp) if fused_partner(config).name == model else layout


def start_actors(config: RunConfig, iterations: int, stack: contextlib.ExitStack) -> tuple[EnginePool, Trainer]:
    """Engines and trainer ranks come up side by side; when one fails, the other is ended.

    Args:
        config: of the run.
        iterations: of the whole run; learning rates decay until its end where nothing else is said.
        stack: ends what was started.
    """
    share = None
    if config.stream.colocated and config.rollout.device == "cuda":
        share = SharedGpus(config.trainer.ranks, config.run.limits.actor_start_s)
        stack.callback(share.release)
    nodes = None
    if share is None and (len(live_nodes()) > 1 or config.trainer.ranks_per_node is not None):
        nodes = _rank_nodes(config)  # before engines, which would take single GPUs of nodes that ranks need whole
        stack.callback(nodes.release)

    def start_pool() -> EnginePool:
        pool = EnginePool(engine_config(config), config.rollout.engines, share=share)
        stack.callback(pool.stop)
        return pool

    def start_trainer() -> Trainer:
        limits = config.run.limits
        trainer = Trainer(
            trainer_spec(config, iterations),
            backend=config.trainer.backend,
            limits=TrainerLimits(limits.actor_start_s, limits.train_step_s, limits.checkpoint_s, limits.generate_s),
            share=share,
            nodes=nodes,
        )
        stack.callback(trainer.stop)
        return trainer

    with ThreadPoolExecutor(2) as threads:
        starting_pool, starting_trainer = threads.submit(start_pool), threads.submit(start_trainer)
        pool, trainer = starting_pool.result(), starting_trainer.result()
    trainer.connect(pool.handles)
    return pool, trainer


def _rank_nodes(config: RunConfig) -> RankNodes:
    """Raises ConfigError: fewer nodes than ``trainer.ranks_per_node`` asks for."""
    t = config.trainer
    if t.ranks_per_node is not None and (nodes := len(live_nodes())) < (needed := t.ranks // t.ranks_per_node):
        said = (
            f"expected at least {needed} nodes for {t.ranks} ranks, {t.ranks_per_node} on each, Ray has {nodes} "
            f"({described_nodes()}); start it on more nodes (scripts/slurm/launch.sh does), or raise or remove this."
        )
        raise ConfigError("trainer.ranks_per_node", [Violation("trainer.ranks_per_node", said)])
    return RankNodes(
        t.ranks, gpus=t.backend == "nccl", per_node=t.ranks_per_node, timeout_s=config.run.limits.actor_start_s
    )


def engine_config(config: RunConfig) -> EngineConfig:
    r, limits = config.rollout, config.run.limits
    return EngineConfig(
        model_path=str(config.model.path.absolute()),
        dtype=config.engine_dtype,
        device=r.device,
        max_model_len=r.max_model_len,
        max_num_seqs=r.max_num_seqs,
        kv_cache_memory_bytes=int(r.kv_cache_gib * (1 << 30)),
        block_size=r.block_size,
        tensor_parallel=r.tensor_parallel,
        seed=config.run.seed,
        cuda_graphs=r.cuda_graphs and r.device == "cuda",
        float32_head=config.model.float32_head and config.engine_dtype == "bfloat16",
        float32_residual=config.model.float32_residual and config.engine_dtype == "bfloat16",
        sleep_mode=config.stream.colocated and r.device == "cuda",
        capture_routes=r.capture_routes,
        max_regenerations=r.max_regenerations,
        start_timeout_s=limits.engine_start_s,
        generate_timeout_s=limits.generate_s,
        update_timeout_s=limits.weight_update_s,
        allow_untested=config.allow_untested,
    )


def trainer_spec(config: RunConfig, iterations: int) -> TrainerSpec:
    """What every trainer rank builds, in a run of so many iterations."""
    t, c, scorer = config.trainer, config.critic, config.reward.model
    per_iteration = config.algorithm.mini_batches * config.algorithm.epochs_per_batch
    alone = 0 if c is None else c.warmup_steps  # iterations in which the critic learns alone
    steps = iterations * per_iteration
    own_reference = config.reference.parallel is not None or fused_partner(config).name == "reference"
    model_path = str(config.model.path.absolute())
    return TrainerSpec(
        model_path=model_path,
        layout=parallel_layout(config),
        dtype=config.model.dtype,
        recompute=Recompute(t.recompute, t.recompute_modules),
        distributed_optimizer=t.distributed_optimizer,
        optimizer=_optimizer_spec(t.optimizer, max(1, steps - alone * per_iteration)),
        reference=config.keeps_reference,
        seed=config.run.seed,
        overlap=t.overlap,
        fuse_gradients=t.fuse_gradients,
        permute_fusion=t.permute_fusion,
        collective_s=config.run.limits.collective_s,
        balance=(
            config.balance.settings(config.output_dir, allow_untested=config.allow_untested)
            if config.balance.enabled
            else None
        ),
        reorder=config.balance.enabled and config.balance.reorder,
        critic=None
        if c is None
        else CriticSpec(
            model_path=str(c.model_path.absolute()) if c.model_path is not None else model_path,
            layout=parallel_layout(config, "critic"),
            optimizer=_optimizer_spec(c.optimizer, steps),
            recompute=Recompute(c.recompute, c.recompute_modules),
        ),
        reference_layout=parallel_layout(config, "reference") if own_reference else None,
        float32_head=config.model.float32_head,
        float32_residual=config.model.float32_residual,
        scorer=None if scorer is None else ScorerSpec(str(scorer.path.absolute()), parallel_layout(config, "scorer")),
    )


def _optimizer_spec(o: OptimizerSection, steps: int) -> OptimizerSpec:
    return OptimizerSpec(
        lr=o.lr,
        min_lr=o.min_lr,
        warmup_steps=o.warmup_steps,
        decay_steps=o.decay_steps or steps,
        schedule=o.schedule,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_grad=o.clip_grad,
    )


def start_service(
    config: RunConfig, pool: Engines, timeline: Timeline, stack: contextlib.ExitStack
) -> GenerationService:
    """The service over the engines, with the run's dispatch policy and predictor."""
    service = GenerationService(
        pool,
        dispatch=_dispatch(config),
        predictor=predictor(config),
        max_restarts=config.stream.max_restarts,
        on_span=timeline.span,
    )
    stack.callback(service.stop)
    return service


def predictor(config: RunConfig) -> LengthPredictor | None:
    """Of response lengths; None when the run has none."""
    name = config.stream.predictor
    if name == "none":
        return None
    return get_predictor(name, **({"seed": config.run.seed} if name == "ranker" else {}))


def _dispatch(config: RunConfig) -> Dispatch:
    stream = config.stream
    if stream.dispatch == "random":
        return get_dispatch("random", seed=config.run.seed)
    if stream.dispatch == "skew_aware":
        assert stream.latency_profile is not None  # rl.config.rules
        profile = LatencyProfile.load(stream.latency_profile)
        return get_dispatch("skew_aware", step_seconds=profile, fraction=stream.long_fraction)
    return get_dispatch(stream.dispatch)
