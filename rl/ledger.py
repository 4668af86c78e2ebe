"""What a run did, so that it can be resumed and verified.

A run directory holds

    run.json                  the resolved configuration, versions, topology, seeds, data digests, and its sessions:
                              one when the run is created and one more for each resume
    steps.jsonl               one line per completed step, each with a digest of itself and of all lines before it
    steps.rolled_back.jsonl   lines of steps that a crash undid, in the order they were undone

Resume is exactly-once because of the order of writes:

1. A step trains.
2. Its line is appended to `steps.jsonl` and is on disk before `append` returns.
3. Only then is the checkpoint of that step published.

So a checkpoint of step s implies lines 1..s. Resuming from it moves lines after s to `steps.rolled_back.jsonl` (their
training is not in the checkpoint, and their prompts come again) and drops a last line that the crash cut off.

Invariants: steps are 1, 2, 3, ... without gaps; no (epoch, ordinal) occurs in two lines of `steps.jsonl`; one process
writes a run directory at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rl.files import append_durably, json_line, read_json_lines, write_atomic, write_json_lines

FORMAT = 1

# A resumed run must agree in these; layout, engines, limits, logging, evaluation and length may change.
FIELDS_THAT_MATTER = (
    "run.seed",
    "model",
    "data",
    "reward.path",
    "reward.args",
    "reward.on_error",
    "sampling",
    "algorithm",
    "warmup",
    "trainer.optimizer",
    "critic.model_path",
    "critic.optimizer",
    "critic.clip",
    "critic.warmup_steps",
    "reward.model.path",
    "reward.model.weight",
)


class LedgerError(RuntimeError):
    """A run directory that cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class StepRecord:
    """One completed step: a rollout iteration and the training on its samples.

    Attributes:
        step: from 1, the number of steps completed with this one.
        weight_version: of the engines after this step.
        epoch: of the first prompt consumed.
        consumed: ``(epoch, ordinal)`` of every prompt consumed, each exactly once.
        sample_ids: the samples trained on.
        route_digests: by sample id, the digest (or one per layer) of the routes consumed.
        rewards: statistics of the rewards, by name.
        timings: seconds, by phase.
        extra: anything else worth keeping, JSON values.
    """

    step: int
    weight_version: int
    epoch: int
    consumed: tuple[tuple[int, int], ...]
    sample_ids: tuple[str, ...]
    route_digests: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepRecord:
        """The record of a line of `steps.jsonl`; unknown keys are left out."""
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        return cls(
            **{
                **known,
                "consumed": tuple((epoch, ordinal) for epoch, ordinal in value["consumed"]),
                "sample_ids": tuple(value["sample_ids"]),
            }
        )


class ResumeError(LedgerError):
    """A run that must not be resumed with this configuration or data."""


