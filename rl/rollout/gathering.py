"""Carries out what ``tail`` plans: watches streams, breaks off what moves, and says which engines are free.

Part of the dispatcher's thread, which owns all state. A stream's tail:

1. *watched*: once the stream has no group that waits, engines are asked how many of its samples are unfinished.
2. *moving*: at most ``threshold`` are. Engines that are not kept get nothing more (they *rest*) and break their samples
   off; each group that comes back so goes on at its target, from the tokens it has. Finished members of unfinished
   groups are handed to the stream ahead of their groups.
3. *gathered*: no engine that rests holds a group of the stream; ``stream.tail`` says so.

Engines serve again when the stream has ended. A group is in one place all the time: at its source until that has
answered, then at the target, or waiting where the target is gone. What had ended before a death is kept, and what was
broken off is continued anywhere with the same weights; with others it is generated anew.

Keys and values do not travel: the target reads prompt and kept tokens in one prefill; what that costs beside moving
them is in ``docs/notes/fusion-tail.md``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rl.rollout.fleet import EngineRecord, PendingGroup
from rl.rollout.streams import GroupStream, TailReport
from rl.rollout.tail import Held, TailPlan, TailRule, plan_tail
from rl.types import Sample

if TYPE_CHECKING:
    from rl.rollout.dispatcher import Dispatcher

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Watched:
    """A stream with a rule.

    Attributes:
        asked: engines that have not answered yet how far their samples are.
        look: number of the look; answers of an older one say nothing.
        tokens: what they said: response tokens by unfinished sample.
        next_look: seconds of ``time.monotonic()``.
        plan: None until the tail begins.
        began: of the tail, seconds of ``time.time()``.
    """

    rule: TailRule
    asked: set[int] = field(default_factory=set)
    look: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    next_look: float = 0.0
    plan: TailPlan | None = None
    began: float = 0.0
    unfinished: int = 0
    moved: int = 0
    kept_tokens: int = 0

    def look_again(self) -> None:
        """What was told so far says nothing any more."""
        self.look += 1
        self.asked.clear()
        self.tokens = {}
        self.next_look = time.monotonic() + self.rule.poll_s


class Gathering:
    """See the module's docstring.

    Args:
        dispatcher: whose groups and engines these are.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._watched: dict[GroupStream, _Watched] = {}

    @property
    def wait_s(self) -> float | None:
        """Seconds until the next look is due; None: nothing is watched."""
        due = [w.next_look for w in self._watched.values() if w.plan is None and not w.asked]
        return max(0.001, min(due) - time.monotonic()) if due else None

    def watch(self, stream: GroupStream, rule: TailRule) -> None:
        """A stream begins."""
        self._watched[stream] = _Watched(rule)

    def ended(self, stream: GroupStream) -> None:
        """A stream has delivered everything, or was dropped: its engines serve again."""
        watched = self._watched.pop(stream, None)
        if watched is not None and watched.plan is not None:
            self._wake(watched.plan)

    def round(self) -> None:
        """Look at what is watched; called whenever something has happened."""
        now = time.monotonic()
        for stream, watched in list(self._watched.items()):
            if watched.plan is not None:
                self._settle(stream, watched)
            elif not watched.asked and now >= watched.next_look:
                self._look(stream, watched)

    # ------------------------------------------------------------------ watching

    def _look(self, stream: GroupStream, watched: _Watched) -> None:
        """Ask engines for progress, if the tail may have begun: each group holds at least one unfinished sample."""
        watched.look_again()
        if stream.waiting or not 0 < stream.running <= watched.rule.threshold or not self._steady():
            return
        for record in self._dispatcher.records.values():
            ids = [name for pending in self._groups(stream, record) for name in pending.open_ids]
            if ids:
                watched.asked.add(record.index)
                future = self._dispatcher.engines.unfinished_on(record.index, ids)
                then = partial(self._told, stream, watched, record, watched.look)
                self._dispatcher.call(record, future, self._dispatcher.update_limit_s, "progress of its samples", then)

    def _told(
        self,
        stream: GroupStream,
        watched: _Watched,
        record: EngineRecord,
        look: int,
        tokens: dict[str, int] | None,
        error: BaseException | None,
    ) -> None:
        if look != watched.look or stream not in self._watched:
            return
        if tokens is None:
            _log.warning("engine %d: no progress of its samples, the tail is looked at later: %s", record.index, error)
            watched.look_again()
            return
        watched.asked.discard(record.index)
        watched.tokens |= tokens
        if not watched.asked:
            self._decide(stream, watched)

    def engine_died(self) -> None:
        """Its answer will not come, and its samples begin again."""
        for watched in self._watched.values():
            watched.look_again()

    def _decide(self, stream: GroupStream, watched: _Watched) -> None:
        """Begin the tail if few enough samples are unfinished."""
        if stream.waiting or not self._steady():
            return
        held = []
        for record in self._dispatcher.records.values():
            for pending in self._groups(stream, record):
                # A group that an engine has answered meanwhile is not asked for; one it was never asked for counts.
                tokens = tuple(watched.tokens[n] for n in pending.open_ids if n in watched.tokens)
                if tokens:
                    held.append(Held(pending.order, record.index, tokens, _remaining(pending, tokens)))
        unfinished = sum(len(one.tokens) for one in held)
        if not 0 < unfinished <= watched.rule.threshold:
            return
        watched.plan = plan_tail(held, sorted(self._dispatcher.records), watched.rule)
        watched.began, watched.unfinished = time.time(), unfinished
        self._begin(stream, watched.plan)

    def _steady(self) -> bool:
        """Whether every engine serves with the same weights, so that samples can go on anywhere."""
        records = self._dispatcher.records.values()
        return all(record.accepting for record in records) and len({record.version for record in records}) == 1

    @staticmethod
    def _groups(stream: GroupStream, record: EngineRecord) -> list[PendingGroup]:
        return [p for p, _ in record.running.values() if p.stream is stream and not p.cancelled]

    # ------------------------------------------------------------------ moving

    def _begin(self, stream: GroupStream, plan: TailPlan) -> None:
        dispatcher = self._dispatcher
        for index in plan.freed:
            dispatcher.records[index].resting = True
        for record in list(dispatcher.records.values()):
            groups = self._groups(stream, record)
            moving = [pending for pending in groups if pending.order in plan.moves]
            for pending in moving:
                pending.target = plan.moves[pending.order]
            ids = [name for pending in moving for name in pending.open_ids]
            if ids:
                future = dispatcher.engines.abort_on(record.index, ids)
                dispatcher.call(record, future, dispatcher.update_limit_s, "breaking samples off", _ignore)
            staying = [pending for pending in groups if pending.order not in plan.moves]
            ids = [name for pending in staying for name in pending.open_ids]
            if ids:
                ended = dispatcher.engines.finished_on(record.index, ids)
                then = partial(self._take_early, stream, record, {p.uid: p for p in staying})
                dispatcher.call(record, ended, dispatcher.update_limit_s, "samples that have ended", then)

    def _take_early(
        self,
        stream: GroupStream,
        record: EngineRecord,
        groups: dict[str, PendingGroup],
        samples: list[Sample] | None,
        error: BaseException | None,
    ) -> None:
        """Finished members of groups that stay where they are."""
        here = {pending.uid for pending in self._groups(stream, record)}
        early = [s for s in samples or () if s.prompt.uid in here and s.prompt.uid in groups]
        for sample in early:
            groups[sample.prompt.uid].ended.setdefault(sample.sample_id, sample)
        stream.put_early(early)

    def broken_off(self, pending: PendingGroup, source: EngineRecord, asked: float) -> None:
        """A group came back unfinished; it goes on at its target, or waits for any engine where that is gone.

        Args:
            pending: the group, held by nobody.
            source: where it was.
            asked: when it was sent there, seconds of ``time.time()``.
        """
        dispatcher, now = self._dispatcher, time.time()
        target = dispatcher.records.get(pending.target) if pending.target is not None else None
        pending.target = None
        tokens = sum(len(part.response_tokens) for part in pending.parts.values())
        args = {"samples": len(pending.parts), "kept_tokens": tokens}
        dispatcher.on_span(f"engine {source.index}", f"{pending.uid}, moved on", asked, now, args)
        watched = self._watched.get(pending.stream)
        if watched is not None:
            watched.moved += len(pending.parts)
            watched.kept_tokens += tokens
        pending.stream.put_early([s for s in pending.ended.values() if isinstance(s, Sample)])
        if target is not None and target.accepting:
            dispatcher.send_on(pending, target)
            if watched is not None:
                args |= {"from": source.index}
                dispatcher.on_span(f"engine {target.index}", "migrate", watched.began, now, args)
        else:
            dispatcher.wait_again(pending)

    def _settle(self, stream: GroupStream, watched: _Watched) -> None:
        """Say that the tail is gathered, once it is; let engines serve again when no other is left."""
        records, plan = self._dispatcher.records, watched.plan
        assert plan is not None
        if not any(not record.resting and record.leaving is None for record in records.values()):
            self._wake(plan)
        free = [index for index in plan.freed if index in records and records[index].resting]
        if stream.tail is None and not any(self._groups(stream, records[index]) for index in free):
            report = TailReport(
                began=watched.began,
                gathered=time.time(),
                unfinished=watched.unfinished,
                kept=plan.kept,
                freed=tuple(free),
                moved=watched.moved,
                kept_tokens=watched.kept_tokens,
            )
            stream.gathered(report)

    def _wake(self, plan: TailPlan) -> None:
        for index in plan.freed:
            record = self._dispatcher.records.get(index)
            if record is not None:
                record.resting = False


def _remaining(pending: PendingGroup, tokens: tuple[int, ...]) -> float:
    """Response tokens that are still expected of a group's unfinished samples, at most without a prediction."""
    most = min(pending.sampling.max_tokens, int(pending.group.prompt.metadata.get("max_tokens", 1 << 62)))
    predicted = pending.view.predicted_tokens
    length = most if predicted is None else min(predicted, most)
    return float(sum(max(1.0, length - done) for done in tokens))


def _ignore(result: Any, error: BaseException | None) -> None:
    """The group's own answer says what became of it."""
