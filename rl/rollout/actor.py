"""A rollout engine as a Ray actor: its samples, and their routes as objects of their own.

Rows of routes are separate return values of the actor's call. Ray then keeps them in the object store of the engine's
node, but they belong to the process that asked: they can still be fetched, by anybody, when the engine's process is
gone. What the engine put there itself would go with it. (Up to 100 KB, Ray hands them over with the answer instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
        """:meth:`generate` with ``1 + len(sample_ids)`` return values: samples whose routes have no handle, and the
        rows of each (None where there are none)."""
        return _apart(await self.generate(prompt, sample_ids, sampling, seed))

    async def continue_apart(self, samples: Sequence[Sample], sampling: Sampling, seed: int) -> tuple[Any, ...]:
        """:meth:`continue_samples`, likewise."""
        return _apart(await self.continue_samples(samples, sampling, seed))

    async def finished_apart(self, sample_ids: Sequence[str]) -> tuple[Any, ...]:
        """:meth:`finished`, likewise; None for those that have not ended."""
        return _apart(self.finished(sample_ids))


def call_apart(method: Any, count: int, *arguments: Any) -> tuple[ray.ObjectRef, list[ray.ObjectRef]]:
    """Call a method of :class:`EngineActor` that answers for ``count`` samples.

    Returns:
        references to the samples and to the rows of each.
    """
    samples, *rows = method.options(num_returns=1 + count).remote(*arguments)
    return samples, rows


def with_rows(samples: Sequence[Answer], rows: Sequence[ray.ObjectRef]) -> list[Answer]:
    """The samples of :func:`call_apart` with references to their rows."""
    return [_with_handle(sample, handle) for sample, handle in zip(samples, rows, strict=True)]


def _apart(samples: Sequence[Answer]) -> tuple[Any, ...]:
    return [_with_handle(s, None) for s in samples], *(None if r is None else r.handle for r in map(_routes, samples))


def _routes(sample: Answer) -> RouteRef | None:
    return sample.routes if isinstance(sample, Sample) else None


def _with_handle(sample: Answer, handle: Any) -> Answer:
    if not isinstance(sample, Sample) or sample.routes is None:
        return sample
    return replace(sample, routes=replace(sample.routes, handle=handle))
