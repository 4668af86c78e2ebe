"""When generation's tail is gathered (R_t unfinished samples), and how densely: chosen by simulation, and kept.

    chooser = ThresholdChooser(engines=4, seats=64, kv_tokens=400_000, longest=4352, profile=profile)
    chooser.observe(groups, generate_seconds=61.0, inference=InferenceCost(...))    # after every step
    choice = chooser.choose()                                                       # before the next one

Rule: the lengths of the last ``window`` steps are simulated with every candidate (0, 5, ... 50% of a batch, with each
BS_max that may be chosen), at the speed that generation was measured at. The threshold changes only when

- there was none from lengths yet, or lengths have *drifted*: the Kolmogorov-Smirnov distance between those that it was
  chosen for and the recent ones exceeds by ``drift`` what chance makes of the same law, ``1.36 sqrt(1/n + 1/m)`` with n
  and m prompts (the test's 5% level; samples of a prompt are alike, so prompts are what is drawn); or the measured cost
  of inference against generation has changed by more than a quarter;
- and the best candidate saves more than ``margin`` of the step over keeping the present one.

The first condition keeps a run from simulating every step, the second from flapping between candidates that are alike.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from rl.rollout.latency import LatencyProfile
from rl.simulation.generation import SimGroup
from rl.simulation.tail import InferenceCost, TailSweep, simulate_tails

FRACTIONS = tuple(percent / 100 for percent in range(0, 55, 5))
_COSTS_CHANGED = 0.25
_KS_5_PERCENT = 1.36


@dataclass(frozen=True)
class Choice:
    """A threshold and why.

    Attributes:
        threshold: R_t in samples; 0: the tail is not gathered.
        changed: whether it is another than before.
        reason: for the ledger.
        predicted_seconds, plain_seconds: of generation and inference, with it and without gathering; None: not
            simulated.
        seats: BS_max that goes with it; None: not chosen.
    """

    threshold: int
    changed: bool
    reason: str
    predicted_seconds: float | None = None
    plain_seconds: float | None = None
    seats: int | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"threshold": self.threshold, "changed": self.changed, "reason": self.reason}
        if self.seats is not None:
            found["seats"] = self.seats
        if self.predicted_seconds is not None and self.plain_seconds is not None:
            found |= {
                "predicted_seconds": round(self.predicted_seconds, 4),
                "plain_seconds": round(self.plain_seconds, 4),
            }
        return found


class ThresholdChooser:
    """See the module's docstring.

    Args:
        engines: as many as devices.
        seats: of an engine.
        kv_tokens: that an engine's cache holds.
        longest: L_max, tokens of the longest possible sample.
        profile: latency of an engine.
        tail_seats: values of BS_max to choose from; ``seats`` by default.
        window: steps whose lengths count.
        drift: distance of distributions beyond chance, from 0 to 1.
        margin: of a step's time.
    """

    def __init__(
        self,
        *,
        engines: int,
        seats: int,
        kv_tokens: int,
        longest: int,
        profile: LatencyProfile,
        tail_seats: Sequence[int] = (),
        window: int = 3,
        drift: float = 0.1,
        margin: float = 0.02,
    ) -> None:
        if not (window >= 1 and 0 <= drift <= 1 and margin >= 0):
            raise ValueError(f"expected window >= 1, drift from 0 to 1, margin >= 0; got {window}, {drift}, {margin}")
        self.engines, self.seats, self.kv_tokens, self.longest = engines, seats, kv_tokens, longest
        self.profile, self.options = profile, tuple(sorted(set(tail_seats) or {seats}))
        self.drift, self.margin = drift, margin
        self.threshold, self.tail_seats = 0, self.options[0]
        self._batches: deque[Sequence[SimGroup]] = deque(maxlen=window)
        self._slowdowns: deque[float] = deque(maxlen=window)
        self._costs: deque[InferenceCost] = deque(maxlen=window)
        self._chosen_for: np.ndarray | None = None
        self._chosen_prompts = 0
        self._chosen_at = 0.0

    def observe(self, groups: Sequence[SimGroup], generate_seconds: float, inference: InferenceCost) -> None:
        """A step has ended.

        Args:
            groups: its prompts and response lengths.
            generate_seconds: until its last sample, as measured, with the threshold of that step.
            inference: what its passes cost.
        """
        wanted = [self.threshold] if self.threshold else []
        sweep = self._sweep(groups, self.profile, InferenceCost(0.0), wanted, self.tail_seats)
        simulated = sweep.by_threshold.get(self.threshold, sweep.plain).generated
        self._batches.append(groups)
        self._slowdowns.append(generate_seconds / simulated if generate_seconds > 0 and simulated > 0 else 1.0)
        self._costs.append(inference)

    def choose(self) -> Choice:
        """The threshold of the next batch."""
        if not self._batches:
            return Choice(self.threshold, False, "no lengths have been seen yet", seats=self.tail_seats)
        lengths = np.array([n for groups in self._batches for group in groups for n in group.lengths])
        slowdown = statistics.median(self._slowdowns)
        per_token = statistics.median(cost.seconds_per_token for cost in self._costs)
        relative = per_token / slowdown
        prompts = sum(len(groups) for groups in self._batches)
        why = self._why(lengths, prompts, relative)
        if why is None:
            reason = "lengths and costs are those that it was chosen for"
            return Choice(self.threshold, False, reason, seats=self.tail_seats)
        samples = min(sum(len(group.lengths) for group in groups) for groups in self._batches)
        thresholds = sorted({round(fraction * samples) for fraction in FRACTIONS} | {self.threshold})
        latest = self._costs[-1]
        costs = InferenceCost(
            per_token, statistics.median(cost.switch_seconds for cost in self._costs), latest.devices_per_block
        )
        profile = self.profile.scaled(1 / slowdown)
        sweeps = {
            seats: [self._sweep(groups, profile, costs, thresholds, seats) for groups in self._batches]
            for seats in self.options
        }

        def seconds(threshold: int, seats: int) -> float:
            # A batch that is never down to so few at once is as it would be without.
            return statistics.fmean(sweep.by_threshold.get(threshold, sweep.plain).seconds for sweep in sweeps[seats])

        candidates = itertools.product(thresholds, self.options)
        best, seats = min(candidates, key=lambda candidate: (seconds(*candidate), *candidate))
        present, predicted = seconds(self.threshold, self.tail_seats), seconds(best, seats)
        plain = seconds(0, seats)
        self._chosen_for, self._chosen_prompts, self._chosen_at = lengths, prompts, relative
        if present - predicted <= self.margin * present:
            reason = (
                f"{why}: {best} samples would take {predicted:.3g} s, {self.threshold} take {present:.3g} s: not "
                f"{self.margin:.0%} less"
            )
            return Choice(self.threshold, False, reason, present, plain, self.tail_seats)
        reason = (
            f"{why}: at {best} of {samples} samples, {seats} an engine, generation and inference of "
            f"{len(self._batches)} recent batches take {predicted:.3g} s, {present:.3g} s at {self.threshold}, "
            f"{plain:.3g} s without gathering"
        )
        self.threshold, self.tail_seats = best, seats
        return Choice(best, True, reason, predicted, plain, seats)

    def _why(self, lengths: np.ndarray, prompts: int, relative: float) -> str | None:
        """Why to simulate anew; None: there is no reason."""
        if self._chosen_for is None:
            return "first lengths"
        distance = float(ks_2samp(self._chosen_for, lengths, method="asymp").statistic)
        chance = _KS_5_PERCENT * math.sqrt(1 / prompts + 1 / self._chosen_prompts)
        if distance > self.drift + chance:
            return f"lengths drifted by {distance:.2f} (KS, {chance:.2f} would be chance)"
        if abs(relative - self._chosen_at) > _COSTS_CHANGED * self._chosen_at:
            return f"inference against generation went from {self._chosen_at:.3g} to {relative:.3g} s/token"
        return None

    def _sweep(
        self,
        groups: Sequence[SimGroup],
        profile: LatencyProfile,
        costs: InferenceCost,
        thresholds: Sequence[int],
        tail_seats: int,
    ) -> TailSweep:
        return simulate_tails(
            groups,
            profile,
            engines=self.engines,
            seats=self.seats,
            kv_tokens=self.kv_tokens,
            costs=costs,
            thresholds=thresholds,
            tail_seats=tail_seats,
            longest=self.longest,
        )
