"""Engines that come and go while a run goes on, at step boundaries and without a restart; see ``allocation``."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from rl.config import RunConfig
from rl.orchestration.allocation import Decision, ElasticRule
from rl.rollout.service import GenerationService


class Elastic:
    """Adds an engine while generation lags, gives it back when training does.

    Args:
        service: whose engines they are.
        rule: decides.
    """

    def __init__(self, service: GenerationService, rule: ElasticRule) -> None:
        self._service, self._rule = service, rule
        self._pending: Future[Any] | None = None

    @staticmethod
    def of_run(config: RunConfig, service: GenerationService, start_seconds: float) -> Elastic | None:
        """None where the number of engines is fixed. Generation is taken to shrink with the number of engines."""
        section = config.stream.elastic
        if section.max_engines is None:
            return None
        rule = ElasticRule(
            lambda engines: 1.0 / engines,
            smallest=config.rollout.engines,
            largest=section.max_engines,
            start_seconds=start_seconds,
            horizon=section.horizon,
        )
        return Elastic(service, rule)

    def step(self, generate_seconds: float, train_seconds: float) -> Decision:
        """Decide after a step, and begin what was decided; an engine starts while the run goes on.

        Args:
            generate_seconds, train_seconds: in which engines (mean) and trainer ranks were busy.

        Raises:
            Exception: why the engine that was asked for last did not come up.
        """
        if self._pending is not None:
            if not self._pending.done():
                return Decision("keep", "an engine is starting or leaving")
            pending, self._pending = self._pending, None
            pending.result()
        engines = self._service.engines
        if min(generate_seconds, train_seconds) <= 0:
            return Decision("keep", "nothing was generated, or nothing trained, in this step")
        decision = self._rule.decide(len(engines), generate_seconds, train_seconds)
        if decision.action == "add":
            self._pending = self._service.add_engine()
        elif decision.action == "give_back":
            self._pending = self._service.remove_engine(engines[-1])
        return decision
