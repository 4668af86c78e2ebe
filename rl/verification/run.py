"""Proves from the files of a run alone that they fit together; ``ultraep-rl verify``.

1. Ledger: steps without gaps, every line's digest, samples of consumed prompts, sessions.
2. Prompts: each exactly once.
3. Metrics: a row for every step, with the rewards and optimizer steps of the ledger.
4. Data: digests of ``run.json``, from the data sources as they are now.
5. Routes: traces are whole, and their routes have the digests that the ledger keeps of what routers consumed.
6. Plans: every stored plan is the planner's for the stored loads (:mod:`megatron_ultraep.telemetry.verify`).
7. Loads: what was balanced in training is what the traces' routes add up to.
8. Checkpoints: each is of a step of the ledger, and continues after its prompts.
9. Evaluations: metrics are those of the saved samples; rewards are computed again (:mod:`rl.verification.evaluations`).

What cannot be checked is said with the reason, and is no mismatch. Nothing in the run directory is changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.config import ConfigError, RunConfig
from rl.evaluation import eval_files, eval_metrics, read_eval, summarize_samples
from rl.files import read_json_lines
from rl.ledger import Ledger, LedgerError, StepRecord, line_digest
from rl.metrics import read_metrics
from rl.verification.evaluations import run_config, verify_eval

_SHOWN = 20  # mismatches of one check in the table; the count says how many there are


@dataclass
class Check:
    """One kind of thing that was checked.

    Attributes:
        name: of the check.
        unit: what is counted.
        count: how many were checked.
        mismatches: a sentence each, with file, step and place.
        notes: what could not be checked, and why.
    """

    name: str
    unit: str
    count: int = 0
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunVerification:
    """What verifying a run gave.

    Attributes:
        checks: in the order of the module's list.
        missed: an accuracy threshold of ``evaluation.success`` was missed, by rewards computed now.
    """

    checks: tuple[Check, ...]
    missed: bool = False

    @property
    def mismatches(self) -> tuple[str, ...]:
        """Of all checks."""
        return tuple(text for check in self.checks for text in check.mismatches)

    def render(self) -> str:
        """A table for people, then every mismatch (of each check at most 20), then what was not checked."""
        lines = [f"{'check':<12}  {'checked':>8}  {'of':<12}  {'mismatches':>10}"]
        lines += [f"{c.name:<12}  {c.count:>8}  {c.unit:<12}  {len(c.mismatches):>10}" for c in self.checks]
        for check in self.checks:
            lines += [f"MISMATCH {check.name}: {text}" for text in check.mismatches[:_SHOWN]]
            if len(check.mismatches) > _SHOWN:
                lines.append(f"MISMATCH {check.name}: {len(check.mismatches) - _SHOWN} more")
        lines += [f"not checked, {check.name}: {text}" for check in self.checks for text in check.notes]
        found = len(self.mismatches)
        lines.append(f"{found} mismatches" if found else "everything that was checked fits together")
        if self.missed:
            lines.append("an accuracy threshold of evaluation.success was missed")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Run:
    """What the checks read."""

    directory: Path
    config: RunConfig
    run: Mapping[str, Any]
    lines: tuple[Any, ...]
    records: tuple[StepRecord, ...]

    @property
    def by_step(self) -> dict[int, StepRecord]:
        return {record.step: record for record in self.records}


def verify_run(directory: Path | str, *, rewards: bool = True) -> RunVerification:
    """Check a run.

    Args:
        directory: of the run.
        rewards: score the saved evaluation samples again, which runs the run's reward function.

    Raises:
        LedgerError: there is no run in the directory.
        ConfigError: its configuration is none that this version knows.
    """
    directory = Path(directory)
    ledger_check = Check("ledger", "steps")
    try:
        run = _open(directory, ledger_check)
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        ledger_check.mismatches.append(f"run.json or steps.jsonl cannot be read: {error}")
        return RunVerification((ledger_check,))
    _ledger(run, ledger_check)
    size, data = _data(run)
    evaluations, missed = _evaluations(run, rewards)
    traces, routes = _traces(run)
    plans, complete = _plans(run)
    checks = (
        ledger_check,
        _prompts(run, size),
        _guarded(Check("metrics", "rows"), lambda check: _metrics(run, check)),
        data,
        routes,
        plans,
        _guarded(Check("loads", "layers"), lambda check: _loads(run, traces, complete, check)),
        _guarded(Check("checkpoints", "checkpoints"), lambda check: _checkpoints(run, check)),
        evaluations,
    )
    return RunVerification(checks, missed)


def _guarded(check: Check, do: Callable[[Check], None]) -> Check:
    """A file that is damaged so that it cannot be read is a mismatch of its check."""
    try:
        do(check)
    except (ValueError, KeyError, TypeError, OSError) as error:
        check.mismatches.append(f"cannot be read: {type(error).__name__}: {error}")
    return check


# ------------------------------------------------------------------ ledger, prompts, metrics


def _open(directory: Path, check: Check) -> _Run:
    path = directory / "run.json"
    if not path.is_file():
        raise LedgerError(f"expected a run directory with run.json, found none in {directory}; check the path.")
    lines = read_json_lines(directory / "steps.jsonl")
    if lines.torn:
        check.mismatches.append(
            f"steps.jsonl: the last line is cut off after {len(lines.torn)} bytes; if the run was killed there, "
            "--resume drops it"
        )
    ledger = Ledger(directory, json.loads(path.read_bytes()), [], None)
    records = tuple(StepRecord.from_json(value) for value in lines.values)
    return _Run(directory, run_config(ledger), ledger.run, lines.values, records)


def _ledger(run: _Run, check: Check) -> None:
    check.count = len(run.records)
    wrong, chain, unchained, version = check.mismatches, "", 0, -1
    seen: set[str] = set()
    for number, (line, record) in enumerate(zip(run.lines, run.records, strict=True), 1):
        where = f"steps.jsonl line {number}, step {record.step}"
        if record.step != number:
            wrong.append(f"{where}: expected step {number}: a line is missing, or out of its place")
        if "chain" not in line:
            unchained += 1
        elif line["chain"] != line_digest(chain, line):
            wrong.append(f"{where}: its digest is not that of the line and those before it: one of them was changed")
        chain = line.get("chain", "")
        if record.weight_version < version:
            wrong.append(f"{where}: weight version {record.weight_version} after {version}")
        version = record.weight_version
        prompts = {f"train/{epoch}/{ordinal}" for epoch, ordinal in record.consumed}
        strangers = [s for s in record.sample_ids if s.rpartition("/")[0] not in prompts]
        if strangers:
            wrong.append(f"{where}: samples of prompts that it did not consume: {', '.join(strangers[:3])}")
        repeated = [s for s, count in Counter(record.sample_ids).items() if count > 1 or s in seen]
        if repeated:
            wrong.append(f"{where}: samples that were trained on before: {', '.join(repeated[:3])}")
        seen.update(record.sample_ids)
        others = sorted(set(record.route_digests) - set(record.sample_ids))
        if others:
            wrong.append(f"{where}: route digests of samples that it did not train on: {', '.join(others[:3])}")
        if not 0 <= line.get("session", 0) < len(run.run["sessions"]):
            wrong.append(f"{where}: of session {line.get('session')}, and run.json has {len(run.run['sessions'])}")
    ended = run.run["sessions"][-1].get("last_step")
    if ended is not None and ended != len(run.records):
        wrong.append(f"run.json: its last session ended after step {ended}, and steps.jsonl has {len(run.records)}")
    if unchained:
        check.notes.append(f"the digests of {unchained} lines, which were written by a version without them")


def _prompts(run: _Run, size: int | None) -> Check:
    """Every prompt once; the ordinals of an epoch from 0 on, and all of an epoch before the next."""
    consumed = [key for record in run.records for key in record.consumed]
    check = Check("prompts", "prompts", len(consumed))
    counts = Counter(consumed)
    check.mismatches += [
        f"steps.jsonl: prompt {ordinal} of epoch {epoch} was consumed {count} times"
        for (epoch, ordinal), count in sorted(counts.items())
        if count > 1
    ]
    if run.config.algorithm.dynamic_sampling.enabled:
        check.notes.append("whether prompts were passed over: batches that dynamic sampling fills take them ahead")
        return check
    last = max((epoch for epoch, _ in consumed), default=-1)
    for epoch in range(last + 1):
        ordinals = {ordinal for of, ordinal in consumed if of == epoch}
        end = size if epoch < last and size is not None else max(ordinals, default=-1) + 1
        missing = sorted(set(range(end)) - ordinals)
        if missing:
            check.mismatches.append(f"steps.jsonl: prompts {_some(missing)} of epoch {epoch} were passed over")
        if size is not None and any(not 0 <= ordinal < size for ordinal in ordinals):
            check.mismatches.append(f"steps.jsonl: epoch {epoch} has prompts beyond the {size} of the data")
    if size is None and last > 0:
        check.notes.append("the ends of epochs: the data could not be read")
    return check


def _metrics(run: _Run, check: Check) -> None:
    path = run.directory / "metrics.jsonl"
    lines = read_json_lines(path)
    if lines.torn:
        check.mismatches.append(f"metrics.jsonl: the last line is cut off after {len(lines.torn)} bytes")
    rows = [line for line in lines.values if "perf/step_time" in line]
    check.count = len(rows)
    steps = Counter(row.get("step") for row in rows)
    check.mismatches += [
        f"metrics.jsonl: expected one row of step {step}, found {steps[step]}"
        for step in sorted({r.step for r in run.records} | set(steps))
        if steps[step] != 1 or step not in run.by_step
    ]
    by_step = read_metrics(run.directory)
    for record in run.records:
        found = by_step.get(record.step, {})
        if not found:
            continue
        expected = {f"rollout/{name}": value for name, value in record.rewards.items()}
        check.mismatches += [
            f"metrics.jsonl step {record.step}: {name} is {found.get(name)}, and the ledger has {value}"
            for name, value in expected.items()
            if not _same(found.get(name), value)
        ]
        steps_taken = record.extra.get("optimizer_steps", 0)
        before = by_step.get(record.step - 1, {}).get("train/optimizer_steps")
        after = found.get("train/optimizer_steps")
        if before is not None and after is not None and after - before != steps_taken:
            check.mismatches.append(
                f"metrics.jsonl step {record.step}: {after - before:g} optimizer steps since the step before, and the "
                f"ledger has {steps_taken}"
            )


# ------------------------------------------------------------------ data, routes


def _data(run: _Run) -> tuple[int | None, Check]:
    """Prompts of an epoch, None where the data cannot be read; and whether the data are those of the run."""
    from rl.data.sources import DataError
    from rl.orchestration.inputs import load_data, load_tokenizer

    check = Check("data", "sources")
    recorded = run.run["data_digests"]
    with tempfile.TemporaryDirectory() as scratch:
        # Loading writes what it skips to the run directory.
        elsewhere = run.config.run.model_copy(update={"output_dir": Path(scratch)})
        config = run.config.model_copy(update={"run": elsewhere})
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                data = load_data(config, load_tokenizer(config.model.path))
        except (DataError, ConfigError, OSError, ValueError, ImportError) as error:
            check.notes.append(f"digests of {', '.join(sorted(recorded))}: the data cannot be read now: {error}")
            return None, check
    for name in sorted(recorded.keys() | data.digests.keys()):
        check.count += 1
        if recorded.get(name) != data.digests.get(name):
            check.mismatches.append(
                f"run.json: data_digests.{name} is {recorded.get(name)}, and the data are {data.digests.get(name)}"
            )
    return len(data.train), check


def _traces(run: _Run) -> tuple[dict[int, Any], Check]:
    """Whole traces by step, and whether their routes are those that routers consumed."""
    from megatron_ultraep.replay import RoutingTrace, layer_digests
    from rl.orchestration.steps import short_digest

    check, traces = Check("routes", "samples"), {}
    for path in sorted((run.directory / "traces").glob("step_*.safetensors")):
        name = path.relative_to(run.directory)
        try:
            step = int(path.stem.removeprefix("step_"))
            trace = RoutingTrace.load(path)
        except ValueError as error:
            check.mismatches.append(f"{name}: {error}")
            continue
        record = run.by_step.get(step)
        if record is None:  # of a step that a crash undid
            check.notes.append(f"{name}: the ledger has no step {step}")
            continue
        traces[step] = trace
        computed = {s.sample_id: short_digest(layer_digests(s.routes)) for s in trace.samples}
        for sample_id, recorded in record.route_digests.items():
            check.count += 1
            if computed.get(sample_id) != recorded:
                check.mismatches.append(
                    f"steps.jsonl step {step}: the routes of {sample_id} have digest {recorded}, and those in {name} "
                    f"{computed.get(sample_id, 'are missing')}"
                )
    with_digests = [record.step for record in run.records if record.route_digests]
    unchecked = [step for step in with_digests if step not in traces]
    if unchecked:
        check.notes.append(
            f"route digests of steps {_some(unchecked)}: they have no trace to compare with (logging.traces_every); "
            "routers were compared with them when they trained"
        )
    return traces, check


# ------------------------------------------------------------------ plans, loads


def _plans(run: _Run) -> tuple[Check, bool]:
    """Plans made again; and whether every micro-batch was recorded."""
    from megatron_ultraep.telemetry import read
    from megatron_ultraep.telemetry.verify import verify_plans

    check, directory = Check("plans", "plans"), run.directory / "balance"
    if not directory.is_dir():
        if run.config.balance.enabled:
            check.notes.append("plans: balancing left no records (balance.record)")
        return check, False
    found = verify_plans(directory)
    check.count = found.plans
    check.mismatches += [f"balance/{text}" for text in found.mismatches]
    if found.unchecked:
        check.notes.append(f"{found.unchecked} plans of a recorder that did not keep what it planned with")
    records = read(run.directory)
    for _ in records.blocks():
        pass
    lost = {group: counts for group, counts in records.counts.items() if any(counts.values())}
    if lost:
        check.notes.append(f"plans that were not kept: {lost}")
    return check, not lost and not records.warnings


def _loads(run: _Run, traces: Mapping[int, Any], complete: bool, check: Check) -> None:
    """Tokens of every expert in training, summed over micro-batches and groups, beside those of the routes."""
    import numpy as np

    from megatron_ultraep.telemetry import read

    config = run.config
    if not traces or not run.config.balance.enabled or not (run.directory / "balance").is_dir():
        return
    parallel = config.trainer.parallel
    plain = parallel.tp == parallel.vpp == config.algorithm.epochs_per_batch == 1
    if not plain or config.algorithm.routes.train != "replay" or not complete:
        check.notes.append(
            "loads beside routes: that takes every record, replayed routes, one epoch per batch, and neither tensor "
            "parallelism nor virtual stages"
        )
        return
    iteration = dict(_iterations(run))
    sums: dict[tuple[int, int], Any] = {}
    for record in read(run.directory):
        step = iteration.get(record.key.step)
        if step in traces and (record.key.model, record.key.pass_) == ("actor", "train"):
            place = step, record.layer
            sums[place] = sums.get(place, 0) + record.tokens
    for step, trace in traces.items():
        if step not in iteration.values():
            continue
        trained = set(run.by_step[step].sample_ids)
        routes = [s.routes for s in trace.samples if s.sample_id in trained]
        padding = None
        for index, layer in enumerate(trace.model["moe_layers"]):
            check.count += 1
            wanted = np.zeros(trace.experts, dtype=np.int64)
            for rows in routes:
                wanted += np.bincount(rows[:, index].ravel(), minlength=trace.experts)
            found = sums.get((step, layer + 1), np.zeros_like(wanted))
            # What is left are padding rows; their experts move on by topk from layer to layer (replay.padding).
            left = np.roll(found - wanted, -index * trace.topk)
            padding = left if padding is None else padding
            if left.min() < 0 or left.sum() % trace.topk or not np.array_equal(left, padding):
                check.mismatches.append(
                    f"balance/ step {step}, layer {layer + 1}: experts took {found.tolist()} tokens in training, and "
                    f"the routes in traces/ give {wanted.tolist()}, which padding does not explain"
                )


def _iterations(run: _Run) -> Iterator[tuple[int, int]]:
    """``(optimizer step of the actor, iteration)`` where metrics and ledger say it."""
    by_step = read_metrics(run.directory)
    for record in run.records:
        after = by_step.get(record.step, {}).get("train/optimizer_steps")
        if after is not None:
            for step in range(int(after) - int(record.extra.get("optimizer_steps", 0)), int(after)):
                yield step, record.step


# ------------------------------------------------------------------ checkpoints, evaluations


def _checkpoints(run: _Run, check: Check) -> None:
    for path in sorted((run.directory / "checkpoints").glob("step_*/loop.json")):
        name = path.relative_to(run.directory)
        check.count += 1
        try:
            state = json.loads(path.read_text())
        except ValueError as error:
            check.mismatches.append(f"{name}: expected JSON: {error}")
            continue
        step = state["step"]
        if path.parent.name != f"step_{step:08d}":
            check.mismatches.append(f"{name}: says step {step}")
        if step > len(run.records):
            check.mismatches.append(f"{name}: of step {step}, and the ledger ends with step {len(run.records)}")
            continue
        consumed = {tuple(key) for record in run.records[:step] for key in record.consumed}
        cursor = (state["cursor"]["epoch"], state["cursor"]["ordinal"])
        beyond = [key for key in consumed if key >= cursor]
        if beyond and not run.config.algorithm.dynamic_sampling.enabled:
            check.mismatches.append(
                f"{name}: goes on with prompt {cursor[1]} of epoch {cursor[0]}, and step {step} had consumed "
                f"{len(beyond)} prompts from there on"
            )
        if step and state["version"] != run.records[step - 1].weight_version:
            check.mismatches.append(
                f"{name}: weight version {state['version']}, and the ledger has "
                f"{run.records[step - 1].weight_version} after step {step}"
            )
    if check.count:
        check.notes.append("tensors of checkpoints: they have no digests")


def _evaluations(run: _Run, rewards: bool) -> tuple[Check, bool]:
    """Whether metrics are those of the saved samples and rewards what the reward function gives; thresholds."""
    from rl.rewards.loading import RewardLoadError

    check = Check("evaluations", "samples")
    readable = True

    def metrics(check: Check) -> None:
        by_step = read_metrics(run.directory)
        for step, path in eval_files(run.directory).items():
            name = path.relative_to(run.directory)
            if read_json_lines(path).torn:
                check.mismatches.append(f"{name}: the last line is cut off")
            samples = read_eval(path)
            check.count += len(samples)
            computed = eval_metrics(summarize_samples(step, samples, run.config.evaluation.correct_from))
            check.mismatches += [
                f"{name}: {metric} is {value}, and metrics.jsonl has {by_step.get(step, {}).get(metric)}"
                for metric, value in computed.items()
                if not _same(by_step.get(step, {}).get(metric), value)
            ]

    before = len(check.mismatches)
    _guarded(check, metrics)
    readable = not any("cannot be read" in text for text in check.mismatches[before:])
    if not check.count:
        return check, False
    if not rewards or not readable:
        check.notes.append("rewards were not computed again")
        return check, False
    try:
        found = verify_eval(run.directory)
    except (RewardLoadError, LedgerError, ImportError) as error:
        check.notes.append(f"rewards: the reward function cannot be used now: {error}")
        return check, False
    check.mismatches += [f"eval/: {text}" for text in found.mismatches]
    return check, found.missed


def _same(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(first) and math.isnan(second))


def _some(numbers: Sequence[int], shown: int = 10) -> str:
    text = ", ".join(map(str, numbers[:shown]))
    return text if len(numbers) <= shown else f"{text}, ... ({len(numbers)})"
