"""Rows of the speed benchmarks: the table, the JSON file, the bars, and what they were measured on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EASY = 1.1  # up to here there is hardly anything to gain: ours is compared with stock
MEMORY_SHARE = 0.02
MOST_EXPOSED = 0.005  # of the time of an iteration, by planning and placement of plans made ahead
PLANNING_AND_PLACEMENT = ("loads", "plan", "weights, forward", "weights, again", "weights, backward")
MOST_REDUCTION = 0.01  # of a transformer layer's backward, at an imbalance of 2


@dataclass
class Row:
    """One method at one imbalance; the JSON file holds these.

    Attributes:
        imbalance: asked for; of a trace, measured.
        before, after: imbalance without and with replicas, mean over micro-batches and layers.
        ms: median time of an iteration, each the slowest rank's; ``p10_ms`` and ``p90_ms`` are its spread.
        noise: of ``balanced``, how far its two blocks lie apart (fraction); its ``ms`` is the mean of their medians.
        fraction_of_balanced: ``ms`` of ``balanced`` / ``ms``.
        device_gib: see :class:`scripts.bench_rank.Bench`.
        exposed_us: of ours, mean time of a layer's call that each part of balancing held up (us), on the slowest rank.
        exposed_share: of planning and placement (:data:`PLANNING_AND_PLACEMENT`) in the time of an iteration, over all
            layers' calls.
        gate: the constants it was given: a token (ns), a replica (us).
        reduction: of ours, a backward with and without the way home of replicas' gradients (ms), and the share it adds.
    """

    layout: str
    gpus: int
    imbalance: float
    method: str
    before: float
    after: float
    ms: float
    p10_ms: float
    p90_ms: float
    device_gib: float | None
    noise: float | None = None
    fraction_of_balanced: float | None = None
    replicas: float = 0.0
    slot_gib: float = 0.0
    skipped: dict[str, float] = field(default_factory=dict)
    exposed_us: dict[str, float] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    reduction: dict[str, float] = field(default_factory=dict)
    exposed_share: float = 0.0


class Report:
    """Prints rows and writes the JSON file as they come; only rank 0 does either."""

    def __init__(self, rank: int, file: str, document: dict[str, Any]) -> None:
        self.rank, self.file, self.document = rank, file, document
        self.rows: list[Row] = []

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        self.say("\n".join(line(row) for row in rows))
        if self.rank == 0 and self.file:
            write(self.file, self.document | {"rows": self.document["rows"] + [asdict(row) for row in self.rows]})


def asdict(row: Row) -> dict[str, Any]:
    """A row as the JSON file has it."""
    return {
        name: round(value, 5) if isinstance(value, float) else value for name, value in dataclasses.asdict(row).items()
    }


def write(file: str, document: dict[str, Any]) -> None:
    """Write the JSON file whole, so that a run that is cut off leaves what it has."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


HEADER = (
    f"{'imbalance':>9} {'method':9} {'before':>6} -> {'after':6} {'ms':>9} {'p10':>9} {'p90':>9} {'of balanced':>11} "
    f"{'GiB':>7} {'replicas':>8}"
)


def line(row: Row) -> str:
    """A row of the table."""
    fraction = "-" if row.fraction_of_balanced is None else f"{row.fraction_of_balanced:.3f}"
    memory = "-" if row.device_gib is None else f"{row.device_gib:.2f}"
    text = (
        f"{row.imbalance:9.3g} {row.method:9} {row.before:6.3f} -> {row.after:<6.3f} {row.ms:9.3f} {row.p10_ms:9.3f} "
        f"{row.p90_ms:9.3f} {fraction:>11} {memory:>7} {row.replicas if row.slot_gib else '-':>8}"
    )
    if row.noise is not None:
        text += f"  noise {row.noise:.1%}"
    if row.skipped:
        text += "  left alone: " + ", ".join(f"{name} {share:.0%}" for name, share in row.skipped.items())
    if row.gate:
        text += "\n" + " " * 20 + "gate: " + ", ".join(f"{name} {value:.1f}" for name, value in row.gate.items())
    if row.reduction:
        text += (
            "\n"
            + " " * 20
            + (
                f"gradients' way home: backward {row.reduction['backward_ms']:.3f} ms, without it "
                f"{row.reduction['without_ms']:.3f} ms, adds {row.reduction['share']:.2%}"
            )
        )
    if row.exposed_us:
        text += f"\n{'':20}planning and placement hold up {row.exposed_share:.2%} of the time"
        text += "\n" + " " * 20 + "exposed us: " + "; ".join(f"{n} {us:.1f}" for n, us in row.exposed_us.items())
    return text