class Ledger:
    """The ledger of one run directory, open for appending.

    Make one with `create` or `resume`; look at a finished or running run with `read`. Close it (or use it as a
    context manager) to let another process resume.
    """

    def __init__(
        self,
        directory: Path,
        run: dict[str, Any],
        records: Sequence[StepRecord],
        lock: int | None,
        chain: str = "",
    ):
        self.directory = directory
        self._run = run
        self._records = list(records)
        self._lock = lock
        self._chain = chain  # of the last line
        self._consumed = {key for record in records for key in record.consumed}

    @classmethod
    def create(
        cls,
        directory: Path | str,
        *,
        config: Mapping[str, Any],
        versions: Mapping[str, str | None],
        topology: Mapping[str, Any],
        seeds: Mapping[str, int],
        data_digests: Mapping[str, str],
    ) -> Ledger:
        """Start a run in a directory that holds none.

        Args:
            directory: made when missing.
            config: the resolved configuration as nested plain values (`rl.config.to_dict`).
            versions: of Python and packages (`rl.versions.collect`).
            topology: which rank has which coordinates, number of engines (`rl.placement`).
            seeds: by what they seed.
            data_digests: by data source, ``"sha256:..."`` (`file_digest`, `items_digest`).

        Raises:
            LedgerError: the directory holds a run already, or another process uses it.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        try:
            if (directory / "run.json").exists():
                raise LedgerError(
                    f"expected a directory without a run, and {directory} holds one; continue it with --resume, or set "
                    "another run.name or run.output_dir."
                )
            run = {
                "format": FORMAT,
                "created": _now(),
                "config": dict(config),
                "versions": dict(versions),
                "topology": dict(topology),
                "seeds": dict(seeds),
                "data_digests": dict(data_digests),
                "sessions": [_session(0, from_step=0, versions=versions, topology=topology)],
            }
            ledger = cls(directory, run, [], lock)
            # Lines without run.json: a run that died while it was being created. They belong to nothing.
            (directory / "steps.jsonl").unlink(missing_ok=True)
            ledger._write_run()
        except BaseException:
            os.close(lock)
            raise
        return ledger

    @classmethod
    def resume(
        cls,
        directory: Path | str,
        *,
        checkpoint_step: int,
        config: Mapping[str, Any],
        versions: Mapping[str, str | None],
        topology: Mapping[str, Any],
        data_digests: Mapping[str, str],
        allow_changes: bool = False,
    ) -> Ledger:
        """Continue a run from the checkpoint of a step; what came after it is rolled back.

        Args:
            directory: the run directory.
            checkpoint_step: step of the newest whole checkpoint; 0: none, the run starts over.
            config, versions, topology, data_digests: as in `create`, of now.
            allow_changes: accept differences in fields that matter.

        Raises:
            LedgerError: no run here, another process uses it, or lines are missing.
            ResumeError: fields that matter, or the data, differ.
        """
        directory = Path(directory)
        run = _read_run(directory)
        if not allow_changes:
            _refuse_changes(directory, run, config, data_digests)
        lock = _lock(directory)
        try:
            run = _read_run(directory)
            lines = read_json_lines(directory / "steps.jsonl")
            records = [StepRecord.from_json(value) for value in lines.values]
            _refuse_gaps(directory, records, checkpoint_step)
            undone = [value for value in lines.values if value["step"] > checkpoint_step]
            number = len(run["sessions"])
            # Copy first, cut second: a crash in between leaves the lines in both files, and the copy is not repeated.
            _keep_rolled_back(directory / "steps.rolled_back.jsonl", undone, number)
            if undone or lines.torn:
                write_json_lines(directory / "steps.jsonl", lines.values[: len(lines.values) - len(undone)])
            session = _session(number, from_step=checkpoint_step, versions=versions, topology=topology)
            session["rolled_back"] = [value["step"] for value in undone]
            session["torn_bytes"] = len(lines.torn)
            session["changed"] = differences(_current_config(run), config)
            session["config"] = dict(config)
            run["sessions"].append(session)
            kept = lines.values[: len(lines.values) - len(undone)]
            chain = kept[-1].get("chain", "") if kept else ""
            ledger = cls(directory, run, records[: len(kept)], lock, chain)
            ledger._write_run()
        except BaseException:
            os.close(lock)
            raise
        return ledger

    @classmethod
    def read(cls, directory: Path | str) -> Ledger:
        """Look at a run without changing anything; a torn last line is left out. Raises `LedgerError`."""
        directory = Path(directory)
        lines = read_json_lines(directory / "steps.jsonl")
        return cls(directory, _read_run(directory), [StepRecord.from_json(value) for value in lines.values], None)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write this run directory. Closing twice is fine."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def run(self) -> Mapping[str, Any]:
        """What `run.json` holds."""
        return self._run

    @property
    def session(self) -> int:
        """Number of this session: 0 when created, then one more for each resume."""
        return len(self._run["sessions"]) - 1

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The completed steps, in order."""
        return tuple(self._records)

    @property
    def last_step(self) -> int:
        """The last completed step; 0 before the first."""
        return self._records[-1].step if self._records else 0

    def append(self, record: StepRecord) -> None:
        """Write a completed step; on return it is on disk, and its checkpoint may be published.

        Raises:
            LedgerError: not the next step, or a prompt that another step consumed.
            OSError: the line could not be written; the file is as before.
        """
        self._require_open()
        if record.step != self.last_step + 1:
            raise LedgerError(
                f"expected step {self.last_step + 1} after step {self.last_step}, came step {record.step}; "
                "write each step "
                "once and in order."
            )
        counts = Counter(record.consumed)
        repeated = sorted(key for key, count in counts.items() if count > 1 or key in self._consumed)
        if repeated:
            raise LedgerError(
                f"step {record.step}: expected each prompt of an epoch once, came again (epoch, ordinal) "
                f"{_listing(repeated)}; the data loader repeats prompts."
            )
        line = {**asdict(record), "session": self.session, "time": _now()}
        chain = line_digest(self._chain, line)
        append_durably(self.directory / "steps.jsonl", json_line({**line, "chain": chain}))
        self._chain = chain
        self._records.append(record)
        self._consumed.update(record.consumed)

    def finish(self, outcome: str, detail: str = "") -> None:
        """Note in `run.json` how this session ended: ``"finished"``, ``"failed"``, ``"interrupted"``, ``"thresholds"``,
        ``"stopped"`` (asked to, to be resumed).

        A session without an outcome was killed.
        """
        self._require_open()
        self._run["sessions"][-1].update(outcome=outcome, detail=detail, ended=_now(), last_step=self.last_step)
        self._write_run()

    def consumed_ordinals(self, epoch: int) -> tuple[int, ...]:
        """Ordinals of the prompts of an epoch that completed steps consumed, in order of consumption."""
        return tuple(
            ordinal for record in self._records for prompt_epoch, ordinal in record.consumed if prompt_epoch == epoch
        )

    def verify_exactly_once(self, epoch: int, size: int) -> None:
        """Prove that every prompt of an epoch was consumed exactly once.

        Args:
            epoch: from 0.
            size: prompts in the epoch; ordinals are 0..size-1.

        Raises:
            LedgerError: with the ordinals that are missing, repeated or out of range.
        """
        counts = Counter(self.consumed_ordinals(epoch))
        wrong = {
            "missing": [ordinal for ordinal in range(size) if ordinal not in counts],
            "repeated": sorted(ordinal for ordinal, count in counts.items() if count > 1),
            "out of range": sorted(ordinal for ordinal in counts if not 0 <= ordinal < size),
        }
        texts = [f"{what} {_listing(ordinals)}" for what, ordinals in wrong.items() if ordinals]
        if texts:
            raise LedgerError(
                f"epoch {epoch} of {self.directory}: expected each of {size} prompts once, came {len(counts)} "
                "different "
                f"ones: {'; '.join(texts)}."
            )

    def _write_run(self) -> None:
        content = json.dumps(self._run, indent=2, ensure_ascii=False)
        write_atomic(self.directory / "run.json", content.encode() + b"\n")

    def _require_open(self) -> None:
        if self._lock is None:
            raise LedgerError(
                f"the ledger of {self.directory} is not open for writing; use Ledger.create or Ledger.resume."
            )


