"""Groups whose response lengths follow a law, and predictions of them that are right to a given degree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rl.rollout.predictors import recall_of_longest
from rl.simulation.generation import SimGroup


@dataclass(frozen=True)
class LengthLaw:
    """How long responses are.

    Attributes:
        name: ``"lognormal"``, or ``"bimodal"``: a share of the prompts ("hard") has ``hard_factor`` times the median.
        median: tokens of the median response.
        sigma: standard deviation of the logarithm of a response's length.
        cap: most tokens.
        within: share of the variance that lies between the samples of one prompt; the rest between prompts.
        hard_share, hard_factor: see ``name``.
    """

    name: str = "lognormal"
    median: float = 2000.0
    sigma: float = 1.0
    cap: int = 30_000
    within: float = 0.2
    hard_share: float = 0.1
    hard_factor: float = 8.0

    def __post_init__(self) -> None:
        if self.name not in ("lognormal", "bimodal"):
            raise ValueError(f'expected the law "lognormal" or "bimodal", got {self.name!r}')
        if not (self.median >= 1 and self.cap >= 1 and self.sigma >= 0 and 0 <= self.within <= 1):
            raise ValueError(f"expected median, cap >= 1, sigma >= 0 and within from 0 to 1, got {self}")


def draw_groups(
    law: LengthLaw,
    groups: int,
    samples: int,
    seed: int,
    prompt_tokens: int = 256,
    batch: int = 0,
    first_order: int = 0,
) -> list[SimGroup]:
    """``groups`` prompts of ``samples`` responses each; the same for the same arguments."""
    rng = np.random.default_rng([seed, batch, groups, samples])
    between = rng.standard_normal((groups, 1)) * np.sqrt(1 - law.within)
    within = rng.standard_normal((groups, samples)) * np.sqrt(law.within)
    logarithm = np.log(law.median) + law.sigma * (between + within)
    if law.name == "bimodal":
        logarithm += np.log(law.hard_factor) * (rng.random((groups, 1)) < law.hard_share)
    lengths = np.clip(np.rint(np.exp(logarithm)), 1, law.cap).astype(np.int64)
    return [
        SimGroup(f"b{batch}/{i}", first_order + i, batch, prompt_tokens, tuple(row))
        for i, row in enumerate(lengths.tolist())
    ]


def with_predictions(groups: Sequence[SimGroup], recall: float, seed: int, fraction: float = 0.2) -> list[SimGroup]:
    """Groups with predictions of their longest response that find the given share of the longest ``fraction``.

    Prompts are ranked by the true logarithm plus normal noise, whose size is found by bisection (none at 1.0), and get
    the true lengths in that order: a ranker knows how lengths are distributed, not whose they are. The recall reached
    is close to the one asked for, where noise can reach it at all: pure noise still finds ``fraction`` of them.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"expected a recall above 0 and up to 1, got {recall}")
    actual = np.array([max(group.lengths) for group in groups], dtype=np.float64)
    noise = np.random.default_rng([seed, 77]).standard_normal(len(groups))
    if recall == 1:
        predicted = actual
    else:
        low, high = 0.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            found = recall_of_longest(actual * np.exp(middle * noise), actual, fraction)
            low, high = (middle, high) if found > recall else (low, middle)
        predicted = np.empty_like(actual)
        predicted[np.argsort(actual * np.exp(high * noise), kind="stable")] = np.sort(actual)
    return [
        replace(group, predicted_tokens=float(tokens)) for group, tokens in zip(groups, predicted.tolist(), strict=True)
    ]