def missed_bars(
    rows: list[Row], bar: Callable[[float], float], *, memory: bool, foresight: float | None = None
) -> list[str]:
    """What ours should keep and does not.

    Args:
        rows: of all shapes.
        bar: least fraction of balanced, by imbalance.
        memory: ours at the highest imbalance takes no more than balanced, its slots and 2%.
        foresight: least fraction of balanced of plans made ahead; planning and placement then hold up at most 0.5%.
    """
    missed = []
    by_layout: dict[str, list[Row]] = {}
    for row in rows:
        by_layout.setdefault(row.layout, []).append(row)
    for layout, these in by_layout.items():
        stock = {row.imbalance: row for row in these if row.method == "stock"}
        ours = [row for row in these if row.method == "ours"]
        if not ours:
            missed.append(f"{layout}: ours was not measured")
        for row in ours:
            where = f"{layout}, imbalance {row.imbalance:g}"
            if row.imbalance <= EASY:
                if row.imbalance in stock and not row.ms * 0.99 <= stock[row.imbalance].ms:
                    missed.append(f"{where}: {stock[row.imbalance].ms / row.ms:.3f} of stock, the bar is 0.99")
            elif row.fraction_of_balanced is not None and not row.fraction_of_balanced >= bar(row.imbalance):
                missed.append(f"{where}: {row.fraction_of_balanced:.3f} of balanced, the bar is {bar(row.imbalance)}")
        missed += [
            f"{layout}, imbalance {row.imbalance:g}: gradients' way home adds {row.reduction['share']:.2%} to the "
            f"backward, the bar is {MOST_REDUCTION:.0%}"
            for row in ours
            if "transformer" in layout and row.imbalance == 2 and row.reduction.get("share", 0.0) > MOST_REDUCTION
        ]
        if foresight is not None:
            missed += _missed_by_foresight(layout, [row for row in these if row.method == "foresight"], foresight)
        verdict = memory_verdict(these)
        if memory and verdict is not None and not verdict[0]:
            missed.append(f"{layout}: {verdict[1]}")
    return missed


def _missed_by_foresight(layout: str, rows: list[Row], least: float) -> list[str]:
    missed = []
    for row in rows:
        where = f"{layout}, imbalance {row.imbalance:g}, foresight"
        if row.imbalance > EASY and row.fraction_of_balanced is not None and not row.fraction_of_balanced >= least:
            missed.append(f"{where}: {row.fraction_of_balanced:.3f} of balanced, the bar is {least}")
        if row.exposed_share > MOST_EXPOSED:
            missed.append(
                f"{where}: planning and placement hold up {row.exposed_share:.2%} of the time, the bar is "
                f"{MOST_EXPOSED:.1%}"
            )
    return missed


def memory_verdict(rows: list[Row]) -> tuple[bool, str] | None:
    """Whether the memory bar holds for one shape, and the figures; None without device memory."""
    ours = [row for row in rows if row.method == "ours"]
    highest = max(ours, key=lambda row: row.imbalance, default=None)
    if highest is None or highest.device_gib is None:
        return None
    balanced = next((r.device_gib for r in rows if (r.method, r.imbalance) == ("balanced", highest.imbalance)), None)
    if balanced is None:
        return None
    most = balanced * (1 + MEMORY_SHARE) + highest.slot_gib
    text = (
        f"memory at an imbalance of {highest.imbalance:g}: ours {highest.device_gib:.2f} GiB, slots "
        f"{highest.slot_gib:.3f} GiB, bar (balanced + slots + 2%) {most:.2f} GiB"
    )
    return highest.device_gib <= most, text


def versions() -> dict[str, str]:
    """Of what is measured, read from installed files: nothing is imported for it but torch."""
    import torch

    from megatron_ultraep.megatron import compat

    found = {"python": platform.python_version(), "torch": torch.__version__, "megatron-core": compat.version()}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        for name in ("transformer-engine", "triton"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "none"
    return found
