"""Inference beside the tail of generation (RLHFuse): passes over finished samples while the last ones are generated.

    run.tail = Tail.of_run(config, pool.info, layout)
    stream = service.generate(..., tail=run.tail.rule())    # gathers the tail when few samples are left
    inferred = infer_beside(run, batch, moved)              # in place of waiting for the batch
    finish_inference(run, samples, inferred)                # the rest; nothing is computed twice
    inferred.values["old_logprob"]

Passes before training's own (old log-probs, reference, values, the reward model's) read weights that do not change
while samples are generated, and treat every sample by itself: which samples share a chunk, and when it runs, changes
nothing but the order of sums.

When they run:

- Trainer ranks with devices of their own: whenever enough finished samples are there for a chunk.
- Colocated: once the tail is gathered, on the devices of freed engines, in blocks of ranks that make whole copies of
  each model (``blocks``); on CPUs, where memory is shared, on all ranks. What is left runs in the trainer's turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.config import RunConfig
from rl.orchestration.ahead import Moved
from rl.orchestration.arriving import chunk_tokens
from rl.orchestration.blocks import blocks_of, free_ranks, mini_batch_on
from rl.orchestration.critic import scored_sample
from rl.orchestration.feed import Batch
from rl.orchestration.steps import mode_of
from rl.rollout.engine import EngineInfo
from rl.rollout.latency import LatencyProfile
from rl.rollout.streams import TailReport
from rl.rollout.tail import TailRule, seats_within
from rl.simulation.generation import SimGroup
from rl.simulation.tail import InferenceCost
from rl.simulation.threshold import Choice, ThresholdChooser
from rl.training.batch import MiniBatch, TrainSample
from rl.training.passes import RouteReport
from rl.types import Sample

if TYPE_CHECKING:
    from rl.orchestration.setup import Run

_POLL_S = 0.05  # between looks at whether the tail has begun and at samples that came ahead of their groups


class Tail:
    """When the tail of each batch is gathered.

    Args:
        choose: the threshold of the next batch; a fixed one, or None where it is chosen from lengths.
        chooser: chooses it; None where it is fixed.
        rule: of a threshold and BS_max.
        block: trainer ranks of one copy of the model.
        engines: as many as devices.
    """

    def __init__(
        self,
        fixed: Choice | None,
        chooser: ThresholdChooser | None,
        rule: Callable[[int, int | None], TailRule],
        block: int,
        engines: int,
    ) -> None:
        self.choice = fixed or Choice(0, False, "no lengths have been seen yet")
        self._chooser, self._rule, self._block, self._engines = chooser, rule, block, engines

    @staticmethod
    def of_run(config: RunConfig, info: EngineInfo, layout: ParallelLayout) -> Tail | None:
        """None where no passes run in the tail."""
        section, stream, rollout = config.fuse.tail, config.stream, config.rollout
        if not section.enabled:
            return None
        profile = LatencyProfile.load(stream.latency_profile) if stream.latency_profile is not None else None
        options = [section.seats or rollout.max_num_seqs]
        if section.seats is None and profile is not None:
            options.append(seats_within(profile, rollout.max_num_seqs))
        cuda = rollout.device == "cuda"
        block = len(blocks_of(layout)[0]) if cuda else 1
        fixed, chooser = None, None
        if section.threshold != "auto":
            fixed = Choice(section.threshold, False, "fuse.tail.threshold says so")
        elif not stream.colocated:
            fixed = Choice(0, False, "trainer ranks have devices of their own: freed engines would stay idle")
        else:
            assert profile is not None  # rl.config.fusion_rules
            chooser = ThresholdChooser(
                engines=rollout.engines,
                seats=rollout.max_num_seqs,
                kv_tokens=info.kv_tokens,
                longest=config.longest_sample,
                profile=profile,
                tail_seats=options,
                window=section.window,
                drift=section.drift,
                margin=section.margin,
            )

        def rule(threshold: int, seats: int | None) -> TailRule:
            return TailRule(threshold, seats or min(options), info.kv_tokens, config.longest_sample)

        return Tail(fixed, chooser, rule, block, rollout.engines)

    def rule(self) -> TailRule | None:
        """For the batch that begins now; None: its tail is not gathered."""
        if self._chooser is not None:
            self.choice = self._chooser.choose()
        return self._rule(self.choice.threshold, self.choice.seats) if self.choice.threshold else None

    def observe(self, samples: Sequence[Sample], generate_seconds: float, inferred: Inferred) -> None:
        """A batch has been generated and inferred on; its lengths and costs count for later ones."""
        if self._chooser is None:
            return
        prompts: dict[str, list[Sample]] = {}
        for sample in samples:
            prompts.setdefault(sample.prompt.uid, []).append(sample)
        groups = [
            SimGroup(uid, i, 0, group[0].prompt_length, tuple(max(1, len(s.response_tokens)) for s in group))
            for i, (uid, group) in enumerate(prompts.items())
        ]
        cost = InferenceCost(inferred.seconds_per_token(self._engines), inferred.switch_seconds, self._block)
        self._chooser.observe(groups, generate_seconds, cost)


@dataclass(frozen=True)
class Work:
    """One pass over one chunk of samples; times in seconds of ``time.time()``.

    Attributes:
        name: of the pass.
        share: of the trainer's ranks that took part.
        tokens: of the samples.
    """

    name: str
    began: float
    ended: float
    share: float
    tokens: int


@dataclass
class Inferred:
    """What passes gave for a batch so far.

    Attributes:
        values: by pass, by sample id: ``[T]`` each, aligned with tokens.
        tokens: by pass, by sample id, the tokens that these are of.
        rows, differing: see ``RouteReport``; of old log-probs.
        micro_batches: by pass, how many it has run, so that no key is used twice.
        work: what ran when.
        report: of the tail; None: it was not gathered.
        switch_seconds: until freed devices had changed hands.
        batch_done: when the last sample had come, seconds of ``time.time()``; 0 until then.
    """

    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    tokens: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rows: int = 0
    differing: int = 0
    micro_batches: dict[str, int] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    report: TailReport | None = None
    switch_seconds: float = 0.0
    batch_done: float = 0.0

    def has(self, name: str, sample: TrainSample) -> bool:
        """Whether a pass has run on this very sample."""
        known = self.tokens.get(name, {}).get(sample.sample_id)
        return known is not None and np.array_equal(known, sample.tokens)

    @property
    def route_metrics(self) -> dict[str, float]:
        """How many rows the trainer's weights would have routed otherwise than rollout did, if routes were replayed."""
        return {"moe/own_routes_differ_fraction": self.differing / self.rows} if self.rows else {}

    def seconds_per_token(self, devices: int) -> float:
        """Of all passes together on one of so many devices, all of which are the trainer's when nothing else runs."""
        seconds: dict[str, float] = {}
        tokens: dict[str, int] = {}
        for one in self.work:
            seconds[one.name] = seconds.get(one.name, 0.0) + (one.ended - one.began) * one.share
            tokens[one.name] = tokens.get(one.name, 0) + one.tokens
        return devices * sum(seconds[name] / max(1, tokens[name]) for name in seconds)

    def metrics(self, choice: Choice) -> dict[str, float]:
        """Of the tail, under the names of ``rl.metrics``; call it when everything has been inferred."""
        report, done = self.report, self.batch_done
        before = sum(one.tokens for one in self.work if one.began < done)
        found = {
            "fuse/tail/threshold": float(choice.threshold),
            "fuse/tail/migrated_samples": float(report.moved if report else 0),
            "fuse/tail/kept_tokens": float(report.kept_tokens if report else 0),
            "fuse/tail/freed_engines": float(len(report.freed) if report else 0),
            "fuse/tail/seconds": max(0.0, done - report.began) if report else 0.0,
            "fuse/tail/hidden_seconds": sum(max(0.0, min(one.ended, done) - one.began) for one in self.work),
            "fuse/tail/hidden_fraction": before / max(1, sum(one.tokens for one in self.work)),
        }
        if choice.predicted_seconds is not None and choice.plain_seconds is not None:
            found["fuse/tail/predicted_saving_seconds"] = choice.plain_seconds - choice.predicted_seconds
        return found


