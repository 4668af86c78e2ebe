"""Metrics of a run: always `metrics.jsonl` in the run directory; W&B and TensorBoard when asked for.

Names are ``section/name``; the sections are `SECTIONS`. `METRICS` says what the loop's metrics mean.

Two axes: ``step`` counts completed rollout iterations, ``warmup_step`` the optimizer steps of the supervised warm-up.
A line of `metrics.jsonl` holds one of them, ``time`` (Unix seconds) and metrics; several lines may have the same step.
Resume drops lines after its step; where a step was logged twice, the later line wins (`read_metrics`).

W&B or TensorBoard failing never ends a run: the first failure is reported once, and that tracker stays off.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ultraep.telemetry.metrics import METRICS as BALANCE_METRICS
from rl.files import json_line, read_json_lines, write_atomic, write_json_lines

logger = logging.getLogger(__name__)

SECTIONS = ("train", "rollout", "perf", "eval", "moe", "stream", "fuse", "critic", "warmup")

# With balancing on, and of training's own passes only: the names of BALANCE_METRICS.
METRICS = BALANCE_METRICS | {
    "rollout/reward/mean": "Mean reward of the iteration's samples.",
    "rollout/reward/std": "Standard deviation of those rewards.",
    "rollout/reward_errors": "Samples whose reward could not be computed.",
    "rollout/response_length/mean": "Mean response length, tokens.",
    "rollout/response_length/max": "Longest response, tokens.",
    "rollout/truncated_fraction": "Fraction of responses that reached sampling.max_tokens.",
    "rollout/refused_samples": "Samples refused for bad routes and generated again.",
    "train/loss": "Loss, mean over the iteration's optimizer steps.",
    "train/ppo_kl": "KL between the policy and the old policy.",
    "train/kl": "KL between the policy and the reference.",
    "train/entropy": "Entropy of the policy, nats per token.",
    "train/pg_clipfrac": "Fraction of tokens whose ratio was clipped.",
    "train/grad_norm": "Global gradient norm before clipping.",
    "train/lr": "Learning rate.",
    "train/rollout_logprob_abs_diff": "Mean |rollout - training log-prob|, nats per token, with the routes in use.",
    "train/rollout_logprob_abs_diff_own_routes": "The same when training's own routers choose.",
    "train/rollout_kl": "KL of rollout's policy from training's, k3, mean over tokens, with the routes in use.",
    "train/rollout_kl_own_routes": "The same when training's own routers choose.",
    "moe/own_routes_differ_fraction": "Fraction of (token, layer) where equal weights route otherwise than rollout.",
    "moe/max_vio": "(max - mean) / mean of tokens per expert over the iteration's samples, mean over layers.",
    "moe/foresight/planned_fraction": "Fraction of the actor's (micro-batch, layer) planned before their pass.",
    "moe/foresight/wait_seconds": "Seconds that passes waited for layouts and plans.",
    "moe/reorder/experts_moved": "Experts, over layers, that changed their home slot before the iteration.",
    "moe/reorder/bytes": "Bytes that moved with them: weights, main parameters, moments.",
    "moe/reorder/seconds": "Seconds of choosing homes and moving.",
    "moe/compose/fewer_tokens": "Fraction of the busiest nodes' (or ranks') tokens that composing micro-batches took.",
    "stream/staleness/mean": "Training steps that the weights of response tokens were old, mean over tokens.",
    "stream/staleness/max": "The oldest token's; at most stream.staleness.",
    "stream/mixed_versions_fraction": "Fraction of samples with tokens of more than one weight version.",
    "stream/engine_idle_fraction": "Fraction of the iteration in which an engine held no sample, mean over engines.",
    "stream/engine_slowdown": "Time of engines' steps over what stream.latency_profile says of them.",
    "stream/trainer_idle_fraction": "Fraction of the iteration in which trainer ranks had nothing to do.",
    "stream/chunks": "Chunks in which the iteration's samples were trained on, with stream.pipelining.",
    "stream/transfer_fallbacks": "Updates of engines so far that took the object store in place of a direct transfer.",
    "stream/engines": "Engines at the end of the iteration, those that start or leave included.",
    "fuse/training/makespan": "Seconds from the first to the last operation of a fused step's pipeline.",
    "fuse/training/predicted": "What its schedule says, with times that earlier steps measured, seconds.",
    "fuse/training/saved_fraction": "Fraction of the models' schedules one after the other that fusing saves.",
    "fuse/training/over_bound": "The schedule's makespan over its lower bound, likewise.",
    "fuse/training/planned_peak_gib": "GPUs: GiB of the fullest rank above those before a fused step, by its schedule.",
    "fuse/training/peak_gib": "The same, measured.",
    "fuse/tail/threshold": "Unfinished samples at which the tail of generation was gathered; 0: it was not to be.",
    "fuse/tail/migrated_samples": "Samples that went on at another engine.",
    "fuse/tail/kept_tokens": "Response tokens that they took along.",
    "fuse/tail/freed_engines": "Engines that the tail left.",
    "fuse/tail/seconds": "Seconds from the beginning of the tail until the last sample.",
    "fuse/tail/hidden_seconds": "Seconds of passes over samples that ran before the last sample had come.",
    "fuse/tail/hidden_fraction": "Fraction of the iteration's tokens that were inferred on before that.",
    "fuse/tail/predicted_saving_seconds": "Seconds that gathering saves, by simulation of recent lengths.",
    "perf/step_time": "Seconds of one iteration.",
    "perf/tokens_per_second": "Tokens of the iteration's samples over its seconds.",
    "perf/time/<phase>": "Seconds of one phase: generate, reward, reorder, prepare, old_logprob, values, train, "
    "export, offload, transfer, weight_update, evaluate, checkpoint.",
    "perf/memory_gib/<turn>": "Colocated: most GiB in use on a GPU in the turns of generate and train.",
    "eval/accuracy": "Fraction of held-out prompts answered correctly; of their samples, if there are several.",
    "eval/avg@<n>": "The same, where each prompt is answered n times.",
    "eval/pass@<k>": "Probability that at least one of k samples of a prompt is correct (unbiased estimate), mean.",
    "eval/reward/mean": "Mean reward on held-out prompts.",
    "eval/response_length/mean": "Mean response length on held-out prompts, tokens.",
    "train/advantage_mean": "Mean advantage of learnt tokens, before whitening (GAE).",
    "train/advantage_std": "Standard deviation of those.",
    "train/importance_weight": "Importance weight of rollout against training, mean over learnt tokens.",
    "train/importance_weight_squared": "Its square; the first squared over it is the effective fraction of tokens.",
    "train/importance_truncated": "Fraction of learnt tokens whose weight was cut to the cap.",
    "train/importance_dropped": "Fraction of learnt tokens outside algorithm.importance.band: not learnt from.",
    "train/overlong_penalty": "Mean of what long responses lose of their rewards; <= 0.",
    "train/overlong_filtered_fraction": "Fraction of responses that were cut off and not learnt from.",
    "rollout/dynamic_sampling/rounds": "Rounds of generation of the iteration.",
    "rollout/dynamic_sampling/dropped_groups": "Groups left out because their rewards are all equal.",
    "rollout/dynamic_sampling/lacking_groups": "Groups missing after the last round.",
    "rollout/dynamic_sampling/reward_mean": "Mean reward of all samples, those of groups that were left out included.",
    "rollout/dynamic_sampling/dropped_reward_mean": "Mean reward of samples of groups that were left out.",
    "critic/loss": "Value loss, mean over the iteration's optimizer steps.",
    "critic/clipfrac": "Fraction of tokens whose value was clipped: no gradient.",
    "critic/abs_error": "Mean |value - return| over learnt tokens, in training.",
    "critic/grad_norm": "Global gradient norm of the critic before clipping.",
    "critic/lr": "Learning rate of the critic.",
    "critic/values/mean": "Mean value of learnt tokens before the iteration's updates.",
    "critic/returns/mean": "Mean return of learnt tokens.",
    "critic/explained_variance": "1 - Var(return - value) / Var(return) before updates; 1 is perfect, 0 a constant.",
    "rollout/reward_model/mean": "Mean score of the reward model.",
    "rollout/reward_model/std": "Standard deviation of its scores.",
    "warmup/loss": "Cross-entropy of the supervised warm-up, nats per token.",
    "warmup/accuracy": "Greedy accuracy on problems of the warm-up.",
}


class Tracker(Protocol):
    """Somewhere metrics go."""

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class MetricLogger:
    """Writes metrics of one run; close it at the end, or use it as a context manager.

    Args:
        directory: the run directory.
        config: nested plain values, shown by W&B.
        wandb: ``"off"``, ``"auto"`` (online with WANDB_API_KEY, else offline), ``"offline"``, ``"online"``.
        wandb_project: project at W&B.
        tensorboard: write event files to ``<directory>/tensorboard``.
        resume_step: continue after this step; None: a new run, an earlier `metrics.jsonl` is replaced.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        wandb: str = "off",
        wandb_project: str = "megatron-ultraep",
        tensorboard: bool = False,
        resume_step: int | None = None,
    ):
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "metrics.jsonl"
        _truncate(path, resume_step)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self._trackers: dict[str, Tracker] = {}
        if tensorboard:
            self._start("TensorBoard", lambda: TensorBoardTracker(self._directory / "tensorboard", resume_step))
        if wandb != "off":
            mode = wandb if wandb != "auto" else ("online" if os.environ.get("WANDB_API_KEY") else "offline")
            self._start("W&B", lambda: WandbTracker(self._directory, mode, wandb_project, name, config or {}))

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(0 if kind is None else 1)

    def log(self, step: int, metrics: Mapping[str, Any], axis: str = "step") -> None:
        """Record metrics of a step.

        Args:
            step: completed rollout iterations, or warm-up steps.
            metrics: by name; numbers, or anything `float` takes (0-d tensors and arrays). None is left out.
            axis: ``"step"`` or ``"warmup_step"``.

        Raises:
            ValueError: a name without a known section, an unknown axis, or a value that is no number.
        """
        if axis not in ("step", "warmup_step"):
            raise ValueError(f"expected axis 'step' or 'warmup_step', came {axis!r}; use one of them.")
        values = {name: _number(name, value) for name, value in metrics.items() if value is not None}
        self._file.write(json_line({axis: step, "time": round(time.time(), 3), **values}))
        self._file.flush()
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(axis, step, values)
            except Exception as error:
                self._drop(name, error)

    def close(self, exit_code: int = 0) -> None:
        """Finish all trackers; ``exit_code`` other than 0 marks the run failed at W&B. Closing twice is fine."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close(exit_code)
            except Exception as error:
                self._drop(name, error)
        self._trackers.clear()
        self._file.close()

    def _start(self, name: str, make: Any) -> None:
        try:
            self._trackers[name] = make()
        except Exception as error:
            self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        logger.warning(
            "%s failed and stays off for the rest of this run (%s: %s); metrics.jsonl has all metrics.",
            name,
            type(error).__name__,
            error,
        )


class TensorBoardTracker:
    """Event files, written without TensorFlow or torch.

    The warm-up is a TensorBoard run of its own (a subfolder): steps of the other axis must not mix with its steps,
    because TensorBoard hides everything after the step of a resume.
    """

    def __init__(self, directory: Path, resume_step: int | None):
        self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._make_writer = importlib.import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self._folders = {"step": directory, "warmup_step": directory / "warmup"}
        self._writers: dict[str, Any] = {}
        if resume_step is not None:
            # Tells TensorBoard to hide what earlier files hold from this step on.
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            event = self._events.Event(wall_time=time.time(), step=resume_step + 1, session_log=start)
            self._writer("step").add_event(event)

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = self._summaries.Summary(value=values)
        writer = self._writer(axis)
        writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    def close(self, exit_code: int) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, axis: str) -> Any:
        if axis not in self._writers:
            self._writers[axis] = self._make_writer(str(self._folders[axis]))
        return self._writers[axis]


class WandbTracker:
    """One W&B run for the whole life of a run directory: its id is kept there, so that resume continues it."""

    def __init__(self, directory: Path, mode: str, project: str, name: str | None, config: Mapping[str, Any]):
        wandb = importlib.import_module("wandb")
        id_file = directory / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4).encode())
        self._run = wandb.init(
            project=project,
            name=name or directory.name,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=mode,
            dir=str(directory),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, init_timeout=60),
        )
        # Steps of our own rather than W&B's: it refuses steps that go back, as resume and the warm-up do.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warmup/*", step_metric="warmup_step")

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({axis: step, **metrics})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def read_metrics(directory: Path | str, axis: str = "step") -> dict[int, dict[str, float]]:
    """Metrics by step, in order of steps; of several values of one metric at one step the last counts."""
    merged: dict[int, dict[str, float]] = {}
    for line in read_json_lines(Path(directory) / "metrics.jsonl").values:
        if axis in line:
            values = {name: value for name, value in line.items() if "/" in name}
            merged.setdefault(line[axis], {}).update(values)
    return dict(sorted(merged.items()))


def _truncate(path: Path, resume_step: int | None) -> None:
    if resume_step is None:
        path.unlink(missing_ok=True)
        return
    lines = read_json_lines(path)
    kept = [line for line in lines.values if line.get("step", 0) <= resume_step]
    if lines.torn or len(kept) < len(lines.values):
        write_json_lines(path, kept)


def _number(name: str, value: Any) -> float:
    section, slash, rest = name.partition("/")
    if section not in SECTIONS or not slash or not rest:
        raise ValueError(f"expected a metric name such as train/loss (sections: {', '.join(SECTIONS)}), came {name!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name}: expected a number, came {value!r}; reduce it to one first.") from error
    return number
