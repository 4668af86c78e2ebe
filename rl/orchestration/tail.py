"""Inference beside the tail of generation (RLHFuse): passes over finished samples while the last ones are generated.

    run.tail = Tail.of_run(config, pool, layout)
    stream = service.generate(..., tail=run.tail.rule(samples))     # gathers the tail when few samples are left
    inferred = infer_beside(run, batch, moved)                      # in place of waiting for the batch
    old, reference, metrics = finish_inference(run, given, inferred)    # the rest; nothing is computed twice

Passes before training's own (old log-probs, reference) read weights that do not change while samples are generated, and
treat every sample by itself: which samples share a chunk, and when it runs, changes nothing but the order of sums.

When they run:

- Trainer ranks with devices of their own: whenever enough finished samples are there for a chunk.
- Colocated: once the tail is gathered, on the devices of freed engines, in blocks of ranks that make whole copies of
  the model (``blocks``); on CPUs, where memory is shared, on all ranks. What is left runs in the trainer's turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.config import RunConfig
from rl.orchestration.ahead import Moved
from rl.orchestration.arriving import chunk_tokens
from rl.orchestration.blocks import blocks_of, free_ranks, mini_batch_on
from rl.orchestration.experience import train_samples
from rl.orchestration.feed import Batch
from rl.orchestration.steps import LogProbs, mode_of
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
        rule: of a threshold.
        block: trainer ranks of one copy of the model.
        engines: as many as devices.
    """

    def __init__(
        self,
        fixed: Choice | None,
        chooser: ThresholdChooser | None,
        rule: Callable[[int], TailRule],
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
        seats = section.seats or rollout.max_num_seqs
        if section.seats is None and profile is not None:
            seats = seats_within(profile, rollout.max_num_seqs)
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
                tail_seats=seats,
                window=section.window,
                drift=section.drift,
                margin=section.margin,
            )

        def rule(threshold: int) -> TailRule:
            return TailRule(threshold, seats, info.kv_tokens, config.longest_sample)

        return Tail(fixed, chooser, rule, block, rollout.engines)

    def rule(self) -> TailRule | None:
        """For the batch that begins now; None: its tail is not gathered."""
        if self._chooser is not None:
            self.choice = self._chooser.choose()
        return self._rule(self.choice.threshold) if self.choice.threshold else None

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


@dataclass
class Inferred:
    """What passes gave for a batch so far.

    Attributes:
        values: by pass, by sample id: ``[T]`` each, aligned with tokens.
        tokens: by sample id, the tokens that these are of.
        rows, differing: see ``RouteReport``; of old log-probs.
        micro_batches: that passes have run, so that no key is used twice.
        work: ``(began, ended, share of the ranks, tokens)`` of every chunk, times in seconds of ``time.time()``.
        report: of the tail; None: it was not gathered.
        switch_seconds: until freed devices had changed hands.
        batch_done: when the last sample had come, seconds of ``time.time()``; 0 until then.
    """

    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    rows: int = 0
    differing: int = 0
    micro_batches: int = 0
    work: list[tuple[float, float, float, int]] = field(default_factory=list)
    report: TailReport | None = None
    switch_seconds: float = 0.0
    batch_done: float = 0.0

    def has(self, sample: TrainSample) -> bool:
        """Whether every pass has run on this very sample."""
        known = self.tokens.get(sample.sample_id)
        return known is not None and np.array_equal(known, sample.tokens)

    def seconds_per_token(self, devices: int) -> float:
        """Of all passes together on one of so many devices, all of which are the trainer's when nothing else runs."""
        tokens = sum(count for *_, count in self.work)
        return devices * sum((end - begin) * share for begin, end, share, _ in self.work) / max(1, tokens)

    def metrics(self, choice: Choice) -> dict[str, float]:
        """Of the tail, under the names of ``rl.metrics``; call it when everything has been inferred."""
        report = self.report
        hidden = [max(0.0, min(end, self.batch_done) - begin) for begin, end, _, _ in self.work]
        before = sum(count for begin, _, _, count in self.work if begin < self.batch_done)
        found = {
            "fuse/tail/threshold": float(choice.threshold),
            "fuse/tail/migrated_samples": float(report.moved if report else 0),
            "fuse/tail/kept_tokens": float(report.kept_tokens if report else 0),
            "fuse/tail/freed_engines": float(len(report.freed) if report else 0),
            "fuse/tail/seconds": max(0.0, self.batch_done - report.began) if report else 0.0,
            "fuse/tail/hidden_seconds": sum(hidden),
            "fuse/tail/hidden_fraction": before / max(1, sum(count for *_, count in self.work)),
        }
        if choice.predicted_seconds is not None and choice.plain_seconds is not None:
            found["fuse/tail/predicted_saving_seconds"] = choice.plain_seconds - choice.predicted_seconds
        return found


