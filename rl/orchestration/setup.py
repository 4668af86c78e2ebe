"""Everything a run holds while it runs: data, engines, trainer, ledger, metrics; opened and closed in one place."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultraep.runtime import ranges
from rl import placement, versions
from rl.config import RunConfig, to_dict
from rl.config.fused_training import fused_partner
from rl.data.dataset import Cursor
from rl.evaluation import drop_evals_after
from rl.ledger import Ledger
from rl.metrics import MetricLogger
from rl.models.architecture import Architecture
from rl.orchestration.actors import start_actors, start_service
from rl.orchestration.ahead import Ahead
from rl.orchestration.elastic import Elastic
from rl.orchestration.experience import Packing, with_length
from rl.orchestration.feed import Feed
from rl.orchestration.fit import check_model
from rl.orchestration.fused import FusedTraining
from rl.orchestration.inputs import Data, load_data, load_tokenizer, make_model, stop_token_ids
from rl.orchestration.ray_instance import ray_instance
from rl.orchestration.staleness import StalenessAccountant
from rl.orchestration.transfer import WeightTransfer, send_weights
from rl.progress import Progress
from rl.rewards.loading import load_reward
from rl.rewards.runner import RewardRunner
from rl.rollout.config import Sampling
from rl.rollout.latency import LatencyProfile
from rl.rollout.pool import EnginePool
from rl.rollout.service import GenerationService
from rl.rollout.streams import GroupStream
from rl.timeline import TRAINER, Timeline
from rl.training import checkpoint
from rl.training.group import Trainer, TrainerDied
from rl.training.passes import PassSettings
from rl.types import Prompt

if TYPE_CHECKING:
    from rl.orchestration.tail import Tail

logger = logging.getLogger(__name__)

# Phases in which trainer ranks work; in the others they wait.
TRAINER_PHASES = frozenset(
    {
        "old_logprob",
        "reference",
        "values",
        "reward_model",
        "train",
        "train_critic",
        "compare_own_routes",
        "reorder",
        "export",
        "offload",
    }
)


@dataclass
class Run:
    """The parts of a running run, and how far it is.

    Attributes:
        step: completed iterations.
        cursor: next prompt to take.
        ahead: plans iterations before they run, and knows where experts are.
        service: generates with the engines of ``pool``.
        transfer: brings the trainer's weights to engines.
        timeline: what everybody did when.
        updating: the newest weight update, until somebody waited for it.
        ahead_of_training: batches start as soon as weights allow; not before the loop begins.
        fused: runs the actor's steps together with its partner's work; None: nothing is fused.
        tail: says when the tail of a batch is gathered, and runs passes beside it; None: nothing is.
        turn: who has the GPUs of a colocated run.
        memory_gib: most GiB in use on a GPU in each one's turns (of a process, on CPU); colocated only.
        transfer_seconds: that the last update took, from when it was sent to when the last engine had it.
        version: weight version of the engines.
        whole: whether the trainer's state is that of ``step``: False from the moment an iteration begins to train.
        saved_step: newest checkpoint, -1 when there is none.
    """

    config: RunConfig
    arch: Architecture
    data: Data
    reward: RewardRunner
    pool: EnginePool
    service: GenerationService
    transfer: WeightTransfer
    timeline: Timeline
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
    updating: Future[None] | None = None
    ahead_of_training: bool = False
    elastic: Elastic | None = None
    tail: Tail | None = None
    turn: Literal["engines", "trainer"] = "trainer"
    memory_gib: dict[str, float] = field(default_factory=dict)
    transfer_seconds: float = 0.0
    _feed: Feed | None = None
    _profile: LatencyProfile | None = None

    @property
    def directory(self) -> Path:
        return self.config.output_dir

    @property
    def sampling(self) -> Sampling:
        """How training responses are drawn."""
        s = self.config.sampling
        return Sampling(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=s.forced_lengths is not None,
        )

    stop_token_ids: tuple[int, ...] = ()
    fused: FusedTraining | None = None

    def packing_of(self, model: str) -> Packing:
        """How samples become micro-batches of a model with a layout of its own."""
        return Packing(self.trainer.spec.layout_of(model), self.packing.tokens_per_micro_batch)

    @property
    def critic_warms_up(self) -> bool:
        """Whether the critic learns alone in the iteration that comes or runs."""
        return self.config.critic is not None and self.step < self.config.critic.warmup_steps

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
        return iterations(self.config, self.data)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of an iteration and show it."""
        self.progress.phase(name)
        began, started = time.time(), time.perf_counter()
        try:
            with ranges.span(name):
                yield
        finally:
            seconds = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if name in TRAINER_PHASES:
                self.timeline.span(TRAINER, name, began, began + seconds, {"step": self.step + 1})

    def say(self, text: str) -> None:
        """A line for whoever watches, above the bar if there is one."""
        if self.config.logging.progress:
            self.progress.note(text)

    def save(self) -> None:
        """Checkpoint the state after ``step``: weights, optimizer, random state, cursor."""
        if self.saved_step == self.step:
            return
        self.trainer_turn(keep_weights=True)
        partial = checkpoint.begin(self.directory / "checkpoints", self.step)
        self.trainer.save(partial, optimizer=self.config.checkpoint.save_optimizer)
        state = {
            "step": self.step,
            "cursor": self.cursor.to_json(),
            "version": self.version,
            "optimizer_steps": self.trainer.steps,
            "critic_steps": self.trainer.critic_steps,
            "experts": self.ahead.to_json(),
            "predictor": self.service.predictor.to_json() if self.service.predictor is not None else None,
        }
        checkpoint.publish(partial, state, keep=self.config.checkpoint.keep)
        self.saved_step = self.step

    @property
    def feed(self) -> Feed:
        """Batches under way; begins with the next prompt when it is first asked for."""
        if self._feed is None:
            config, sampling = self.config, self.config.algorithm.dynamic_sampling
            self._feed = Feed(
                self.data.train,
                self.cursor,
                size=config.data.prompts_per_step,
                total=min(self.prompts_left(), (self.total_steps() - self.step) * config.data.prompts_per_step),
                generate=self._generate,
                reward=self.reward,
                accountant=StalenessAccountant(config.stream.staleness, self.step),
                limit_s=config.run.limits.generate_s,
                max_rounds=sampling.max_rounds if sampling.enabled else None,
            )
        return self._feed

    def _generate(self, prompts: Sequence[Prompt]) -> GroupStream:
        config = self.config
        forced = config.sampling.forced_lengths
        if forced is not None:
            prompts = [with_length(p, forced.median, forced.sigma, config.sampling.max_tokens) for p in prompts]
        return self.service.generate(
            prompts,
            config.data.samples_per_prompt,
            self.sampling,
            config.run.seed,
            buffer_groups=config.stream.buffer_groups or None,
            tail=self.tail.rule() if self.tail is not None else None,
        )

    def update_engines(self) -> None:
        """The trainer's weights into all engines, as the next version.

        Synchronous runs wait until every engine has them. Others go on: batches that these weights allow start when
        they have arrived, and what went wrong is raised by :meth:`check_updates`.
        """
        send_weights(self)

    def keep_engines(self) -> None:
        """Engines have the weights of this step already, for the actor did not learn in it."""
        self.updated()
        self.feed.delivered(self.version, self.step)
        if self.ahead_of_training:
            self.feed.admit()

    def trainer_turn(self, keep_weights: bool = False) -> None:
        """Colocated: engines sleep, and the trainer comes back to the GPUs. Otherwise nothing.

        Args:
            keep_weights: engines will go on with the weights they have.
        """
        if self.config.stream.colocated and self.turn == "engines":
            with self.phase("offload"):
                self._note_memory("generate")
                self.pool.sleep(keep_weights)
                self.trainer.onload()
            self.turn = "trainer"

    def engines_turn(self) -> None:
        """Colocated: the trainer leaves the GPUs, and engines wake. Otherwise nothing."""
        if self.config.stream.colocated and self.turn == "trainer":
            with self.phase("offload"):
                self._note_memory("train")
                self.trainer.offload()
                self.pool.wake()
            self.turn = "engines"

    def _note_memory(self, turn: str) -> None:
        used = max(report.most_used for report in self.trainer.memory()) / 2**30
        self.memory_gib[turn] = max(used, self.memory_gib.get(turn, 0.0))

    def engine_slowdown(self) -> dict[str, float]:
        """How much longer steps of engines take than ``stream.latency_profile`` says; nothing without a profile, or
        while an engine comes or goes."""
        if self._profile is None and self.config.stream.latency_profile is not None:
            self._profile = LatencyProfile.load(self.config.stream.latency_profile)
        if self._profile is None:
            return {}
        try:
            slowdown = self._profile.slowdown(self.pool.step_times(self.service.engines).values())
        except (RuntimeError, TimeoutError) as error:
            logger.info("no step times of engines this time: %s", error)
            return {}
        return {} if slowdown is None else {"stream/engine_slowdown": slowdown}

    def check_updates(self) -> None:
        """Raise what the last update met, if it has ended."""
        if self.updating is not None and self.updating.done():
            self.updated()

    def updated(self) -> None:
        """Wait until all engines have the newest weights that were sent.

        Raises:
            EngineTimeout, TornWeights, WeightMismatch: see ``GenerationService.update``.
        """
        updating, self.updating = self.updating, None
        if updating is not None:
            limits = self.config.run.limits
            updating.result(limits.weight_update_s + limits.generate_s)

    def close_feed(self) -> None:
        """Abort what is generated ahead."""
        if self._feed is not None:
            self._feed.close()


