"""Routes of samples for those who train and plan: from the engines that captured them, or from whoever is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from rl.rollout.routes import checked_slice
from rl.training.passes import RouteSlice
from rl.types import RouteRef


class RoutesLost(RuntimeError):
    """Rows of routes are gone for good; the message names them. Their samples must be generated again."""


class RoutesOfEngines:
    """Fetches parts of routes from the engines that captured them, one call per engine.

    Rows outlive the engine that captured them (see ``rl.rollout.actor``): when it is gone, another engine cuts the
    parts, or this process if there is none.

    Attributes:
        engines: actor handles by engine index; None where an engine was removed.
        timeout_s: limit of each answer, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self.engines: Sequence[Any] = []
        self.timeout_s = timeout_s

    def __call__(self, requests: Sequence[RouteSlice]) -> list[np.ndarray]:
        return self._ask("slice_routes", requests)

    def count(self, requests: Sequence[tuple[RouteRef, int, int]]) -> list[np.ndarray]:
        """Counts of experts in ``(reference, row start, row stop)`` each: int32 ``[MoE layers, experts]``."""
        return self._ask("count_routes", requests)

    def _ask(self, what: str, requests: Sequence[tuple[Any, ...]]) -> list[np.ndarray]:
        """Raises RoutesLost, or RuntimeError: no answer in time, or nobody left who could answer."""
        by_engine: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_engine.setdefault(request[0].engine, []).append(i)
        # Every engine works at the same time; only then answers are waited for.
        calls = {e: self._call(e, what, [requests[i] for i in mine]) for e, mine in by_engine.items()}
        out: list[np.ndarray] = [np.zeros(0)] * len(requests)
        for engine, mine in by_engine.items():
            parts = self._answer(engine, calls[engine], what, [requests[i] for i in mine])
            for i, part in zip(mine, parts, strict=True):
                out[i] = part
        return out

    def _call(self, engine: int, what: str, requests: Sequence[tuple[Any, ...]]) -> ray.ObjectRef | None:
        handle = self.engines[engine] if engine < len(self.engines) else None
        return None if handle is None else getattr(handle, what).remote(list(requests))

    def _answer(
        self, engine: int, call: ray.ObjectRef | None, what: str, requests: Sequence[tuple[Any, ...]]
    ) -> list[np.ndarray]:
        for other in (engine, *(i for i in range(len(self.engines)) if i != engine)):
            call = call if other == engine else self._call(other, what, requests)
            if call is None:
                continue
            try:
                return ray.get(call, timeout=self.timeout_s)
            except ray.exceptions.RayActorError:
                continue
            except ray.exceptions.GetTimeoutError as error:
                raise RuntimeError(
                    f"engine {other} did not hand over routes within {self.timeout_s:g} s: {type(error).__name__}"
                ) from error
            except ray.exceptions.ObjectLostError as error:
                raise _lost(engine, requests) from error
        if what == "count_routes":
            raise RuntimeError(f"engine {engine} is gone and no other is left to count its routes: connect new ones")
        try:
            return [_cut(request, self.timeout_s) for request in requests]
        except ray.exceptions.GetTimeoutError as error:
            raise RuntimeError(
                f"routes of engine {engine}, which is gone, did not come from the object store within "
                f"{self.timeout_s:g} s"
            ) from error
        except ray.exceptions.ObjectLostError as error:
            raise _lost(engine, requests) from error


def _cut(request: RouteSlice, timeout_s: float) -> np.ndarray:
    reference, rows, layers = checked_slice(request)
    return np.ascontiguousarray(reference.of(ray.get(reference.handle, timeout=timeout_s))[rows, layers])


def _lost(engine: int, requests: Sequence[tuple[Any, ...]]) -> RoutesLost:
    names = ", ".join(request[0].sample_id for request in requests[:5])
    return RoutesLost(
        f"routes that engine {engine} captured are lost with the machine that held them: some of {len(requests)}, of "
        f"samples {names}; generate them again"
    )