RunPass = Callable[["Run", MiniBatch, int, "Sequence[int] | None"], tuple[Mapping[str, np.ndarray], RouteReport]]


@dataclass(frozen=True)
class InferencePass:
    """A forward pass over samples that training needs the results of.

    Attributes:
        name: of the phase, and of its results in ``Inferred.values``.
        run: the pass over a mini-batch, its first micro-batch's number, the ranks that take part (None: all).
    """

    name: str
    run: RunPass


def inference_passes(run: Run) -> list[InferencePass]:
    """The passes of an iteration before training's own, in order."""
    algorithm, found = run.config.algorithm, []
    if algorithm.old_logprobs == "recompute":
        found.append(InferencePass("old_logprob", partial(_logprobs, "actor", algorithm.routes.old_logprob)))
    if run.config.keeps_reference:
        found.append(InferencePass("reference", partial(_logprobs, "reference", algorithm.routes.reference)))
    return found


def _logprobs(
    model: str, routes: str, run: Run, batch: MiniBatch, first: int, ranks: Sequence[int] | None
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
    ranks: Sequence[int] | None = () if run.config.stream.colocated else None
    while not batch.complete:
        with run.phase("generate"):
            batch.wait_a_little(_POLL_S, deadline)
        if batch.stream.tail is not None and found.report is None:
            found.report = batch.stream.tail
            ranks = _take_devices(run, found)
        ready = [sample for sample in train_samples(batch.finished()) if not found.has(sample)]
        enough = sum(len(sample.tokens) for sample in ready) >= wanted
        if ready and enough and ranks != () and not batch.complete:
            moved()
            _infer(run, ready, found, ranks)
    found.batch_done = batch.completed
    return found


def _take_devices(run: Run, found: Inferred) -> Sequence[int] | None:
    """Colocated: freed engines sleep, and trainer ranks whose blocks are free come back. Returns the ranks to use."""
    assert found.report is not None
    if not run.config.stream.colocated:
        return None
    on_gpus = run.config.rollout.device == "cuda"
    layout, freed = run.packing.layout, found.report.freed
    ranks = free_ranks(layout, freed) if on_gpus else tuple(range(layout.world))
    if not ranks or not freed:
        return ()
    began = time.perf_counter()
    with run.phase("offload"):
        run.pool.sleep(keep_weights=False, engines=ranks if on_gpus else freed)
        run.trainer.onload(("weights",), ranks)
    found.switch_seconds = time.perf_counter() - began
    return ranks


def _infer(run: Run, samples: Sequence[TrainSample], found: Inferred, ranks: Sequence[int] | None) -> None:
    """All passes over some samples."""
    layout = run.packing.layout
    batch = mini_batch_on(run.packing, samples, range(layout.world) if ranks is None else ranks)
    began = time.time()
    for each in inference_passes(run):
        with run.phase(each.name):
            values, report = each.run(run, batch, found.micro_batches, ranks)
        found.values.setdefault(each.name, {}).update(values)
        if each.name == "old_logprob":
            found.rows, found.differing = found.rows + report.rows, found.differing + report.differing
    found.micro_batches += max(len(micro_batches) for micro_batches in batch.layout.micro_batches)
    found.tokens |= {sample.sample_id: sample.tokens for sample in samples}
    share = 1.0 if ranks is None else len(ranks) / layout.world
    found.work.append((began, time.time(), share, sum(len(sample.tokens) for sample in samples)))


def finish_inference(
    run: Run, samples: Sequence[TrainSample], found: Inferred
) -> tuple[LogProbs | None, LogProbs | None, dict[str, float]]:
    """The passes over the samples that they have not run on; all ranks are there. Results as ``old_and_reference``."""
    rest = [sample for sample in samples if not found.has(sample)]
    if rest:
        _infer(run, rest, found, None)
    metrics: dict[str, Any] = {}
    if found.rows:
        metrics["moe/own_routes_differ_fraction"] = found.differing / found.rows
    return found.values.get("old_logprob"), found.values.get("reference"), metrics
