"""The thread that decides which engine generates what, keeps engines alive and brings them new weights.

It owns all state; everybody else posts events. Each round: handle the events that came, give up on calls past their
limit, begin updates and departures of engines that are ready for them, hand out groups.

Invariants:

1. A group is in exactly one place: waiting, at one engine, or delivered. An engine's death moves its groups back to
   waiting; what a dead process still answers is not listened to. How the tail of a stream moves: ``gathering``.
2. An engine that has an update before it gets no groups until it has it, so versions grow on every engine, and a
   process that was started later gets the newest weights before its first group.
3. No two groups with the same sample ids are at engines at the same time.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from rl.rollout.dispatch import Dispatch
from rl.rollout.engine import EngineTimeout
from rl.rollout.fleet import EngineDied, EngineRecord, Engines, PendingGroup, Update
from rl.rollout.gathering import Gathering
from rl.rollout.streams import GroupOfSamples, GroupStream
from rl.rollout.tail import TailRule
from rl.rollout.weights import WeightMismatch
from rl.types import Prompt, Sample

_log = logging.getLogger(__name__)

OnSpan = Callable[[str, str, float, float, Mapping[str, Any]], None]
"""``on_span(track, name, start, end, args)``, times in seconds of ``time.time()``; from the dispatcher's thread."""

Observe = Callable[[Prompt, Sequence[int]], None]
_TICK_S = 1.0  # how often limits are looked at when nothing happens


class ServiceStopped(RuntimeError):
    """The generation service was stopped while somebody waited for it, or before it was asked."""


@dataclass(frozen=True)
class _Call:
    """A call that an engine has not answered yet."""

    record: EngineRecord
    incarnation: int
    deadline: float
    limit_s: float
    what: str
    then: Callable[[Any, BaseException | None], None]