@dataclass(frozen=True)
class InferencePass:
    """A forward pass over samples that training needs the results of.

    Attributes:
        name: of the phase, and of its results in ``Inferred.values``.
        model: that runs, one of ``rl.training.spec.MODELS``.
        run: the pass over a mini-batch; the number of its first micro-batch; the ranks that take part, None: all.
        given: what the model is given of a sample.
    """

    name: str
    model: str
    run: Callable[[MiniBatch, int, Sequence[int] | None], tuple[Mapping[str, np.ndarray], RouteReport]]
    given: Callable[[Sample], TrainSample] = TrainSample.from_sample


def inference_passes(run: Run) -> list[InferencePass]:
    """The passes of an iteration before training's own, in order."""
    config, found = run.config, []
    if config.algorithm.old_logprobs == "recompute":
        routes = config.algorithm.routes.old_logprob
        found.append(InferencePass("old_logprob", "actor", partial(_logprobs, run, "actor", routes)))
    if config.keeps_reference:
        routes = config.algorithm.routes.reference
        found.append(InferencePass("reference", "reference", partial(_logprobs, run, "reference", routes)))
    if config.critic is not None:
        found.append(InferencePass("values", "critic", partial(_values, run, "critic")))
    if config.reward.model is not None:
        found.append(InferencePass("reward_model", "scorer", partial(_values, run, "scorer"), scored_sample))
    return found


