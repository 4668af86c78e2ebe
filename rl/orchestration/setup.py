"""Everything a run holds while it runs: data, engines, trainer, ledger, metrics; opened and closed in one place."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_ultraep.megatron.groups import ParallelLayout
from rl import placement, versions
from rl.algorithms.losses import PolicyLossConfig
from rl.config import ConfigError, RunConfig, SourceSection, Violation, to_dict
from rl.data.dataset import Cursor, PromptDataset
from rl.data.sources import Row, digest, drop_overlap, overlap, read_jsonl, reasoning_gym_rows
from rl.data.supervised import SupervisedExample, sft_examples
from rl.evaluation import drop_evals_after
from rl.ledger import Ledger
from rl.metrics import MetricLogger
from rl.models.architecture import Architecture, read_architecture
from rl.models.builder import Recompute
from rl.orchestration.ahead import Ahead
from rl.orchestration.experience import Packing
from rl.orchestration.ray_instance import ray_instance
from rl.progress import Progress
from rl.rewards.loading import load_reward
from rl.rewards.runner import RewardRunner
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.pool import EnginePool
from rl.training import checkpoint
from rl.training.group import Trainer, TrainerDied, TrainerLimits
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, TrainerSpec

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """Prompts of training and evaluation, and solved problems for the warm-up; no problem is in two of them."""

    train: PromptDataset
    held_out: PromptDataset | None
    warmup: list[SupervisedExample]
    digests: dict[str, str]


@dataclass
class Run:
    """The parts of a running run, and how far it is.

    Attributes:
        step: completed iterations.
        cursor: next prompt to take.
        ahead: plans iterations before they run, and knows where experts are.
        version: weight version of the engines.
        whole: whether the trainer's state is that of ``step``: False from the moment an iteration begins to train.
        saved_step: newest checkpoint, -1 when there is none.
    """

    config: RunConfig
    arch: Architecture
    data: Data
    reward: RewardRunner
    pool: EnginePool
    trainer: Trainer
    ledger: Ledger
    metrics: MetricLogger
    progress: Progress
    packing: Packing
    ahead: Ahead
    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    version: int = 0
    whole: bool = True
    saved_step: int = -1
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.config.output_dir

    @property
    def sampling(self) -> Sampling:
        """How training responses are drawn."""
        s = self.config.sampling
        return Sampling(max_tokens=s.max_tokens, temperature=s.temperature, stop_token_ids=self.stop_token_ids)

    stop_token_ids: tuple[int, ...] = ()

    @property
    def policy_loss(self) -> PolicyLossConfig:
        a = self.config.algorithm
        return PolicyLossConfig(
            clip_low=a.clip_low,
            clip_high=a.clip_high,
            aggregation=a.aggregation,
            kl_coef=a.kl.coef if a.kl.apply_in == "loss" else 0.0,
            kl_estimator=a.kl.estimator,
            entropy_coef=a.entropy_coef,
            importance_cap=a.importance.truncation,
        )

    def settings(self, *, with_entropy: bool = False) -> PassSettings:
        """How the trainer takes log-probs: as the sampling policy did."""
        return PassSettings(
            temperature=self.config.sampling.temperature,
            chunk_tokens=self.config.trainer.logprob_chunk_tokens,
            with_entropy=with_entropy,
        )

    def prompts_left(self) -> int:
        """Prompts that the run still takes; unlimited when it counts steps."""
        if self.config.run.steps is not None:
            return sys.maxsize
        return self.config.run.epochs * len(self.data.train) - self.data.train.consumed(self.cursor)

    def total_steps(self) -> int:
        """Iterations of the whole run."""
        if self.config.run.steps is not None:
            return self.config.run.steps
        return math.ceil(self.config.run.epochs * len(self.data.train) / self.config.data.prompts_per_step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of an iteration and show it."""
        self.progress.phase(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def say(self, text: str) -> None:
        """A line for whoever watches, above the bar if there is one."""
        if self.config.logging.progress:
            self.progress.note(text)

    def save(self) -> None:
        """Checkpoint the state after ``step``: weights, optimizer, random state, cursor."""
        if self.saved_step == self.step:
            return
        partial = checkpoint.begin(self.directory / "checkpoints", self.step)
        self.trainer.save(partial, optimizer=self.config.checkpoint.save_optimizer)
        state = {
            "step": self.step,
            "cursor": self.cursor.to_json(),
            "version": self.version,
            "optimizer_steps": self.trainer.steps,
            "experts": self.ahead.to_json(),
        }
        checkpoint.publish(partial, state, keep=self.config.checkpoint.keep)
        self.saved_step = self.step

    def update_engines(self) -> None:
        """The trainer's weights into all engines, as the next version."""
        chunks, manifest = self.trainer.export(self.config.engine_dtype)
        self.version += 1
        self.pool.update_weights(self.version, chunks, manifest)


# ------------------------------------------------------------------ opening and closing


@contextlib.contextmanager
def open_run(config: RunConfig, resume: Path | None) -> Iterator[Run]:
    """Open a run, new or resumed; at the end, however it comes, save what is whole and leave no process behind.

    Args:
        config: of the run.
        resume: directory of the run to continue, None to start one.

    Raises:
        ConfigError: what only the model or the data can show to be wrong.
    """
    _make_model(config)
    arch = read_architecture(config.model.path)
    _check_against_model(config, arch)
    tokenizer = _tokenizer(config.model.path)
    data = _load_data(config, tokenizer)
    reward = RewardRunner(
        load_reward(config.reward.path, config.reward.args),
        config.reward.args,
        concurrency=config.reward.concurrency,
        timeout_s=config.reward.timeout_s,
        on_error=config.reward.on_error,
    )
    found = checkpoint.complete(config.output_dir / "checkpoints") if resume else []
    newest = found[-1] if found else None
    state = checkpoint.loop_state(newest) if newest else None
    with contextlib.ExitStack() as stack:
        stack.callback(reward.close)
        ledger = stack.enter_context(_open_ledger(config, resume, data, state["step"] if state else 0))
        if resume:
            drop_evals_after(config.output_dir, state["step"] if state else -1)
        metrics = stack.enter_context(
            MetricLogger(
                config.output_dir,
                config=to_dict(config),
                name=config.run.name,
                wandb=config.logging.wandb,
                wandb_project=config.logging.wandb_project,
                tensorboard=config.logging.tensorboard,
                resume_step=None if not resume else state["step"] if state else -1,
            )
        )
        place = placement.place(config)
        stack.enter_context(
            ray_instance(
                address=config.ray.address,
                num_cpus=config.ray.num_cpus or place.ray_cpus,
                num_gpus=place.ray_gpus,
                object_store_mib=config.ray.object_store_mib,
                temp_dir=config.ray.temp_dir,
                logs=config.output_dir / "logs",
            )
        )
        stack.enter_context(_terminate_as_interrupt())
        started = time.perf_counter()
        pool, trainer = _start_actors(config, stack)
        packing = Packing(trainer.spec.layout, config.trainer.tokens_per_micro_batch)
        ahead = stack.enter_context(Ahead.of_run(config, arch.topk, pool, trainer, packing))
        run = Run(
            config=config,
            arch=arch,
            data=data,
            reward=reward,
            pool=pool,
            trainer=trainer,
            ledger=ledger,
            metrics=metrics,
            progress=Progress(None, "start", enabled=config.logging.progress),
            packing=packing,
            ahead=ahead,
            stop_token_ids=_stop_token_ids(config, tokenizer),
        )
        engines, ranks = config.rollout.engines, config.trainer.ranks
        run.say(f"{engines} engine(s) and {ranks} trainer rank(s) up in {time.perf_counter() - started:.0f} s")
        if state is not None and newest is not None:
            run.say(f"resuming after step {state['step']} from {newest}")
            _restore(run, newest, state)
        try:
            yield run
        except BaseException as error:
            _close_failed(run, error)
            raise
        finally:
            run.progress.close()


def _close_failed(run: Run, error: BaseException) -> None:
    """Save the last whole state if the trainer is there to do it, and note the outcome."""
    if run.whole and not isinstance(error, TrainerDied):
        try:
            run.save()
        except Exception as second:  # the first error is the one to report
            logger.warning("no checkpoint of step %d could be saved: %s", run.step, second)
    interrupted = isinstance(error, KeyboardInterrupt)
    run.ledger.finish(
        "interrupted" if interrupted else "failed", "" if interrupted else f"{type(error).__name__}: {error}"
    )
    where = f"step {run.saved_step}" if run.saved_step >= 0 else "the beginning (no checkpoint yet)"
    print(f"stopped after step {run.step}; --resume continues from {where}", file=sys.stderr)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's end of time) ends the run like Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_model(config: RunConfig) -> None:
    if (config.model.path / "config.json").is_file() or config.model.create is None:
        return
    module, _, function = config.model.create.partition(":")
    import importlib

    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        message = f"expected an importable module:function, came {config.model.create!r} ({error}); correct it."
        raise ConfigError("model.create", [Violation("model.create", message)]) from error
    make(path=config.model.path, **config.model.create_args)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def _rows(source: SourceSection) -> list[Row]:
    if source.jsonl is not None:
        return read_jsonl(source.jsonl, source.size)
    assert source.reasoning_gym is not None  # rl.config.rules
    assert source.size is not None
    assert source.seed is not None
    return reasoning_gym_rows(source.reasoning_gym, source.size, source.seed, source.args)


def _load_data(config: RunConfig, tokenizer: Any) -> Data:
    section, warmup = config.data, config.warmup
    encoding = {
        "template": section.prompt_template,
        "chat": section.chat,
        "max_prompt_tokens": section.max_prompt_tokens,
    }
    train_rows = _rows(section.train)
    solved_rows: list[Row] = []
    if warmup.steps:
        wanted = warmup.examples or warmup.steps * warmup.batch_size
        source = section.train.model_copy(update={"size": wanted, "seed": warmup.examples_seed})
        # A file has no generator to ask for other problems: the warm-up then learns the training problems' labels.
        solved_rows = _rows(source) if section.train.reasoning_gym else train_rows[:wanted]
    held_out = None
    digests = {"train": digest(train_rows)}
    if section.eval is not None:
        eval_rows = _rows(section.eval)
        seen = [*train_rows, *solved_rows]
        if shared := overlap(seen, eval_rows):
            print(f"data: {shared} of {len(eval_rows)} held-out problems are in the training data too; dropped")
        eval_rows = drop_overlap(seen, eval_rows)[: config.evaluation.prompts]
        digests["eval"] = digest(eval_rows)
        held_out = PromptDataset(eval_rows, tokenizer, shuffle=False, split="eval", **encoding)
    examples = (
        sft_examples(solved_rows, tokenizer, answer_template=warmup.answer_template, **encoding) if solved_rows else []
    )
    return Data(
        train=PromptDataset(train_rows, tokenizer, seed=config.run.seed, shuffle=section.shuffle, **encoding),
        held_out=held_out,
        warmup=examples,
        digests=digests,
    )


def _stop_token_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    ids = []
    for text in config.sampling.stop:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            message = f"expected texts that are one token of the model, {text!r} is {len(encoded)}; leave it out."
            raise ConfigError("sampling.stop", [Violation("sampling.stop", message)])
        ids.append(int(encoded[0]))
    return tuple(ids)


def parallel_layout(config: RunConfig) -> ParallelLayout:
    """The trainer's layout."""
    p = config.trainer.parallel
    return ParallelLayout(
        world=config.trainer.ranks, tp=p.tp, pp=p.pp, vpp=p.vpp if p.vpp > 1 else None, ep=p.ep, etp=p.etp, cp=p.cp
    )


def _check_against_model(config: RunConfig, arch: Architecture) -> None:
    """What only the model can show to be wrong, all at once."""
    p, violations = config.trainer.parallel, []

    def demand(ok: bool, path: str, message: str) -> None:
        if not ok:
            violations.append(Violation(path, message))

    chunks = p.pp * p.vpp
    demand(
        arch.layers % chunks == 0,
        "trainer.parallel.pp",
        f"pp*vpp = {chunks} must divide the model's {arch.layers} layers.",
    )
    demand(
        arch.heads % p.tp == 0 and arch.kv_heads % p.tp == 0,
        "trainer.parallel.tp",
        f"must divide {arch.heads} attention heads and {arch.kv_heads} key/value heads, came {p.tp}.",
    )
    if arch.is_moe:
        demand(arch.experts % p.ep == 0, "trainer.parallel.ep", f"must divide {arch.experts} experts, came {p.ep}.")
    else:
        demand(p.ep == 1 and p.etp == 1, "trainer.parallel.ep", "a dense model has no experts; set ep and etp to 1.")
        demand(
            not config.rollout.capture_routes, "rollout.capture_routes", "a dense model has no routes; set it to false."
        )
    demand(
        config.rollout.max_model_len <= arch.max_positions,
        "rollout.max_model_len",
        f"the model is made for {arch.max_positions} positions, came {config.rollout.max_model_len}; lower it.",
    )
    if violations:
        raise ConfigError(str(config.model.path), violations)


def _open_ledger(config: RunConfig, resume: Path | None, data: Data, step: int) -> Ledger:
    common: dict[str, Any] = {
        "config": to_dict(config),
        "versions": versions.collect(),
        "topology": placement.place(config).to_dict(),
        "data_digests": data.digests,
    }
    if resume:
        return Ledger.resume(config.output_dir, checkpoint_step=step, allow_changes=config.allow_changes, **common)
    return Ledger.create(config.output_dir, seeds={"run": config.run.seed}, **common)


def _start_actors(config: RunConfig, stack: contextlib.ExitStack) -> tuple[EnginePool, Trainer]:
    """Engines and trainer ranks come up side by side; when one fails, the other is ended."""

    def start_pool() -> EnginePool:
        pool = EnginePool(_engine_config(config), config.rollout.engines)
        stack.callback(pool.stop)
        return pool

    def start_trainer() -> Trainer:
        limits = config.run.limits
        trainer = Trainer(
            _trainer_spec(config),
            backend=config.trainer.backend,
            limits=TrainerLimits(limits.actor_start_s, limits.train_step_s, limits.checkpoint_s, limits.generate_s),
        )
        stack.callback(trainer.stop)
        return trainer

    with ThreadPoolExecutor(2) as threads:
        starting_pool, starting_trainer = threads.submit(start_pool), threads.submit(start_trainer)
        pool, trainer = starting_pool.result(), starting_trainer.result()
    trainer.connect(pool.handles)
    return pool, trainer


def _engine_config(config: RunConfig) -> EngineConfig:
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
        capture_routes=r.capture_routes,
        max_regenerations=r.max_regenerations,
        start_timeout_s=limits.engine_start_s,
        generate_timeout_s=limits.generate_s,
        update_timeout_s=limits.weight_update_s,
        allow_untested=config.allow_untested,
    )