class Dispatcher:
    """See the module's docstring.

    Args:
        engines: that it drives.
        dispatch: which group goes where.
        observe: told the response lengths of every complete group.
        max_restarts: processes that may be replaced, altogether.
        on_span: told what engines did, see :data:`OnSpan`.
    """

    def __init__(
        self, engines: Engines, dispatch: Dispatch, observe: Observe, max_restarts: int, on_span: OnSpan
    ) -> None:
        self.engines, self.dispatch, self.observe, self.on_span = engines, dispatch, observe, on_span
        self.max_restarts = self.restarts_left = max_restarts
        self.failure: BaseException | None = None
        self.last_completed = time.monotonic()
        self.records = {index: EngineRecord(index, version=engines.version) for index in engines.indices()}
        self.newest: Update | None = None
        config = engines.config
        self._seats = config.max_num_seqs
        # Engines report their own timeouts, which say more; ours are for those that do not answer at all.
        self._grace_s = config.stop_timeout_s
        self._waiting: dict[int, PendingGroup] = {}
        self._streams: set[GroupStream] = set()
        self._calls: dict[int, _Call] = {}
        self._call_numbers = itertools.count()
        self._orders = itertools.count()
        self._next_index = max(self.records) + 1
        self._stopping = False
        self._ended = False
        self._tick_s = min(_TICK_S, self._grace_s / 4)
        self.gathering = Gathering(self)
        self._checked = 0.0
        self._events: queue.SimpleQueue[tuple[Callable[[], None], Callable[[BaseException], None]]] = (
            queue.SimpleQueue()
        )
        # A daemon: a service that nobody stopped must not keep the process alive.
        self._thread = threading.Thread(target=self._main, name="generation-service", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for other threads

    def post(self, event: Callable[[], None], refuse: Callable[[BaseException], None] = lambda error: None) -> None:
        """Have the thread run ``event``; ``refuse`` is called instead once the service has ended."""
        self._events.put((event, refuse))
        if self._ended:
            self._refuse_events()

    def stop(self, timeout_s: float) -> bool:
        """End the thread; False if it did not end within ``timeout_s`` seconds."""

        def end() -> None:
            self._stopping = True

        self.post(end)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ the thread

    def _main(self) -> None:
        error: BaseException = ServiceStopped("the generation service was stopped")
        try:
            while not self._stopping:
                self._run_events()
                self._check_limits()
                self._begin_what_engines_wait_for()
                self._hand_out()
                self.gathering.round()
        except BaseException as caught:
            if not isinstance(caught, (EngineDied, EngineTimeout)):
                _log.exception("the generation service failed")
            error = caught
        self._end(error)

    def _run_events(self) -> None:
        """Wait for an event, at most one tick; run all that are there."""
        look_s = self.gathering.wait_s
        try:
            event, _ = self._events.get(timeout=self._tick_s if look_s is None else min(look_s, self._tick_s))
            while True:
                event()
                event, _ = self._events.get_nowait()
        except queue.Empty:
            return

    def _end(self, error: BaseException) -> None:
        self.failure = error
        for stream in self._streams:
            stream.end(error)
        for record in self.records.values():
            for update in (record.next_update, record.updating):
                if update is not None:
                    update.failed(error)
            for future in (record.joining, record.leaving):
                if future is not None and not future.done():
                    future.set_exception(error)
        self._ended = True
        self._refuse_events()
        for record in self.records.values():
            if record.serving and record.running:
                self.engines.abort_on(record.index, _sample_ids(pending for pending, _ in record.running.values()))

    def _refuse_events(self) -> None:
        assert self.failure is not None
        while True:
            try:
                _, refuse = self._events.get_nowait()
            except queue.Empty:
                return
            refuse(self.failure)

    # ------------------------------------------------------------------ calls to engines

    def call(
        self,
        record: EngineRecord,
        future: Future[Any],
        limit_s: float,
        what: str,
        then: Callable[[Any, BaseException | None], None],
    ) -> None:
        """``then(result, error)`` once the engine has answered or its limit has passed, unless it dies before."""
        number = next(self._call_numbers)
        self._calls[number] = _Call(record, record.incarnation, time.monotonic() + limit_s, limit_s, what, then)
        future.add_done_callback(lambda done: self.post(partial(self._answered, number, done)))

    def _answered(self, number: int, future: Future[Any]) -> None:
        call = self._calls.pop(number, None)
        if call is None or call.incarnation != call.record.incarnation:
            return
        error = future.exception()
        if isinstance(error, EngineDied):
            self._died(call.record, error)
        else:
            call.then(future.result() if error is None else None, error)

    def _check_limits(self) -> None:
        now = time.monotonic()
        if now < self._checked + self._tick_s:
            return
        self._checked = now
        for number in [number for number, call in self._calls.items() if call.deadline < now]:
            call = self._calls.pop(number, None)
            if call is not None and call.incarnation == call.record.incarnation:
                message = f"engine {call.record.index}: waited {call.limit_s:g} s for {call.what}"
                call.then(None, EngineTimeout(message))

    # ------------------------------------------------------------------ groups

    def submit(self, stream: GroupStream, groups: Sequence[PendingGroup], tail: TailRule | None) -> None:
        """Event: a stream begins; its tail may be gathered."""
        self._streams.add(stream)
        if tail is not None and groups:
            self.gathering.watch(stream, tail)
        self._waiting.update({pending.order: pending for pending in groups})

    def next_order(self) -> int:
        """For the next group that is submitted; any thread may ask."""
        return next(self._orders)

    def close(self, stream: GroupStream) -> None:
        """Event: nobody wants the rest of a stream."""
        self._drop(stream, None)

    def _drop(self, stream: GroupStream, error: BaseException | None) -> None:
        self._streams.discard(stream)
        self.gathering.ended(stream)
        self._waiting = {order: p for order, p in self._waiting.items() if p.stream is not stream}
        stream.end(error)
        for record in list(self.records.values()):
            mine = [p for p, _ in record.running.values() if p.stream is stream and not p.cancelled]
            for pending in mine:
                pending.cancelled = True
            if mine:
                # They stay with the engine until it has let go of them: it must not be updated before.
                future = self.engines.abort_on(record.index, _sample_ids(mine))
                self.call(record, future, self.update_limit_s, "aborting samples", lambda result, error: None)

    def _hand_out(self) -> None:
        if not any(record.accepting for record in self.records.values()):
            return
        held = {pending.uid for record in self.records.values() for pending, _ in record.running.values()}
        waiting = []
        for order in sorted(self._waiting):
            pending = self._waiting[order]
            if pending.stream.has_room and pending.uid not in held:
                held.add(pending.uid)
                waiting.append(pending)
        if not waiting:
            return
        states = [record.state(self._seats) for record in self.records.values()]
        assigned = self.dispatch.assign([pending.view for pending in waiting], states)
        if not assigned and not any(state.outstanding for state in states) and all(s.accepting for s in states):
            raise RuntimeError(
                f"dispatch policy {type(self.dispatch).__name__} sent nothing though every engine is idle and "
                f"{len(waiting)} groups wait; it must use an idle engine"
            )
        for position, index in assigned:
            self._send(waiting[position], self.records[index])

    def _send(self, pending: PendingGroup, record: EngineRecord) -> None:
        if not record.accepting or pending.order not in self._waiting:
            raise RuntimeError(
                f"dispatch policy {type(self.dispatch).__name__} sent prompt {pending.uid} twice, or to engine "
                f"{record.index}, which takes none"
            )
        del self._waiting[pending.order]
        pending.stream.started()
        self.send_on(pending, record)

    def wait_again(self, pending: PendingGroup) -> None:
        """A group that was at an engine waits for one, unless all its samples have ended."""
        pending.target = None
        if pending.open_ids:
            self._waiting[pending.order] = pending
            pending.stream.returned()
        else:
            self._deliver(pending)

    def send_on(self, pending: PendingGroup, record: EngineRecord) -> None:
        """A group that nobody holds goes to an engine: what is open of it from its parts, or anew."""
        record.take(pending)
        parts = [pending.parts[name] for name in pending.open_ids if name in pending.parts]
        if len(parts) < len(pending.open_ids) or any(p.weight_versions[-1][1] != record.version for p in parts):
            parts = []
            pending.parts.clear()
        sampling, seed, prompt = pending.sampling, pending.seed, pending.group.prompt
        if parts:
            future = self.engines.continue_on(record.index, parts, sampling, seed)
        else:
            future = self.engines.generate_on(record.index, prompt, tuple(pending.open_ids), sampling, seed)
        limit_s = self.engines.config.generate_timeout_s + self._grace_s
        self.call(
            record, future, limit_s, f"samples of prompt {pending.uid}", partial(self._generated, record, pending)
        )

    def _generated(
        self, record: EngineRecord, pending: PendingGroup, samples: GroupOfSamples | None, error: BaseException | None
    ) -> None:
        sent = record.give(pending)
        if pending.cancelled:
            return
        if samples is None:
            assert error is not None
            self._drop(pending.stream, error)
            return
        tokens = pending.take_in(samples)
        record.meter.completed(tokens)
        if pending.parts:
            self.gathering.broken_off(pending, record, sent)
            return
        args = {"samples": len(samples), "tokens": tokens}
        self.on_span(f"engine {record.index}", pending.uid, sent, time.time(), args)
        self._deliver(pending)

    def _deliver(self, pending: PendingGroup) -> None:
        """A complete group that no engine holds any more."""
        samples = pending.samples
        self.last_completed = time.monotonic()
        self.observe(pending.group.prompt, [len(s.response_tokens) for s in samples if isinstance(s, Sample)])
        if pending.stream.put(samples):
            self._streams.discard(pending.stream)
            self.gathering.ended(pending.stream)

    # ------------------------------------------------------------------ weights

    @property
    def update_limit_s(self) -> float:
        return self.engines.config.update_timeout_s + self._grace_s

    def update(self, update: Update) -> None:
        """Event: new weights for all engines; on each, they replace an update that has not begun there."""
        newest = self.engines.version if self.newest is None else self.newest.version
        if update.version < newest:
            update.failed(ValueError(f"expected weights of version {newest} or later, got {update.version}"))
            return
        update.before, self.newest = self.newest, update
        if update.before is not None:
            update.before.before = None  # older ones are never needed again
        staying = [record for record in self.records.values() if record.leaving is None]
        update.pending = {record.index for record in staying}
        for record in staying:
            if record.next_update is not None:
                record.next_update.replaced(record.index)
            record.next_update = update

    def _begin_what_engines_wait_for(self) -> None:
        for record in list(self.records.values()):
            if not record.serving or record.stopping or record.updating is not None:
                continue
            if record.leaving is not None:
                if not record.running:
                    self._stop_engine(record)
            elif record.next_update is not None and (not record.running or record.next_update.in_flight == "continue"):
                self._begin_update(record, record.next_update)

    def _begin_update(self, record: EngineRecord, update: Update) -> None:
        record.updating, record.next_update = update, None
        in_flight = "continue" if update.in_flight == "continue" else "refuse"
        future = self.engines.update_on(record.index, update.version, update.chunks, update.manifest, in_flight)
        what = f"the weight update to version {update.version}"
        self.call(record, future, self.update_limit_s, what, partial(self._updated, record, update, time.time()))

    def _updated(
        self, record: EngineRecord, update: Update, began: float, result: float | None, error: BaseException | None
    ) -> None:
        record.updating = None
        now = time.time()
        if error is None:
            record.version = update.version
            update.applied(record.index, began, now)
            self.on_span(f"engine {record.index}", f"update {update.version}", began, now, {"version": update.version})
            self._joined(record)
            return
        update.failed(error)
        update.pending.discard(record.index)
        if isinstance(error, WeightMismatch) and self.newest is update:
            self.newest = update.before  # no engine will ever take it
        if record.version is None:  # a new process, which must not serve what it started with
            self._could_not_start(record, error)

    # ------------------------------------------------------------------ engines that come, go and die

    def _died(self, record: EngineRecord, error: EngineDied) -> None:
        """Its groups wait again, and another process takes its place."""
        _log.warning("engine %d died with %d groups: %s", record.index, len(record.running), error)
        record.incarnation += 1
        record.serving = False
        self._calls = {n: c for n, c in self._calls.items() if c.incarnation == c.record.incarnation}
        self.gathering.engine_died()
        for pending in record.give_all():
            if not pending.cancelled:
                self.wait_again(pending)
        if record.leaving is not None:
            self._gone(record)
        elif record.joining is not None:
            self._could_not_start(record, error)
        elif not self.restarts_left:
            raise EngineDied(f"{error}; no other process takes its place: max_restarts={self.max_restarts} used up")
        elif self.newest is None and self.engines.version != self.engines.config.initial_version:
            raise EngineDied(
                f"{error}; no other process can take its place: version {self.engines.version} of the weights came "
                "before the service was made. Send weights through the service"
            )
        else:
            self.restarts_left -= 1
            for update in {record.next_update, record.updating} - {None, self.newest}:
                update.replaced(record.index)
            record.next_update, record.updating, record.version = self.newest, None, None
            self._start(record)

    def _start(self, record: EngineRecord) -> None:
        future = self.engines.start_engine(record.index)
        limit_s = self.engines.config.start_timeout_s + self._grace_s
        self.call(record, future, limit_s, "its start", partial(self._started, record, time.time()))

    def _started(self, record: EngineRecord, began: float, info: Any, error: BaseException | None) -> None:
        if error is not None:
            self._could_not_start(record, error)
            return
        self.on_span(f"engine {record.index}", "start", began, time.time(), {})
        record.serving = True
        if record.next_update is None:
            record.version = self.engines.config.initial_version
            self._joined(record)

    def _joined(self, record: EngineRecord) -> None:
        joining, record.joining = record.joining, None
        if joining is not None:
            joining.set_result(record.index)

    def _could_not_start(self, record: EngineRecord, error: BaseException) -> None:
        """A new engine is given up, with its error to who wanted it; without a replacement the service fails."""
        if record.joining is None:
            raise error
        record.joining.set_exception(error)
        self._forget(record)

    def add(self, future: Future[int]) -> None:
        """Event: one more engine; resolves to its index once it serves."""
        index, self._next_index = self._next_index, self._next_index + 1
        record = EngineRecord(index, serving=False, next_update=self.newest, joining=future)
        if self.newest is None and self.engines.version != self.engines.config.initial_version:
            future.set_exception(
                RuntimeError(
                    f"a new engine would have version {self.engines.config.initial_version} of the weights, the others "
                    f"have {self.engines.version}: send weights through the service before adding engines"
                )
            )
            return
        self.records[index] = record
        self._start(record)

    def remove(self, index: int, future: Future[None]) -> None:
        """Event: an engine finishes what it has and goes."""
        record = self.records.get(index)
        staying = [r.index for r in self.records.values() if r.leaving is None and r.joining is None]
        if record is None or record.leaving is not None or record.joining is not None:
            future.set_exception(ValueError(f"expected one of the engines {staying}, got {index}"))
        elif staying == [index]:
            future.set_exception(ValueError(f"engine {index} is the only one: add another before removing it"))
        else:
            record.leaving = future
            if record.next_update is not None:
                record.next_update.replaced(index)
                record.next_update = None
            if not record.serving:
                self._gone(record)

    def _stop_engine(self, record: EngineRecord) -> None:
        record.stopping = True
        future = self.engines.stop_engine(record.index)
        self.call(record, future, self._grace_s, "its end", lambda result, error: self._gone(record))

    def _gone(self, record: EngineRecord) -> None:
        self._forget(record)
        if record.leaving is not None:
            record.leaving.set_result(None)

    def _forget(self, record: EngineRecord) -> None:
        record.incarnation += 1
        self.engines.kill_engine(record.index)
        for update in (record.next_update, record.updating):
            if update is not None:
                update.replaced(record.index)
        self.records.pop(record.index, None)


def _sample_ids(groups: Any) -> list[str]:
    return [sample_id for pending in groups for sample_id in pending.group.sample_ids]