def _logprobs(
    run: Run, model: str, routes: str, batch: MiniBatch, first: int, ranks: Sequence[int] | None
) -> tuple[Mapping[str, np.ndarray], RouteReport]:
    return run.trainer.logprobs(
        batch,
        model,
        "old_logprob",
        routes=mode_of(run, routes),
        settings=run.settings(),
        first_micro_batch=first,
        ranks=ranks,
    )


def _values(
    run: Run, model: str, batch: MiniBatch, first: int, ranks: Sequence[int] | None
) -> tuple[Mapping[str, np.ndarray], RouteReport]:
    return run.trainer.values(batch, model=model, first_micro_batch=first, ranks=ranks), RouteReport()


def infer_beside(run: Run, batch: Batch, moved: Callable[[], Moved]) -> Inferred:
    """Wait for a batch, and run passes on finished samples as soon as devices allow.

    Args:
        run: the run.
        batch: that is being generated.
        moved: waits until experts have moved, if they do so while engines generate.

    Returns:
        what passes gave until the batch was complete; :func:`finish_inference` does the rest.

    Raises:
        TimeoutError, RefusedSamples: see ``Batch.all``.
    """
    found, wanted = Inferred(), run.config.fuse.tail.chunk_tokens or chunk_tokens(run)
    deadline = time.monotonic() + batch.limit_s
    passes = inference_passes(run)
    ranks: dict[str, Sequence[int] | None] = dict.fromkeys((one.model for one in passes), None)
    if run.config.stream.colocated:
        ranks = dict.fromkeys(ranks, ())
    looked_at = 0
    while not batch.complete:
        with run.phase("generate"):
            batch.wait_a_little(_POLL_S, deadline)
        if batch.stream.tail is not None and found.report is None:
            found.report, looked_at = batch.stream.tail, 0
            ranks = _take_devices(run, found, ranks)
        finished = batch.finished()
        if len(finished) == looked_at or all(some == () for some in ranks.values()):
            continue
        looked_at = len(finished)
        for one in passes:
            ready = [] if ranks[one.model] == () else _missing(one, finished, found)
            if batch.complete or sum(len(sample.tokens) for sample in ready) < wanted:
                continue
            moved()
            _infer(run, one, ready, found, ranks[one.model])
    found.batch_done = batch.completed
    return found


def finish_inference(run: Run, samples: Sequence[Sample], found: Inferred) -> None:
    """The passes over those samples that they have not run on; all ranks are there."""
    for one in inference_passes(run):
        rest = _missing(one, samples, found)
        if rest:
            _infer(run, one, rest, found, None)


def _missing(one: InferencePass, samples: Sequence[Sample], found: Inferred) -> list[TrainSample]:
    given = [one.given(sample) for sample in samples if len(sample.response_tokens)]
    return [sample for sample in given if not found.has(one.name, sample)]


def _take_devices(
    run: Run, found: Inferred, ranks: Mapping[str, Sequence[int] | None]
) -> dict[str, Sequence[int] | None]:
    """Colocated: freed engines sleep, and trainer ranks whose blocks are free come back.

    Returns:
        by model the ranks that run it: its own blocks, since models may have layouts of their own.
    """
    assert found.report is not None
    if not run.config.stream.colocated:
        return dict(ranks)
    on_gpus, freed = run.config.rollout.device == "cuda", found.report.freed
    everyone = tuple(range(run.packing.layout.world))
    free = freed if on_gpus or not freed else everyone
    taken = {model: free_ranks(run.packing_of(model).layout, free) for model in ranks}
    every = sorted({rank for some in taken.values() for rank in some})
    if every:
        began = time.perf_counter()
        with run.phase("offload"):
            run.pool.sleep(keep_weights=False, engines=every if on_gpus else freed)
            run.trainer.onload(("weights",), every)
        found.switch_seconds = time.perf_counter() - began
    return dict(taken)


def _infer(
    run: Run, one: InferencePass, samples: Sequence[TrainSample], found: Inferred, ranks: Sequence[int] | None
) -> None:
    """A pass over some samples."""
    packing = run.packing_of(one.model)
    world = packing.layout.world
    batch = mini_batch_on(packing, samples, range(world) if ranks is None else ranks)
    first, began = found.micro_batches.get(one.name, 0), time.time()
    with run.phase(one.name):
        values, report = one.run(batch, first, ranks)
    found.values.setdefault(one.name, {}).update(values)
    found.tokens.setdefault(one.name, {}).update({sample.sample_id: sample.tokens for sample in samples})
    if one.name == "old_logprob":
        found.rows, found.differing = found.rows + report.rows, found.differing + report.differing
    found.micro_batches[one.name] = first + max(len(some) for some in batch.layout.micro_batches)
    share = 1.0 if ranks is None else len(ranks) / world
    found.work.append(Work(one.name, began, time.time(), share, sum(len(sample.tokens) for sample in samples)))