def iterations(config: RunConfig, data: Data) -> int:
    """Of the whole run."""
    if config.run.steps is not None:
        return config.run.steps
    return math.ceil(config.run.epochs * len(data.train) / config.data.prompts_per_step)


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
    make_model(config)
    arch = check_model(config)
    tokenizer = load_tokenizer(config.model.path)
    data = load_data(config, tokenizer)
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
        pool, trainer = start_actors(config, iterations(config, data), stack)
        if config.stream.colocated:
            pool.sleep()  # the trainer has the first turn
        timeline = Timeline(config.output_dir / "timeline.json" if config.stream.timeline else None)
        transfer = WeightTransfer(config, pool, trainer, timeline.span)
        stack.callback(transfer.close)
        service = start_service(config, transfer.engines, timeline, stack)
        packing = Packing(trainer.spec.layout, config.trainer.tokens_per_micro_batch)
        ahead = stack.enter_context(Ahead.of_run(config, arch.topk, pool, trainer, packing))
        run = Run(
            config=config,
            arch=arch,
            data=data,
            reward=reward,
            pool=pool,
            service=service,
            transfer=transfer,
            timeline=timeline,
            trainer=trainer,
            ledger=ledger,
            metrics=metrics,
            progress=Progress(None, "start", enabled=config.logging.progress),
            packing=packing,
            ahead=ahead,
            stop_token_ids=stop_token_ids(config, tokenizer),
        )
        stack.callback(run.close_feed)
        run.fused = FusedTraining.of_run(config, arch, trainer.spec)
        if run.fused is not None:
            stack.enter_context(run.fused)
        engines, ranks = config.rollout.engines, config.trainer.ranks
        run.say(f"{engines} engine(s) and {ranks} trainer rank(s) up in {time.perf_counter() - started:.0f} s")
        run.say(f"fused training: {fused_partner(config)}")
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


def _restore(run: Run, newest: Path, state: dict[str, Any]) -> None:
    reference = run.directory / "checkpoints" / "reference"
    run.trainer.load(newest, reference if run.config.keeps_reference else None)
    run.trainer.steps = state["optimizer_steps"]
    run.trainer.critic_steps = state.get("critic_steps", 0)
    run.step = run.saved_step = state["step"]
    run.cursor = Cursor.from_json(state["cursor"])
    run.version = state["version"]
    run.ahead.restore(state.get("experts", {}), run.trainer.reorder)
    if run.service.predictor is not None and state.get("predictor") is not None:
        run.service.predictor.restore(state["predictor"])
    run.update_engines()
    run.updated()
