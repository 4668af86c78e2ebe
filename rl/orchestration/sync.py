"""The loop: generate -> reward -> advantages -> train -> update weights -> evaluate.

``stream`` says how these overlap: not at all (synchronous), training on groups as they arrive (``pipelining``), or
batches generated while others train (``staleness``). What a step is made of is below, in order; how its parts work is
in the modules it calls. A step is complete when its line is in the ledger; only then may its checkpoint appear, so a
resumed run takes every prompt exactly once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rl.config import RunConfig
from rl.evaluation import eval_files, judge, read_eval, summarize_samples
from rl.orchestration.ahead import Moved
from rl.orchestration.arriving import chunk_tokens, train_arriving
from rl.orchestration.critic import values_of, with_model_scores
from rl.orchestration.elastic import Elastic
from rl.orchestration.evaluate import evaluate
from rl.orchestration.experience import rewarded, rollout_metrics, train_samples, with_advantages
from rl.orchestration.profiling import profiled
from rl.orchestration.setup import Run, open_run
from rl.orchestration.steps import (
    Trained,
    compare_own_routes,
    moving,
    old_and_reference,
    prepare,
    record,
    save_trace,
    train,
)
from rl.orchestration.stopping import STOPPED, stop_requests
from rl.orchestration.tail import Inferred, Tail, finish_inference, infer_beside
from rl.orchestration.warmup import warm_up
from rl.progress import Progress
from rl.report import write_report
from rl.types import Sample

FINISHED, THRESHOLDS_MISSED = 0, 3


def run(config: RunConfig, resume: Path | None = None) -> int:
    """Train as ``config`` says.

    Args:
        config: of the run.
        resume: directory of a run to continue.

    Returns:
        0, 3 when an accuracy threshold of ``evaluation.success`` was missed, or 75 when the run was asked to stop
        and can be resumed.
    """
    try:
        with stop_requests() as stop, open_run(config, resume) as state:
            state.elastic = Elastic.of_run(config, state.service, state.pool.info.start_s)
            state.tail = Tail.of_run(config, state.pool.info, state.packing.layout)
            if state.saved_step < 0:
                begin(state)
            total = state.total_steps()
            state.progress.close()
            state.progress = Progress(total, initial=state.step, enabled=config.logging.progress)
            while state.step < total and not stop.requested:
                with profiled(state):
                    one_step(state)
                last = state.step == total
                if config.evaluation.every and state.step % config.evaluation.every == 0 and not last:
                    evaluate(state)
                if (config.checkpoint.every and state.step % config.checkpoint.every == 0) or last:
                    state.save()
            if stop.requested:
                return stop_here(state)
            if config.evaluation.at_end:
                evaluate(state)
            return finish(state)
    finally:
        _report(config.output_dir)


def stop_here(state: Run) -> int:
    """Save what there is; a resumed run goes on with the next iteration, or with the evaluation after the last."""
    state.save()
    state.ledger.finish("stopped")
    print(f"stopped after step {state.step} as asked; --resume goes on")
    return STOPPED


def _report(directory: Path) -> None:
    """The report of whatever there is; its failure must not hide how the run ended."""
    if not (directory / "run.json").is_file():
        return
    try:
        print(f"report: {write_report(directory)}")
    except Exception as error:
        print(
            f"no report could be written ({type(error).__name__}: {error}); ultraep-rl report {directory} tries again"
        )


def begin(state: Run) -> None:
    """Before the first step: warm up, evaluate, and save what to resume from."""
    if state.config.warmup.steps:
        warm_up(state)
    state.update_engines()
    state.updated()
    if state.config.keeps_reference:
        state.trainer_turn(keep_weights=True)
        reference = state.directory / "checkpoints" / "reference"
        shutil.rmtree(reference, ignore_errors=True)  # of a begin that was broken off
        reference.mkdir(parents=True)
        state.trainer.save_reference(reference)
    if state.config.evaluation.at_start:
        evaluate(state)
    state.save()


def one_step(state: Run) -> None:
    """One iteration."""
    config = state.config
    began, started, state.seconds = time.time(), time.perf_counter(), {}
    feed, state.ahead_of_training = state.feed, config.stream.staleness > 0
    state.check_updates()
    state.engines_turn()
    if not feed.admit() and feed.empty:
        state.updated()  # engines have to finish what they have before they take the weights that this batch needs
        feed.admit()
    batch = feed.oldest()
    inferred = None
    with moving(state) as moved:
        if state.tail is not None:
            inferred = infer_beside(state, batch, moved)
            samples = batch.all()
        else:
            with state.phase("generate"):
                if config.stream.pipelining:
                    batch.wait_for(chunk_tokens(state))
                else:
                    samples = batch.all()
    experts_moved = moved()
    # A tail on freed engines has taken their weights.
    sends = not state.critic_warms_up or state.tail is not None
    state.trainer_turn(keep_weights=not sends)
    if config.stream.pipelining:
        arrived = train_arriving(state, batch, experts_moved)
        samples, usable, trained = arrived.samples, arrived.usable, arrived.trained
        trained_metrics = arrived.metrics | trained.metrics
    else:
        usable, trained, trained_metrics = train_complete(state, samples, experts_moved, inferred)
    save_trace(state, samples)
    staleness = feed.measure(batch, samples)
    feed.trained()
    state.step, state.cursor = state.step + 1, batch.after
    with state.phase("weight_update"):
        if sends:
            state.update_engines()
        else:
            state.keep_engines()
    state.seconds["reward"] = batch.reward_seconds
    seconds = time.perf_counter() - started
    busy = {f"engine {i}": state.service.held_since(i) for i in state.service.engines}
    idle = state.timeline.close_window(began, time.time(), busy)
    if state.elastic is not None:
        decision = state.elastic.step((1 - idle.engines) * seconds, (1 - idle.trainer) * seconds)
        trained.ahead["engines"] = {"serving": len(state.service.engines), **decision.to_json()}
    if state.tail is not None and inferred is not None:
        trained.ahead["tail"] = state.tail.choice.to_json()
        trained_metrics |= inferred.metrics(state.tail.choice)
        state.tail.observe(samples, batch.completed - batch.began, inferred)
    metrics = {
        **rollout_metrics(samples, config.sampling.max_tokens),
        **trained_metrics,
        "stream/staleness/mean": staleness.mean,
        "stream/staleness/max": float(staleness.largest),
        "stream/mixed_versions_fraction": staleness.mixed,
        "stream/engine_idle_fraction": idle.engines,
        "stream/trainer_idle_fraction": idle.trainer,
        "stream/engines": float(len(state.service.engines)),
        "perf/step_time": seconds,
        "perf/tokens_per_second": sum(s.length for s in samples) / seconds,
        **{f"perf/time/{name}": value for name, value in state.seconds.items()},
        **{f"perf/memory_gib/{turn}": value for turn, value in state.memory_gib.items()},
        "perf/time/transfer": state.transfer_seconds,
        "stream/transfer_fallbacks": float(state.transfer.engines.fallbacks),
        **state.engine_slowdown(),
    }
    record(state, batch.prompts, usable, trained, metrics)
    state.whole = True
    state.progress.update(state.step, metrics)


def train_complete(
    state: Run, samples: Sequence[Sample], experts_moved: Moved, inferred: Inferred | None = None
) -> tuple[list[Sample], Trained, dict[str, float]]:
    """The training half of an iteration whose samples are all there: usable samples, what was done, and metrics.

    ``inferred``: passes that ran while samples were generated.
    """
    usable = rewarded(samples)
    if not usable:
        return usable, Trained(), {}
    known: dict[str, dict[str, np.ndarray]] = {}
    if inferred is not None:
        finish_inference(state, usable, inferred)
        known = inferred.values
    usable, score_metrics = with_model_scores(state, usable, values=known.get("reward_model"))
    state.whole = False
    given = train_samples(usable)
    passes = prepare(state, given, experts_moved, plan_old=inferred is None)
    if state.fused is not None:
        state.fused.begin(state, [[given[i] for i in chosen] for chosen in passes.batches])
    if inferred is None:
        old, reference, route_metrics = old_and_reference(state, given, passes)
        values = values_of(state, given)
    else:
        old, reference, values = (known.get(name) for name in ("old_logprob", "reference", "values"))
        route_metrics = inferred.route_metrics
    compared = compare_own_routes(state, given)
    given, advantage_metrics = with_advantages(usable, given, state.config, old, reference, values)
    with state.phase("train"):
        trained = train(state, usable, given, passes)
    return usable, trained, {**score_metrics, **advantage_metrics, **route_metrics, **compared, **trained.metrics}


def finish(state: Run) -> int:
    """Compare held-out accuracy, recomputed from the saved samples, with the thresholds."""
    success = state.config.evaluation.success
    results = [
        summarize_samples(step, state.reward.score(read_eval(path)), state.config.evaluation.correct_from)
        for step, path in eval_files(state.directory).items()
    ]
    by_step = {result.step: result for result in results}
    missed = False
    for judgement in judge(results, success.before_max, success.after_min):
        missed |= not judgement.met
        result = by_step.get(judgement.step)
        came = f"{result.accuracy:.1%} of {result.count}" if result else "not measured"
        print(
            f"held-out accuracy after step {judgement.step}: {came}, wanted {judgement.wanted}: "
            f"{'met' if judgement.met else 'MISSED'}"
        )
    state.ledger.finish("thresholds" if missed else "finished")
    return THRESHOLDS_MISSED if missed else FINISHED
