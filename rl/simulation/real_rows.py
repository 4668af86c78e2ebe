"""Measured runs in the form that the simulator is compared with.

A JSON file ``{"rows": [row, ...]}``; a row is one run:

    {"mode": "streaming",           # sync, streaming, async or colocated
     "engines": 1, "seats": 16,     # EngineConfig.max_num_seqs
     "dispatch": "fcfs",            # optional; any policy that needs no predictions
     "chunk_groups": 4,             # optional, 1: fewest groups that training takes
     "staleness": 0,                # optional, async only
     "in_flight": "continue",       # optional: or "finish"
     "train": {"fixed_seconds": 0.2, "seconds_per_token": 2e-4, "apply_seconds": 0.1},
     "transfer_seconds": 0.3,       # optional, 0: optimizer step to weights at engines; median of the run
     "update_seconds": 0.05,        # optional, 0: engines stand still
     "switch_seconds": 0.0,         # optional, 0: colocated, each way
     "slowdown": 1.0,               # optional: time of an engine step in this run / in the profile (shared cores)
     "skip": 0,                     # optional: so many first steps are simulated and not compared (a loop that fills)
     "steps": [{"step_seconds": 9.8,                          # wall clock, as LoopResult.step_seconds counts it
                "prompt_tokens": 24,                          # mean of the set
                "lengths": [[12, 80, 31, 9], [7, 7, 64, 5]]}]}  # response tokens by group, in order of submission

``train`` is a fit over the chunks of the same run. Steps in which kernels are compiled are to be skipped, or left out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.rollout.dispatch import get_dispatch
from rl.rollout.latency import LatencyProfile
from rl.simulation.generation import Generation, SimGroup
from rl.simulation.loops import LoopResult, LoopSettings, TrainCost, simulate


@dataclass(frozen=True)
class RealRow:
    """A measured run; see the module.

    Attributes:
        step_seconds: of every step.
        batches: the groups of every step, with the lengths they had.
        skip: first steps that are simulated and not compared.
    """

    engines: int
    seats: int
    dispatch: str
    settings: LoopSettings
    train: TrainCost
    slowdown: float
    step_seconds: tuple[float, ...]
    batches: tuple[tuple[SimGroup, ...], ...]
    skip: int = 0


def read_real_rows(path: str | Path) -> list[RealRow]:
    """Raises ValueError: the file is not of that form; the message names row and fault."""
    document = json.loads(Path(path).read_text())
    rows = document.get("rows") if isinstance(document, dict) else None
    if not rows:
        raise ValueError(f'{path}: expected {{"rows": [...]}} with at least one row; see rl/simulation/real_rows.py')
    found = []
    for i, row in enumerate(rows):
        try:
            found.append(_row(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {i}: {error!r}; see rl/simulation/real_rows.py for the form") from error
    return found


def _row(row: Mapping[str, Any]) -> RealRow:
    settings = LoopSettings(
        row["mode"],
        chunk_groups=row.get("chunk_groups", 1),
        staleness=row.get("staleness", 0),
        transfer_seconds=row.get("transfer_seconds", 0.0),
        update_seconds=row.get("update_seconds", 0.0),
        in_flight=row.get("in_flight", "continue"),
        switch_seconds=row.get("switch_seconds", 0.0),
    )
    batches, order = [], 0
    for step, measured in enumerate(row["steps"]):
        groups = []
        for lengths in measured["lengths"]:
            prompt = round(measured["prompt_tokens"])
            groups.append(SimGroup(f"b{step}/{order}", order, step, prompt, tuple(int(n) for n in lengths)))
            order += 1
        batches.append(tuple(groups))
    if not batches or not all(batches):
        raise ValueError("expected at least one step, and groups in each")
    skip = int(row.get("skip", 0))
    if not 0 <= skip < len(batches):
        raise ValueError(f"expected to skip fewer than {len(batches)} steps, got {skip}")
    return RealRow(
        row["engines"],
        row["seats"],
        row.get("dispatch", "fcfs"),
        settings,
        TrainCost(**row["train"]),
        float(row.get("slowdown", 1.0)),
        tuple(float(measured["step_seconds"]) for measured in row["steps"]),
        tuple(batches),
        skip,
    )


def simulate_row(row: RealRow, profile: LatencyProfile) -> LoopResult:
    """The same run, simulated."""
    used = profile.scaled(1 / row.slowdown)
    settings: dict[str, Callable[[int], float]] = {"step_seconds": used} if row.dispatch == "skew_aware" else {}
    generation = Generation(
        used,
        row.engines,
        row.seats,
        get_dispatch(row.dispatch, **settings),
        prefill_seconds_per_token=used.prefill_seconds_per_token,
        group_seconds=used.group_seconds,
    )
    return simulate(row.batches, generation, row.train, row.settings)


def compare(row: RealRow, profile: LatencyProfile) -> dict[str, Any]:
    """Mean step times of both and the error of the simulated one, as a fraction of the measured."""
    result = simulate_row(row, profile)
    real, simulated = statistics.fmean(row.step_seconds[row.skip :]), result.mean_step_seconds(row.skip)
    return {
        "mode": row.settings.mode,
        "staleness": row.settings.staleness,
        "engines": row.engines,
        "steps": len(row.batches) - row.skip,
        "measured_step_seconds": real,
        "simulated_step_seconds": simulated,
        "error": simulated / real - 1,
        "engine_idle": result.engine_idle,
        "trainer_idle": result.trainer_idle,
    }