def file_digest(path: Path | str) -> str:
    """``"sha256:..."`` of a file's bytes."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def line_digest(before: str, line: Mapping[str, Any]) -> str:
    """32 hex digits of a line of `steps.jsonl` and of the digest of the line before it (empty for the first).

    What the line says itself under ``chain`` is left out.
    """
    content = {key: value for key, value in line.items() if key != "chain"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(f"{before}\n{text}".encode(), digest_size=16).hexdigest()


def items_digest(items: Iterable[Any]) -> str:
    """``"sha256:..."`` of JSON values in order; keys of mappings are sorted first."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return "sha256:" + digest.hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Dotted fields whose values differ, each with ``[before, after]``; a missing field counts as null."""
    old, new = _flatten(before), _flatten(after)
    return {
        name: [old.get(name), new.get(name)]
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        # What JSON makes of it, so that a value compares equal to itself read back.
        return {prefix: json.loads(json.dumps(value))}
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return result


def _current_config(run: Mapping[str, Any]) -> Mapping[str, Any]:
    return run["sessions"][-1].get("config", run["config"])


def _refuse_changes(
    directory: Path, run: Mapping[str, Any], config: Mapping[str, Any], data_digests: Mapping[str, str]
) -> None:
    changed = differences(_current_config(run), config)
    matter = [f for f in changed if any(f == name or f.startswith(name + ".") for name in FIELDS_THAT_MATTER)]
    lines = [f"  - {name}: was {changed[name][0]!r}, is {changed[name][1]!r}" for name in matter]
    for name, (before, after) in differences(run["data_digests"], data_digests).items():
        lines.append(f"  - content of {name}: was {before}, is {after}")
    if lines:
        raise ResumeError(
            "\n".join(
                [
                    f"cannot resume {directory}: expected the configuration it was started with, and these "
                    "fields differ:",
                    *lines,
                    "Put them back, start a new run under another run.name, or pass --allow-changes to resume anyway "
                    "(the run is then not reproducible from one configuration).",
                ]
            )
        )


def _refuse_gaps(directory: Path, records: Sequence[StepRecord], checkpoint_step: int) -> None:
    steps = [record.step for record in records]
    if steps != list(range(1, len(steps) + 1)):
        raise LedgerError(
            f"{directory}/steps.jsonl: expected steps 1, 2, 3, ..., came {_listing(steps)}; the file was "
            "damaged; restore it."
        )
    if checkpoint_step > len(steps):
        raise LedgerError(
            f"cannot resume {directory} from the checkpoint of step {checkpoint_step}: expected a line for each "
            "step up to it "
            f"in steps.jsonl, came {len(steps)}; a step's line is written before its checkpoint, so lines were "
            "lost; restore "
            f"the file or resume from a checkpoint of step <= {len(steps)}."
        )


def _keep_rolled_back(path: Path, undone: Sequence[Mapping[str, Any]], session: int) -> None:
    """Append the lines that are not there yet; (session that wrote it, step) tells lines apart."""
    there = read_json_lines(path)
    if there.torn:
        write_json_lines(path, there.values)
    known = {(value["session"], value["step"]) for value in there.values}
    lines = [
        json_line({**value, "rolled_back_by_session": session})
        for value in undone
        if (value["session"], value["step"]) not in known
    ]
    if lines:
        append_durably(path, b"".join(lines))


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    if not path.is_file():
        raise LedgerError(f"expected a run directory with run.json, found none in {directory}; check the path.")
    run = json.loads(path.read_bytes())
    if run.get("format") != FORMAT:
        raise LedgerError(
            f"{path}: expected ledger format {FORMAT}, came {run.get('format')!r}; use the version of this "
            "program that wrote it."
        )
    return run


def _lock(directory: Path) -> int:
    """An exclusive lock that the system releases when the process ends, however it ends."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise LedgerError(
            f"another process (id {holder}) is writing {directory}; wait for it, end it, or use another run.output_dir."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _session(
    number: int, *, from_step: int, versions: Mapping[str, str | None], topology: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "session": number,
        "started": _now(),
        "from_step": from_step,
        "versions": dict(versions),
        "topology": dict(topology),
        "outcome": None,
    }


def _listing(items: Sequence[Any], shown: int = 20) -> str:
    text = ", ".join(map(str, items[:shown]))
    return f"[{text}]" if len(items) <= shown else f"[{text}, ... {len(items)} in all]"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
