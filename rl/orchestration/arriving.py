"""Training on groups as they arrive (StreamRL's dynamic-batch pipelining, arXiv:2504.15930, section 4.1).

A mini-batch is a fixed set of prompts. Its groups train in chunks, each as soon as enough has come to fill the ranks;
gradients add up, and the optimizer steps once when the set is complete, normalised by what it really held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rl.orchestration.ahead import Moved, Passes
from rl.orchestration.critic import value_objective, values_of, with_model_scores
from rl.orchestration.experience import policy_loss_config, rewarded, train_samples, with_advantages
from rl.orchestration.feed import Batch
from rl.orchestration.setup import Run
from rl.orchestration.steps import (
    Tally,
    Trained,
    check_digests,
    compare_own_routes,
    mode_of,
    old_and_reference,
    wait_for,
)
from rl.training.batch import Counts, MiniBatch, TrainSample
from rl.training.spec import MODELS
from rl.training.worker import PolicyObjective
from rl.types import Prompt, Sample


@dataclass
class Arrived:
    """What an iteration trained on, and how.

    Attributes:
        samples: all, in the order of prompts.
        usable: those with a reward.
        trained: the optimizer steps.
        metrics: of advantages, routes and chunks.
    """

    samples: list[Sample] = field(default_factory=list)
    usable: list[Sample] = field(default_factory=list)
    trained: Trained = field(default_factory=Trained)
    metrics: dict[str, float] = field(default_factory=dict)


def train_arriving(run: Run, batch: Batch, moved: Moved) -> Arrived:
    """One iteration on a batch that is still being generated.

    Raises:
        RouteMismatch, RefusedSamples: see there; the open set is dropped.
    """
    found, tally, passes = Arrived(), Tally(), _Chunks(run, moved)
    sums: dict[str, float] = {}
    for prompts in _sets(batch.prompts, run.config.algorithm.mini_batches):
        _train_set(run, batch, prompts, found, tally, passes, sums)
    order = {prompt.uid: i for i, prompt in enumerate(batch.prompts)}
    found.samples.sort(key=lambda s: (order[s.prompt.uid], _number(s)))
    found.usable.sort(key=lambda s: (order[s.prompt.uid], _number(s)))
    found.trained = tally.trained(run, passes.made)
    if run.config.balance.reorder_by == "previous" and found.usable:
        every = train_samples(found.usable)
        steps = max(1, len(tally.outcomes), len(tally.of_critic))
        run.ahead.remember(every, np.array_split(np.arange(len(every)), steps))
    chunks = max(1, len(passes.made))
    found.metrics = {name: value / (1 if name in _COUNTS else chunks) for name, value in sums.items()}
    found.metrics["stream/chunks"] = float(len(passes.made))
    return found


# Metrics that add up over chunks; others are means over them.
_COUNTS = frozenset(f"train/{name}" for name in ("groups", "single_groups", "equal_groups", "degenerate_groups"))


class _Chunks:
    """Prepares the passes of each chunk and counts micro-batches of passes that several chunks share."""

    def __init__(self, run: Run, moved: Moved) -> None:
        self.run, self.moved = run, moved
        self.made: list[Passes] = []
        self.offset = 0

    def passes(self, given: Sequence[TrainSample]) -> Passes:
        routes, algorithm = self.run.config.algorithm.routes, self.run.config.algorithm
        self.made.append(
            Passes(
                self.run.ahead,
                given,
                [np.arange(len(given))],
                replay_old=mode_of(self.run, routes.old_logprob) == "replay",
                replay_train=mode_of(self.run, routes.train) == "replay",
                recompute_old=algorithm.old_logprobs == "recompute",
                moved=self.moved,
            )
        )
        return self.made[-1]


def _train_set(
    run: Run,
    batch: Batch,
    prompts: Sequence[Prompt],
    found: Arrived,
    tally: Tally,
    chunks: _Chunks,
    sums: dict[str, float],
) -> None:
    """One optimizer step on the groups of some prompts."""
    config = run.config
    per_prompt = config.data.samples_per_prompt
    estimate = Counts(len(prompts) * per_prompt * config.sampling.max_tokens, len(prompts) * per_prompt)
    mode = mode_of(run, config.algorithm.routes.train)
    loss = policy_loss_config(config)
    objective = PolicyObjective(loss, run.settings(with_entropy=True), mode)
    first, captured = True, []
    arriving = batch.chunks(prompts, chunk_tokens(run))
    chunks.offset = 0
    try:
        while True:
            with run.phase("generate"):
                samples = next(arriving, None)
            if samples is None:
                break
            found.samples += samples
            usable = rewarded(samples)
            if not usable:
                continue
            usable, of_scores = with_model_scores(run, usable, chunks.offset)
            run.whole = False
            found.usable += usable
            given = train_samples(usable)
            passes = chunks.passes(given)
            old, reference, metrics = old_and_reference(run, given, passes, chunks.offset)
            values = values_of(run, given, chunks.offset)
            chunks.offset += max(run.packing_of(model).layout_of(given).num_microbatches for model in MODELS)
            if len(chunks.made) == 1:
                metrics |= compare_own_routes(run, given)
            given, of_advantages = with_advantages(usable, given, config, old, reference, values)
            for name, value in (metrics | of_scores | of_advantages).items():
                sums[name] = sums.get(name, 0.0) + value
            if values is not None:
                part = MiniBatch.make(
                    given, run.packing_of("critic").layout_of(given), estimate.tokens, estimate.sequences
                )
                with run.phase("train_critic"):
                    run.trainer.accumulate(part, value_objective(run), first=first, model="critic")
            if not run.critic_warms_up:
                planned = wait_for(run, partial(passes.training, 0))
                part = MiniBatch.make(given, planned.layout, estimate.tokens, estimate.sequences)
                with run.phase("train"):
                    run.trainer.accumulate(part, objective, plans=planned.plans, first=first)
            first = False
            captured += usable
        if first:
            return  # no sample of these prompts has a reward
        if config.critic is not None:
            with run.phase("train_critic"):
                scale = estimate.scale("token_mean", run.trainer.accumulated("critic"))
                tally.add_critic(run.trainer.apply(scale, model="critic"))
        if run.critic_warms_up:
            return
        with run.phase("train"):
            scale = estimate.scale(loss.aggregation, run.trainer.accumulated())
            outcome = run.trainer.apply(scale)
    except BaseException:
        if not first:
            run.trainer.discard()
        raise
    if mode == "replay":
        check_digests(captured, outcome.digests)
    tally.add(outcome)


def chunk_tokens(run: Run) -> int:
    """Tokens that fill one micro-batch on every data-parallel rank, of every pipeline stage; or what the run says."""
    wanted = run.config.stream.chunk_tokens
    return wanted or run.config.trainer.tokens_per_micro_batch * run.packing.layout.dp * run.packing.layout.pp


def _sets(prompts: Sequence[Prompt], count: int) -> list[list[Prompt]]:
    return [[prompts[i] for i in part] for part in np.array_split(np.arange(len(prompts)), min(count, len(prompts)))]


def _number(sample: Sample) -> int:
    return int(sample.sample_id.rsplit("/", 1)[1])
