"""A rollout engine as a Ray actor: its samples, and their routes as an object of its own.

Rows of routes of all samples of an answer are a second return value of the actor's call. Ray then keeps them in the
object store of the engine's node, but they belong to the process that asked: they can still be fetched, by anybody,
when the engine's process is gone. What the engine put there itself would go with it. (Up to 100 KB, Ray hands them over
with the answer instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from rl.rollout.config import Sampling
from rl.rollout.engine import RolloutEngine
from rl.rollout.validation import RefusedSample
from rl.types import Prompt, RouteRef, Sample

Answer = Sample | RefusedSample | None


class EngineActor(RolloutEngine):
    """What the pool starts with ``ray.remote``."""

    async def generate_apart(
        self, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> tuple[Any, ...]:
        """:meth:`generate` with two return values: samples whose routes have no handle, and the rows of all of them
        (None where there are none)."""
        return _apart(await self.generate(prompt, sample_ids, sampling, seed))

    async def continue_apart(self, samples: Sequence[Sample], sampling: Sampling, seed: int) -> tuple[Any, ...]:
        """:meth:`continue_samples`, likewise."""
        return _apart(await self.continue_samples(samples, sampling, seed))

    async def finished_apart(self, sample_ids: Sequence[str]) -> tuple[Any, ...]:
        """:meth:`finished`, likewise; None for those that have not ended."""
        return _apart(self.finished(sample_ids))


def call_apart(method: Any, *arguments: Any) -> tuple[ray.ObjectRef, ray.ObjectRef]:
    """Call a method of :class:`EngineActor`; references to the samples and to the rows of all of them."""
    samples, rows = method.options(num_returns=2).remote(*arguments)
    return samples, rows


def with_rows(samples: Sequence[Answer], rows: ray.ObjectRef) -> list[Answer]:
    """The samples of :func:`call_apart` with references to their rows."""
    return [s if (routes := _routes(s)) is None else _with(s, replace(routes, handle=rows)) for s in samples]


def _apart(samples: Sequence[Answer]) -> tuple[Any, ...]:
    answers: list[Answer] = []
    arrays: list[np.ndarray] = []
    first = 0
    for sample in samples:
        routes = _routes(sample)
        if routes is None:
            answers.append(sample)
            continue
        answers.append(_with(sample, replace(routes, handle=None, first=first)))
        arrays.append(routes.of(routes.handle))
        first += len(arrays[-1])
    return answers, np.concatenate(arrays) if arrays else None


def _routes(sample: Answer) -> RouteRef | None:
    return sample.routes if isinstance(sample, Sample) else None


def _with(sample: Answer, routes: RouteRef) -> Answer:
    assert isinstance(sample, Sample)
    return replace(sample, routes=routes)
