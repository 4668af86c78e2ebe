"""How far generation may run ahead of training, and how stale the tokens are that a step trains on.

Batch ``b`` (from 0) is the set of prompts that training step ``b + 1`` takes: which prompts those are is decided by
the order of the data, never by which of them finish first, so short responses do not crowd into early steps. Let ``s``
be the number of training steps that are in the newest weights which **all** engines have. With a bound of ``n`` steps,

    generation of batch b may start   iff   b - s <= n            (admission)
    staleness of a token              =     b - w  <= n           (w: steps in the weights that it was sampled with)

since weights only get newer while a sample is generated: ``w >= s`` at its start. ``n = 0`` is synchronous: a batch
starts when every step before it is in the engines. ``n = 1`` is one-step asynchronous: one batch is generated while
the one before it trains. With batches of B prompts, admission is the rule of AReaL (arXiv:2505.24298, section 5.1)
``floor((N - 1) / B) <= s + n``, N being the prompts submitted with the new one.

Weight versions are names, not step counts: a resumed run sends its engines the same step's weights under a new
version. So the accountant is told which step each version holds, and starts afresh from the step that was resumed;
what had been generated ahead is generated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rl.types import Sample


class StaleSample(RuntimeError):
    """A sample holds tokens from weights older than the bound allows, or from weights nobody sent."""


@dataclass(frozen=True)
class Staleness:
    """Of the response tokens of one step, in training steps.

    Attributes:
        mean, largest: over tokens; 0 without any.
        mixed: fraction of the samples with tokens of more than one version.
    """

    mean: float
    largest: int
    mixed: float


@dataclass
class StalenessAccountant:
    """Counts admitted batches and versions; see the module's docstring. Not for several threads at once.

    Attributes:
        bound: n, in training steps; >= 0.
        trained: training steps that are done; a resumed run begins with the step of its checkpoint.
        admitted: batches whose generation was started, those that are trained included.
    """

    bound: int
    trained: int = 0
    admitted: int = field(init=False)
    _steps_of: dict[int, int] = field(init=False, default_factory=dict)
    _in_engines: int = field(init=False)

    def __post_init__(self) -> None:
        if self.bound < 0 or self.trained < 0:
            raise ValueError(f"expected a bound and a number of steps >= 0, got {self.bound} and {self.trained}")
        self.admitted = self._in_engines = self.trained

    def delivered(self, version: int, steps: int) -> None:
        """All engines have ``version``, the weights after ``steps`` training steps, or newer ones.

        Raises:
            ValueError: weights newer than training is.
        """
        if steps > self.trained:
            raise ValueError(f"version {version}: expected weights of step 0 to {self.trained}, got step {steps}")
        self.announce(version, steps)
        self._in_engines = max(self._in_engines, steps)

    def announce(self, version: int, steps: int) -> None:
        """``version`` is on its way to the engines, so tokens may come that were sampled with it."""
        self._steps_of[version] = steps

    def may_admit(self) -> bool:
        """Whether the next batch may start now."""
        return self.admitted - self._in_engines <= self.bound

    def admit(self) -> int:
        """Start the next batch; returns its number.

        Raises:
            RuntimeError: the bound forbids it now.
        """
        if not self.may_admit():
            raise RuntimeError(
                f"batch {self.admitted} would be {self.admitted - self._in_engines} steps stale, the bound is "
                f"{self.bound}: wait until engines have newer weights than those of step {self._in_engines}"
            )
        self.admitted += 1
        return self.admitted - 1

    def completed(self) -> None:
        """One more training step is done.

        Raises:
            RuntimeError: of a batch that was never started.
        """
        if self.trained >= self.admitted:
            raise RuntimeError(f"step {self.trained + 1} trained on a batch that was never started: admit it first")
        self.trained += 1

    def measure(self, batch: int, samples: Sequence[Sample]) -> Staleness:
        """Staleness of samples that step ``batch + 1`` trains on.

        Raises:
            StaleSample: a token is older than the bound, or of a version that was never announced.
        """
        total, tokens, largest = 0.0, 0, 0
        for sample in samples:
            for version, count in _tokens_by_version(sample):
                if version not in self._steps_of:
                    raise StaleSample(
                        f"sample {sample.sample_id}: tokens of weight version {version}, expected one of "
                        f"{sorted(self._steps_of)}: no such weights were sent to engines"
                    )
                age = batch - self._steps_of[version]
                if age > self.bound:
                    raise StaleSample(
                        f"sample {sample.sample_id}: tokens that are {age} steps old (version {version}), the bound is "
                        f"{self.bound}"
                    )
                total, tokens, largest = total + age * count, tokens + count, max(largest, age)
        mixed = float(np.mean([len(s.weight_versions) > 1 for s in samples])) if samples else 0.0
        return Staleness(total / max(1, tokens), largest, mixed)


def _tokens_by_version(sample: Sample) -> Iterable[tuple[int, int]]:
    starts = [start for start, _ in sample.weight_versions] + [len(sample.response_tokens)]
    for (start, version), stop in zip(sample.weight_versions, starts[1:], strict=True):
        if stop > start:
            yield version, stop - start
