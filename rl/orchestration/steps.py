"""The training half of an iteration: passes, optimizer steps, and what is written down about them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from megatron_ultraep.replay import RoutingTrace, TraceSample
from megatron_ultraep.telemetry.metrics import merge_groups
from rl.ledger import StepRecord
from rl.orchestration.ahead import Moved, Pass, Passes, merged_for_ledger, merged_metrics
from rl.orchestration.critic import critic_metrics, train_critic
from rl.orchestration.experience import policy_loss_config
from rl.orchestration.setup import Run
from rl.training.batch import MiniBatch, TrainSample
from rl.training.group import StepOutcome
from rl.training.worker import PolicyObjective
from rl.types import Prompt, Sample

LogProbs = Mapping[str, np.ndarray]


class RouteMismatch(RuntimeError):
    """A router consumed other routes than rollout captured; names sample and layer."""


@dataclass
class Trained:
    """What the optimizer steps of an iteration did; ``ahead``: for the ledger, what was planned before them."""

    metrics: dict[str, float] = field(default_factory=dict)
    optimizer_steps: int = 0
    ahead: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def moving(run: Run) -> Iterator[Callable[[], Moved]]:
    """Experts move while engines generate, if homes are chosen by the iteration before; yields how to wait for it.

    Waits at the end, also of a failed rollout: nothing else may be asked of the trainer while experts move.
    """
    balance, begun = run.config.balance, None
    if balance.reorder_by == "previous" and run.step % balance.reorder_every == 0:
        begun = run.ahead.begin_reorder(run.trainer.reorder)
    try:
        yield lambda: Moved() if begun is None else begun.result()
    finally:
        if begun is not None:
            with run.phase("reorder"):
                begun.exception()  # raised by whoever asks for the result


def prepare(run: Run, samples: Sequence[TrainSample], moved: Moved, *, plan_old: bool = True) -> Passes:
    """What can be done before the first pass, since every route is known: experts move; layouts and plans begin.

    Args:
        run: the run.
        samples: of the iteration.
        moved: during rollout.
        plan_old: whether there is a pass for old log-probs over all samples; False: it ran, or runs, in parts.
    """
    balance, algorithm, batches = run.config.balance, run.config.algorithm, schedule(run, len(samples))
    of_epoch = batches[: algorithm.mini_batches]
    if balance.reorder_by == "previous":
        run.ahead.remember(samples, of_epoch)
    elif balance.reorder and run.step % balance.reorder_every == 0:
        with run.phase("reorder"):
            moved = run.ahead.reorder(samples, of_epoch, run.trainer.reorder)
    return Passes(
        run.ahead,
        samples,
        batches,
        replay_old=mode_of(run, algorithm.routes.old_logprob) == "replay",
        replay_train=mode_of(run, algorithm.routes.train) == "replay",
        recompute_old=plan_old and algorithm.old_logprobs == "recompute",
        moved=moved,
    )


def schedule(run: Run, count: int) -> list[np.ndarray]:
    """Indices of the samples of every optimizer step of the iteration, of all epochs.

    Several mini-batches see the samples in an order of their own each epoch, the same after a resume.
    """
    algorithm, batches = run.config.algorithm, []
    for epoch in range(algorithm.epochs_per_batch):
        shuffle = np.random.Generator(np.random.PCG64([run.config.run.seed, run.step, epoch]))
        order = shuffle.permutation(count) if algorithm.mini_batches > 1 else np.arange(count)
        batches += np.array_split(order, min(algorithm.mini_batches, count))
    return batches


def old_and_reference(
    run: Run, samples: Sequence[TrainSample], passes: Passes, offset: int = 0
) -> tuple[LogProbs | None, LogProbs | None, dict[str, float]]:
    """Log-probs under the weights before this iteration's updates, and under the reference; None where not needed.

    With them, how many rows those weights would have routed otherwise than rollout did, if routes were replayed.
    ``offset`` micro-batches of these passes ran before, on other samples of the iteration.
    """
    algorithm = run.config.algorithm
    old = reference = None
    metrics: dict[str, float] = {}
    if algorithm.old_logprobs == "recompute":
        planned = wait_for(run, passes.old)
        with run.phase("old_logprob"):
            old, report = run.trainer.logprobs(
                MiniBatch.make(samples, planned.layout),
                "actor",
                "old_logprob",
                routes=mode_of(run, algorithm.routes.old_logprob),
                settings=run.settings(),
                plans=planned.plans,
                first_micro_batch=offset,
            )
        if report.rows:
            metrics["moe/own_routes_differ_fraction"] = report.differing / report.rows
    if run.config.keeps_reference:
        # In fused training the actor's first mini-batch waits for its own only: the others' are taken beside training.
        fused = run.fused is not None and run.fused.partner == "reference"
        now = [samples[i] for i in passes.batches[0]] if fused else samples
        with run.phase("reference"):
            reference, _ = run.trainer.logprobs(
                run.packing_of("reference").mini_batch(now),
                "reference",
                "old_logprob",
                routes=mode_of(run, algorithm.routes.reference),
                settings=run.settings(),
                first_micro_batch=offset,
            )
    return old, reference, metrics


def compare_own_routes(run: Run, samples: Sequence[TrainSample]) -> dict[str, float]:
    """Every so often: how far log-probs are from rollout's when training's own routers choose."""
    every = run.config.algorithm.routes.compare_own_every
    if not run.arch.is_moe or not every or run.step % every:
        return {}
    with run.phase("compare_own_routes"):
        own, _ = run.trainer.logprobs(
            run.packing.mini_batch(samples), "actor", "eval", routes="own", settings=run.settings()
        )
    difference, kl = _from_rollout(samples, own)
    return {"train/rollout_logprob_abs_diff_own_routes": difference, "train/rollout_kl_own_routes": kl}


def train(run: Run, captured: Sequence[Sample], samples: Sequence[TrainSample], passes: Passes) -> Trained:
    """All optimizer steps of an iteration.

    Args:
        captured: the samples as rollout gave them.
        samples: the same with advantages.
        passes: from :func:`prepare`.

    Raises:
        RouteMismatch: see there.
    """
    algorithm = run.config.algorithm
    mode = mode_of(run, algorithm.routes.train)
    objective = PolicyObjective(policy_loss_config(run.config), run.settings(with_entropy=True), mode)
    tally, samples = Tally(), list(samples)
    for number, chosen in enumerate(passes.batches):
        mine = [samples[i] for i in chosen]
        following = [] if number + 1 == len(passes.batches) else passes.batches[number + 1]
        missing = [i for i in following if needs_reference(run, samples[i])]
        fused = run.fused if not run.critic_warms_up else None
        if run.config.critic is not None and fused is None:
            tally.add_critic(train_critic(run, mine))
        if run.critic_warms_up:
            continue
        planned = wait_for(run, partial(passes.training, number))
        if fused is not None and fused.partner == "critic":
            both = fused.with_critic(run, mine, planned, objective)
            outcome = both.learnt["actor"]
            tally.add_critic(both.learnt["critic"])
        elif fused is not None and missing:
            both = fused.with_reference(run, mine, planned, objective, [samples[i] for i in missing])
            outcome = both.learnt["actor"]
            for i in missing:
                samples[i] = replace(samples[i], ref_logprobs=both.logprobs["reference"][samples[i].sample_id])
        else:
            outcome = run.trainer.train(MiniBatch.make(mine, planned.layout), objective, plans=planned.plans)
        if mode == "replay":
            check_digests(captured, outcome.digests)
        tally.add(outcome)
    return tally.trained(run, [passes])


def needs_reference(run: Run, sample: TrainSample) -> bool:
    """Whether its loss needs log-probs of the reference that have not been taken yet."""
    return run.config.keeps_reference and sample.ref_logprobs is None


class Tally:
    """Adds up what the optimizer steps of an iteration did."""

    def __init__(self) -> None:
        self.outcomes: list[StepOutcome] = []
        self.of_critic: list[StepOutcome] = []

    def add(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)

    def add_critic(self, outcome: StepOutcome) -> None:
        self.of_critic.append(outcome)

    def trained(self, run: Run, passes: Sequence[Passes]) -> Trained:
        """Metrics of the iteration.

        Args:
            run: whose iteration.
            passes: all that were prepared for it.
        """
        if not self.outcomes:
            return Trained(critic_metrics(self.of_critic), 0, merged_for_ledger(passes))
        sums: dict[str, float] = {}
        for outcome in self.outcomes:
            for name, value in outcome.sums.items():
                sums[name] = sums.get(name, 0.0) + value
        tokens, first = sum(outcome.tokens for outcome in self.outcomes), self.outcomes[0]
        metrics = {f"train/{name}": value / max(1, tokens) for name, value in sums.items()}
        if run.config.algorithm.old_logprobs == "rollout":
            # Later mini-batches are under other weights than the samples: only the first shows the engines' mismatch.
            for name in ("rollout_logprob_abs_diff", "rollout_kl"):
                metrics[f"train/{name}"] = first.sums.get(name, 0.0) / max(1, first.tokens)
            if first.route_rows:
                metrics["moe/own_routes_differ_fraction"] = first.differing / first.route_rows
        balanced = merge_groups([outcome.balance for outcome in self.outcomes if outcome.balance])
        balanced.pop("moe/max_vio", None)  # the one of rollout's samples has the same meaning without balancing
        metrics |= balanced | merged_metrics(passes)
        metrics |= {
            "train/loss": float(np.mean([outcome.loss for outcome in self.outcomes])),
            "train/grad_norm": float(np.mean([outcome.grad_norm for outcome in self.outcomes])),
            "train/lr": self.outcomes[-1].lr,
            "train/optimizer_steps": float(run.trainer.steps),
            **critic_metrics(self.of_critic),
        }
        ahead = merged_for_ledger(passes)
        if run.fused is not None and (fused := run.fused.to_json()):
            ahead["fused"] = fused
            metrics |= run.fused.metrics()
        return Trained(metrics, len(self.outcomes), ahead)


def record(
    run: Run, prompts: Sequence[Prompt], samples: Sequence[Sample], trained: Trained, metrics: Mapping[str, float]
) -> None:
    """Make the iteration a fact: its line in the ledger, then its metrics.

    Raises:
        RuntimeError: dynamic sampling is asked for, and the batch was not filled by it.
    """
    filled, extra = run.feed.filled, {"optimizer_steps": trained.optimizer_steps, **trained.ahead}
    if filled is not None:
        extra["dynamic_sampling"] = filled.to_json()
        metrics = {**metrics, **filled.metrics()}
    elif run.config.algorithm.dynamic_sampling.enabled:
        raise RuntimeError(
            "algorithm.dynamic_sampling is enabled, but the feed of this run was made without max_rounds"
        )
    run.ledger.append(
        StepRecord(
            step=run.step,
            weight_version=run.version,
            epoch=prompts[0].epoch,
            consumed=tuple((p.epoch, p.ordinal) for p in prompts),
            sample_ids=tuple(s.sample_id for s in samples),
            route_digests={s.sample_id: short_digest(s.route_digests) for s in samples if s.route_digests is not None},
            rewards={n.removeprefix("rollout/"): v for n, v in metrics.items() if n.startswith("rollout/reward")},
            timings=dict(run.seconds),
            extra=extra,
        )
    )
    run.metrics.log(run.step, metrics)


def save_trace(run: Run, samples: Sequence[Sample]) -> None:
    """Every so often, write the routes of an iteration's samples to a file; see ``megatron_ultraep.replay.trace``.

    The one place where rows of routes come to the driver, since it is the one that writes the file.
    """
    every = run.config.logging.traces_every
    routed = [s for s in samples if s.routes is not None]
    if not every or run.step % every or not routed:
        return
    arrays = ray.get([s.routes.handle for s in routed if s.routes], timeout=run.config.run.limits.generate_s)
    path = run.directory / "traces" / f"step_{run.step + 1:05d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    RoutingTrace(
        experts=run.arch.experts,
        moe_layers=len(run.arch.moe_layers),
        topk=run.arch.topk,
        samples=tuple(
            TraceSample(s.sample_id, s.routes.of(array), s.prompt_length, _row_spans(s))
            for s, array in zip(routed, arrays, strict=True)
            if s.routes
        ),
        model=asdict(run.arch),
    ).save(path)


def _row_spans(sample: Sample) -> tuple[tuple[int, int], ...]:
    """Weight versions by row instead of by response token: row P-1+i was computed with response token i."""
    first, *later = sample.weight_versions
    return ((0, first[1]), *((sample.prompt_length - 1 + token, version) for token, version in later))


def short_digest(layers: np.ndarray) -> str:
    """16 hex digits over the per-layer digests of one sample."""
    return hashlib.blake2b(layers.astype("<u8").tobytes(), digest_size=8).hexdigest()


def wait_for(run: Run, take: Callable[[], Pass]) -> Pass:
    """A pass that is prepared in the background; what is waited for it is a phase of its own."""
    with run.phase("prepare"):
        return take()


def mode_of(run: Run, wanted: str) -> str:
    return wanted if run.arch.is_moe else "own"


def check_digests(captured: Sequence[Sample], consumed: Mapping[str, np.ndarray]) -> None:
    expected = {s.sample_id: s.route_digests for s in captured}
    for sample_id, digests in consumed.items():
        wanted = expected[sample_id]
        if wanted is None or not np.array_equal(wanted, digests):
            layers = [] if wanted is None else np.nonzero(wanted != digests)[0].tolist()
            raise RouteMismatch(
                f"sample {sample_id}: the routes that routers consumed are not the captured ones in MoE layers {layers}"
            )


def _from_rollout(samples: Sequence[TrainSample], logprobs: LogProbs) -> tuple[float, float]:
    """How far log-probs are from rollout's: mean |difference|, and the KL (estimator k3), nats per token."""
    total, kl, tokens = 0.0, 0.0, 0
    for sample in samples:
        if sample.rollout_logprobs is None:
            continue
        difference = (logprobs[sample.sample_id] - sample.rollout_logprobs)[sample.loss_mask].astype(np.float64)
        total += float(np.abs(difference).sum())
        kl += float((np.expm1(difference) - difference).sum())
        tokens += len(difference)
    return total / max(1, tokens), kl / max(1, tokens)
