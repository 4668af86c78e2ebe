"""What is known of an iteration before its passes run, since rollout captured every route: homes, batches, plans.

    passes = ahead.passes(samples, schedule, moved)     # experts have moved; layouts and plans begin in the background
    old = passes.old()                                  # waits for what it needs, no longer
    first = passes.training(0)

Three things of their own, each behind its field of ``balance``:

- ``reorder``: :meth:`Ahead.reorder` chooses where experts are at home for the iteration and moves them; or
  :meth:`Ahead.begin_reorder` does it while engines generate, by the routes of the iteration before.
- ``compose``: training's micro-batches are composed so that their expert loads balance.
- ``foresight``: every pass that replays routes is planned by a process of its own while the one before it runs.

A batch with a sample that has no routes is planned on exact loads, as a whole: that is decided here, for all ranks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.megatron.migrate import MoveReport
from megatron_ultraep.plan.compose import Gain, compose, gain
from megatron_ultraep.plan.foresight import Foreseer, Histogram, Rows
from rl.config.sections import BalanceSection, RunConfig
from rl.orchestration.experience import Packing
from rl.rollout.pool import EnginePool
from rl.training.batch import TrainSample
from rl.training.foresight import (
    ExpertGroup,
    Homes,
    PassPlans,
    choose_homes,
    counts_needed,
    group_loads,
    submit,
)
from rl.training.group import RoutesOfEngines, Trainer
from rl.types import RouteRef

CountRows = Callable[[Sequence[tuple[RouteRef, int, int]]], Sequence[Histogram]]
"""Counts of runs of rows, made where the rows are: int32 ``[MoE layers, experts]`` each."""

_AHEAD = 2  # passes prepared beyond the one that runs; each holds its plans until then


@dataclass(frozen=True)
class Pass:
    """One pass over a batch, ready to run.

    Attributes:
        layout: of its batch.
        plans: None where it is planned on exact loads.
        gain: what composition did to it; None where it was packed by length.
    """

    layout: BatchLayout
    plans: PassPlans | None = None
    gain: Gain | None = None


@dataclass(frozen=True)
class Moved:
    """What reordering did before an iteration.

    Attributes:
        homes: new home slots by layer number, of layers where an expert moved.
        report: of the move; None where nothing moved.
        seconds: that choosing and moving took.
    """

    homes: Homes = field(default_factory=dict)
    report: MoveReport | None = None
    seconds: float = 0.0


class Ahead:
    """Plans iterations before they run; close it at the end, or use it as a context manager.

    Args:
        section: what is wanted.
        groups: the trainer's expert-parallel groups, from ``Trainer.expert_groups``.
        packing: how samples become micro-batches.
        topk: experts per token.
        count: where counts of parts of samples come from.
        timeout_s: limit of every wait for plans (s).

    Attributes:
        homes: where experts are, by layer number; layers that never moved are left out.
    """

    def __init__(
        self,
        section: BalanceSection,
        groups: Sequence[ExpertGroup],
        packing: Packing,
        *,
        topk: int,
        count: CountRows,
        timeout_s: float,
    ) -> None:
        self.section, self.groups, self.packing = section, tuple(groups), packing
        self.topk, self.count, self.timeout_s = topk, count, timeout_s
        self.homes: dict[int, tuple[int, ...]] = {}
        self._previous: list[np.ndarray] | None = None
        self._foreseer = Foreseer() if self.active and section.foresight else None
        self.thread = ThreadPoolExecutor(1, "ahead")

    @staticmethod
    def of_run(config: RunConfig, topk: int, pool: EnginePool, trainer: Trainer, packing: Packing) -> Ahead:
        """Plans with the integers that the trainer's ranks measured; engines count parts of samples."""
        engines = RoutesOfEngines(config.run.limits.generate_s)
        engines.engines = pool.handles  # the live list: engines come and go
        return Ahead(
            config.balance,
            trainer.expert_groups(),
            packing,
            topk=topk,
            count=engines.count,
            timeout_s=config.run.limits.train_step_s,
        )

    @property
    def active(self) -> bool:
        """Whether there is anything to plan: the trainer balances."""
        return bool(self.groups)

    def reorder(
        self,
        samples: Sequence[TrainSample],
        batches: Sequence[np.ndarray],
        move: Callable[[Homes], MoveReport],
    ) -> Moved:
        """Choose homes for coming batches and move experts there; nothing moves where it does not pay.

        Args:
            samples: of the iteration.
            batches: indices of the samples of each batch.
            move: moves them, e.g. ``Trainer.reorder``.
        """
        started = time.perf_counter()
        if not self.active or not self.section.reorder or not _have_routes(samples):
            return Moved()
        return self._reorder(self._loads_of(samples, batches), move, started)

    def remember(self, samples: Sequence[TrainSample], batches: Sequence[np.ndarray]) -> None:
        """Keep the loads of an iteration for :meth:`begin_reorder`; arguments as for :meth:`reorder`."""
        if self.active and self.section.reorder:
            self._previous = self._loads_of(samples, batches) if _have_routes(samples) else None

    def begin_reorder(self, move: Callable[[Homes], MoveReport]) -> Future[Moved] | None:
        """Do what :meth:`reorder` does for the loads that are remembered, in the background; None without any.

        The trainer does nothing else meanwhile, and passes are prepared when it has ended.
        """
        loads, self._previous = self._previous, None
        if loads is None:
            return None
        return self.thread.submit(lambda: self._reorder(loads, move, time.perf_counter()))

    def _loads_of(self, samples: Sequence[TrainSample], batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each group, all batches one after the other, packed by length."""
        parts = [[samples[i] for i in batch] for batch in batches]
        of_batch = [self._loads(part, self.packing.layout_of(part)) for part in parts]
        return [np.concatenate(of_group) for of_group in zip(*of_batch, strict=True)]

    def _reorder(self, loads: list[np.ndarray], move: Callable[[Homes], MoveReport], started: float) -> Moved:
        chosen = choose_homes(
            self.groups,
            self.homes,
            loads,
            move_ns_per_mib=self.section.move_ns_per_mib,
            horizon=self.section.reorder_horizon,
        )
        homes = {number: plan.layout.home_slot for number, plan in chosen.items() if plan.moves}
        report = self.move_to(homes, move) if homes else None
        return Moved(homes, report, time.perf_counter() - started)

    def move_to(self, homes: Homes, move: Callable[[Homes], MoveReport]) -> MoveReport:
        """Move experts to given homes."""
        report = move(homes)
        self.homes |= homes
        return report

    def prepare(self, samples: Sequence[TrainSample], *, foresee: bool, composed: bool) -> Pass:
        """Lay a pass out and plan it; waits for the plans.

        Args:
            samples: of the batch.
            foresee: plan it ahead, if ``balance.foresight`` says so: it replays routes.
            composed: compose its micro-batches, if ``balance.compose`` says so.
        """
        layout, made = self.packing.layout_of(samples), None
        if self.active and _have_routes(samples):
            if composed and self.section.compose:
                layout, made = self._compose(samples, layout)
            if foresee and self._foreseer is not None:
                pending = submit(self._foreseer, self.groups, self.homes, self._loads(samples, layout))
                return Pass(layout, pending.result(self.timeout_s), made)
        return Pass(layout, None, made)

    def _compose(self, samples: Sequence[TrainSample], packed: BatchLayout) -> tuple[BatchLayout, Gain]:
        histograms = [s.histogram for s in samples if s.histogram is not None]
        by_layer = {
            number: layout
            for group in self.groups
            for number, layout in zip(group.numbers, group.layouts(self.homes), strict=True)
        }
        layouts = [by_layer[number] for number in sorted(by_layer)]
        parallel = self.packing.layout
        group_ranks = max(1, parallel.ep * parallel.etp // parallel.tp)
        composed = compose(
            [s.sample_id for s in samples],
            [s.rows for s in samples],
            histograms,
            layouts,
            group_ranks=group_ranks,
            **self.packing.arguments,
        )
        return composed, gain(packed, composed, histograms, layouts, group_ranks=group_ranks)

    def _loads(self, samples: Sequence[TrainSample], layout: BatchLayout) -> list[np.ndarray]:
        by_id = {s.sample_id: s for s in samples}
        needed = counts_needed(self.groups, layout, self.packing.layout.tp)
        counted: dict[Rows, Histogram] = {}
        if needed:
            requests = [(_routes_of(by_id[name]), first, first + rows) for name, first, rows in needed]
            counted = dict(zip(needed, self.count(requests), strict=True))
        histograms = {s.sample_id: s.histogram for s in samples if s.histogram is not None}
        return group_loads(self.groups, layout, histograms, counted, topk=self.topk, tp_size=self.packing.layout.tp)

    @property
    def homes_digest(self) -> str:
        """16 hex digits over where all experts are."""
        text = json.dumps(sorted((n, list(h)) for n, h in self.homes.items()), separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Where experts are, for a checkpoint's loop state."""
        return {"ep": self.packing.layout.ep, "homes": {str(n): list(h) for n, h in sorted(self.homes.items())}}

    def restore(self, value: Mapping[str, Any], move: Callable[[Homes], MoveReport]) -> None:
        """Go on with the homes of :meth:`to_json`; those of another expert-parallel size are not taken up.

        Checkpoints hold experts in logical order, so a run may as well begin where Megatron has them.
        """
        homes = {int(number): tuple(home_slot) for number, home_slot in value.get("homes", {}).items()}
        if self.active and self.section.reorder and homes and value["ep"] == self.packing.layout.ep:
            self.move_to(homes, move)

    def close(self) -> None:
        """End the planning process and the thread."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self._foreseer is not None:
            self._foreseer.close()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Passes:
    """The passes of one iteration, prepared in order in the background.

    Args:
        ahead: of the run.
        samples: of the iteration.
        batches: indices of each optimizer step's samples, in order.
        replay_old, replay_train: whether the pass for old log-probs, and training, replay routes.
        recompute_old: whether there is a pass for old log-probs.
        moved: what reordering did before.

    Attributes:
        taken: what is kept of the passes that were handed out.
        waited: seconds that were waited for them.
    """

    def __init__(
        self,
        ahead: Ahead,
        samples: Sequence[TrainSample],
        batches: Sequence[np.ndarray],
        *,
        replay_old: bool,
        replay_train: bool,
        recompute_old: bool,
        moved: Moved,
    ) -> None:
        self.batches, self.moved = list(batches), moved
        self._ahead, self._samples, self._replay = ahead, list(samples), replay_train
        self.waited = 0.0
        self.taken: list[Taken] = []
        self._old: Future[Pass] | None = None
        if recompute_old:
            self._old = ahead.thread.submit(ahead.prepare, self._samples, foresee=replay_old, composed=False)
        self._training: list[Future[Pass]] = []
        self._begin(_AHEAD)

    def old(self) -> Pass:
        """The pass for old log-probs, over all samples, if there is one."""
        assert self._old is not None
        return self._take(self._old)

    def training(self, number: int) -> Pass:
        """The pass of an optimizer step; begins to prepare later ones."""
        self._begin(number + 1 + _AHEAD)
        return self._take(self._training[number])

    def _begin(self, count: int) -> None:
        while len(self._training) < min(count, len(self.batches)):
            batch = [self._samples[i] for i in self.batches[len(self._training)]]
            self._training.append(
                self._ahead.thread.submit(self._ahead.prepare, batch, foresee=self._replay, composed=True)
            )

    def _take(self, future: Future[Pass]) -> Pass:
        started = time.perf_counter()
        try:
            found = future.result(self._ahead.timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"a pass was not prepared within {self._ahead.timeout_s:g} s: raise run.limits.train_step_s, or set "
                "balance.foresight to false"
            ) from error
        self.waited += time.perf_counter() - started
        self.taken.append(Taken.of(found))
        return found

    @property
    def section(self) -> BalanceSection | None:
        """What is wanted; None where nothing is balanced."""
        return self._ahead.section if self._ahead.active else None

    @property
    def homes_digest(self) -> str:
        """See :attr:`Ahead.homes_digest`."""
        return self._ahead.homes_digest


def merged_metrics(passes: Sequence[Passes]) -> dict[str, float]:
    """Of everything an iteration's passes took so far; empty without balancing."""
    section = passes[0].section if passes else None
    if section is None:
        return {}
    taken = [each for some in passes for each in some.taken]
    found: dict[str, float] = {}
    if section.foresight:
        total = sum(each.micro_batches for each in taken)
        planned = sum(each.micro_batches for each in taken if each.digest)
        found["moe/foresight/planned_fraction"] = planned / max(1, total)
        found["moe/foresight/wait_seconds"] = sum(some.waited for some in passes)
    if section.reorder:
        moved = passes[0].moved  # what was done before the iteration is the same for all
        found["moe/reorder/experts_moved"] = float(moved.report.experts if moved.report else 0)
        found["moe/reorder/bytes"] = float(moved.report.bytes if moved.report else 0)
        found["moe/reorder/seconds"] = moved.seconds
    gains = [each.gain for each in taken if each.gain is not None]
    if gains:
        before = sum(each.before.tokens for each in gains)
        after = sum(each.after.tokens for each in gains)
        found["moe/compose/fewer_tokens"] = 1 - after / before if before else 0.0
    return found


def merged_for_ledger(passes: Sequence[Passes]) -> dict[str, Any]:
    """Digests of an iteration's plans, where experts are, and which homes changed; JSON values."""
    section = passes[0].section if passes else None
    found: dict[str, Any] = {}
    if section is None:
        return found
    if section.foresight:
        found["plans"] = [each.digest for some in passes for each in some.taken]
    if section.reorder:
        found["homes"] = passes[0].homes_digest
        found["rehomed"] = {str(number): list(home_slot) for number, home_slot in passes[0].moved.homes.items()}
    return found


@dataclass(frozen=True)
class Taken:
    """What is kept of a pass that was handed out."""

    micro_batches: int
    digest: str | None
    gain: Gain | None

    @staticmethod
    def of(found: Pass) -> Taken:
        return Taken(found.layout.num_microbatches, found.plans.digest if found.plans else None, found.gain)


def _have_routes(samples: Sequence[TrainSample]) -> bool:
    return all(s.histogram is not None and s.routes is not None for s in samples)


def _routes_of(sample: TrainSample) -> RouteRef:
    assert sample.routes is not None  # _have_routes
    return sample.routes
