"""How long one engine step takes against how many samples it computes: measured, not assumed.

A step gives every running sample one token, so its time is also the time per token of each of them (StreamRL's
``PTL``). ``scripts/measure_latency.py`` measures a real engine and writes such a profile.

    profile = LatencyProfile.load("benchmarks/data/latency-tiny-cpu.json")
    profile(64)     # seconds of a step with 64 samples running
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

FORMAT = "ultraep-latency-1"


@dataclass(frozen=True)
class LatencyProfile:
    """Time of an engine's steps.

    Between measured points: monotone cubic interpolation. Beyond the last: along the line through the last two (no
    falling). Below the first: the first. Noise that makes a larger batch look faster is averaged away (isotonic
    regression), so the profile never falls.

    Attributes:
        running: samples computed in a step, increasing, at least two points.
        seconds: measured time of such a step.
        prefill_seconds_per_token: what each prompt token adds to the step that reads it.
        group_seconds: from a group's last token until it is in the caller's hands, while the engine goes on.
        provenance: what was measured where and when: model, hardware, versions, date.

    Raises:
        ValueError: points out of order, times that are not positive, or fewer than two points.
    """

    running: tuple[int, ...]
    seconds: tuple[float, ...]
    prefill_seconds_per_token: float = 0.0
    group_seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if len(self.running) != len(self.seconds) or len(self.running) < 2:
            problems.append(
                f"expected at least two points, a time for each, got {len(self.running)} batch sizes and "
                f"{len(self.seconds)} times"
            )
        if (
            any(b <= a for a, b in zip(self.running, self.running[1:], strict=False))
            or min(self.running, default=1) < 1
        ):
            problems.append(f"expected increasing batch sizes from 1, got {list(self.running)}")
        if not all(math.isfinite(value) and value > 0 for value in self.seconds):
            problems.append(f"expected positive times in seconds, got {list(self.seconds)}")
        for name in ("prefill_seconds_per_token", "group_seconds"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                problems.append(f"expected {name} >= 0 seconds, got {getattr(self, name)}")
        if problems:
            raise ValueError("latency profile: " + "; ".join(problems) + "; measure again (scripts/measure_latency.py)")

    def __call__(self, running: int) -> float:
        """Seconds of a step with that many samples running, >= 1."""
        if running < 1:
            raise ValueError(f"expected at least one running sample, got {running}")
        last = self.running[-1]
        if running >= last:
            smooth = self._smooth
            slope = (smooth[-1] - smooth[-2]) / (last - self.running[-2])
            return float(smooth[-1] + slope * (running - last))
        return float(self._curve(max(running, self.running[0])))

    def slowdown(self, steps: Iterable[Mapping[int, tuple[int, float]]]) -> float | None:
        """Measured time of engine steps over what the profile says; None without steps.

        Args:
            steps: of each engine, see ``RolloutEngine.step_times``.
        """
        measured = expected = 0.0
        for engine in steps:
            for running, (count, seconds) in engine.items():
                measured += seconds
                expected += count * self(running)
        return measured / expected if expected else None

    def table(self, most: int) -> np.ndarray:
        """float64 ``[most + 1]``: seconds of a step by running samples; entry 0 is 0."""
        return np.array([0.0] + [self(running) for running in range(1, most + 1)])

    def best_tokens_per_second(self, seats: int) -> float:
        """The most tokens per second that an engine with that many seats makes, whatever runs on it."""
        return max(running / self(running) for running in range(1, seats + 1))

    def scaled(self, speed: float) -> LatencyProfile:
        """The profile of an engine ``speed`` times as fast."""
        if not speed > 0:
            raise ValueError(f"expected a speed > 0, got {speed}")
        return LatencyProfile(
            self.running,
            tuple(value / speed for value in self.seconds),
            self.prefill_seconds_per_token / speed,
            self.group_seconds / speed,
            self.provenance,
        )

    @cached_property
    def _smooth(self) -> np.ndarray:
        return isotonic_regression(self.seconds).x

    @cached_property
    def _curve(self) -> PchipInterpolator:
        return PchipInterpolator(self.running, self._smooth)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "points": [list(point) for point in zip(self.running, self.seconds, strict=True)],
            "prefill_seconds_per_token": self.prefill_seconds_per_token,
            "group_seconds": self.group_seconds,
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> LatencyProfile:
        """Raises ValueError: not a profile of this format, or one that makes no sense."""
        if value.get("format") != FORMAT:
            raise ValueError(f"expected a latency profile of format {FORMAT!r}, got {value.get('format')!r}")
        points: Sequence[Sequence[float]] = value["points"]
        return LatencyProfile(
            tuple(int(running) for running, _ in points),
            tuple(float(seconds) for _, seconds in points),
            float(value["prefill_seconds_per_token"]),
            float(value.get("group_seconds", 0.0)),
            value.get("provenance", {}),
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> LatencyProfile:
        """Read a profile; ``ValueError`` names the file when it is none."""
        try:
            return LatencyProfile.from_json(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no latency profile: {error}; write one with scripts/measure_latency.py"
            ) from error
