"""What a person watching the run sees: a progress bar on a terminal, one line per step elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

SHOWN = (
    # metric, label, format
    ("rollout/reward/mean", "reward", ".3f"),
    ("rollout/response_length/mean", "length", ".1f"),
    ("perf/tokens_per_second", "tokens/s", ",.0f"),
    ("perf/step_time", "s/step", ".2f"),
    ("warmup/loss", "loss", ".3f"),
    ("warmup/accuracy", "accuracy", ".3f"),
)


class Progress:
    """Progress over the steps of one part of a run.

    Args:
        total: steps in all; None when unknown.
        label: what the steps are, e.g. ``"train"`` or ``"warm-up"``.
        initial: steps done before (after a resume).
        enabled: show nothing when false.
        stream: where to; None: stderr. A bar if it is a terminal, lines if not.
    """

    def __init__(
        self,
        total: int | None,
        label: str = "train",
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        self._total, self._label, self._enabled = total, label, enabled
        self._stream = stream if stream is not None else sys.stderr
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=label,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """What is being done now; shown beside the bar only."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._label}: {name}")

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step is done. ``step`` counts from 1."""
        if not self._enabled:
            return
        shown = summary(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            total = "" if self._total is None else f"/{self._total}"
            print(f"{self._label} {step}{total}  {shown}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is. Closing twice is fine."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def summary(metrics: Mapping[str, Any]) -> str:
    """The metrics worth a glance, e.g. ``reward 0.412  length 12.3  tokens/s 1,204``."""
    parts = []
    for name, label, form in SHOWN:
        value = metrics.get(name)
        if value is not None and math.isfinite(float(value)):
            parts.append(f"{label} {float(value):{form}}")
    return "  ".join(parts)