def _trainer_spec(config: RunConfig) -> TrainerSpec:
    t = config.trainer
    o = t.optimizer
    return TrainerSpec(
        model_path=str(config.model.path.absolute()),
        layout=parallel_layout(config),
        dtype=config.model.dtype,
        recompute=Recompute(t.recompute, t.recompute_modules),
        distributed_optimizer=t.distributed_optimizer,
        optimizer=OptimizerSpec(
            lr=o.lr,
            min_lr=o.min_lr,
            warmup_steps=o.warmup_steps,
            decay_steps=o.decay_steps or 0,
            schedule=o.schedule,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip_grad=o.clip_grad,
        ),
        reference=config.keeps_reference,
        seed=config.run.seed,
        collective_s=config.run.limits.collective_s,
        balance=(
            config.balance.settings(config.output_dir, allow_untested=config.allow_untested)
            if config.balance.enabled
            else None
        ),
        reorder=config.balance.enabled and config.balance.reorder,
    )


def _restore(run: Run, newest: Path, state: dict[str, Any]) -> None:
    reference = run.directory / "checkpoints" / "reference"
    run.trainer.load(newest, reference if run.config.keeps_reference else None)
    run.trainer.steps = state["optimizer_steps"]
    run.step = run.saved_step = state["step"]
    run.cursor = Cursor.from_json(state["cursor"])
    run.version = state["version"]
    run.ahead.restore(state.get("experts", {}), run.trainer.reorder)
    run.update_engines()
