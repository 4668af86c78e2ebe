"""The generation service over engines that only keep time: nothing lost, nothing twice, whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.rollout.config import Sampling
from rl.rollout.dispatch import get_dispatch
from rl.rollout.engine import EngineTimeout
from rl.rollout.fleet import EngineDied, WorkMeter
from rl.rollout.service import GenerationService, ServiceStopped
from rl.rollout.weights import TornWeights, WeightMismatch
from rl.types import Prompt
from tests.rl.rollout.fake_engines import FakeEngines

SAMPLING = Sampling(8)
WAIT_S = 20.0


def prompts(count: int, name: str = "train/0") -> list[Prompt]:
    return [Prompt(f"{name}/{i}", i, 0, "", np.arange(3, dtype=np.int32)) for i in range(count)]


def uids(groups: Any) -> list[str]:
    return [group[0].prompt.uid for group in groups]


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Callable[..., FakeEngines]]:
    made = []

    def make(engines: int = 2, group_s: Any = 0.004, **settings: Any) -> FakeEngines:
        seconds = group_s if callable(group_s) else lambda uid: group_s
        made.append(FakeEngines(tmp_path, engines, seconds, **settings))
        return made[-1]

    yield make
    for engines in made:
        engines.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


@pytest.mark.parametrize("block", range(4))
def test_every_prompt_exactly_once_whatever_happens(fakes: Any, block: int) -> None:
    """25 runs a block: deaths, updates of both kinds, engines of different speed, that come and go, several streams."""
    restarts = sum(random_run(fakes, seed) for seed in range(25 * block, 25 * block + 25))
    assert restarts > 25


def random_run(fakes: Any, seed: int) -> int:
    """Returns how many processes were replaced."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 5))
    lengths = rng.lognormal(-6, 0.8, 64)
    engines = fakes(
        count,
        lambda uid: float(min(lengths[int(uid.rsplit("/", 1)[1])], 0.02)),
        speeds=rng.choice([0.5, 1.0, 2.0], 8),
        start_s=0.002,
        update_s=0.001,
    )
    engines.kills_before_up = int(rng.integers(0, 2))
    policy = get_dispatch(str(rng.choice(["fcfs", "random", "longest_first"])))
    spans: list[tuple[str, str, float, float]] = []
    with GenerationService(
        engines, dispatch=policy, max_restarts=1000, on_span=lambda *span: spans.append(span[:4])
    ) as service:
        streams = []
        for k in range(int(rng.integers(1, 4))):
            buffer = None if rng.random() < 0.5 else int(rng.integers(1, 4))
            wanted = prompts(int(rng.integers(1, 25)), f"train/{k}")
            streams.append((wanted, service.generate(wanted, 2, SAMPLING, seed, buffer_groups=buffer)))
        got: list[list[str]] = [[] for _ in streams]
        takers = [
            threading.Thread(target=lambda k=k, s=s: got[k].extend(uids(s)), daemon=True)
            for k, (_, s) in enumerate(streams)
        ]
        for taker in takers:
            taker.start()
        updates, others, version = [], [], 0
        for _ in range(int(rng.integers(3, 9))):
            time.sleep(float(rng.uniform(0, 0.004)))
            what = rng.random()
            if what < 0.5:
                engines.kill(int(rng.integers(0, 6)))
            elif what < 0.8:
                version += 1
                updates.append(service.update(version, [], {}, str(rng.choice(["finish", "continue"]))))
            elif what < 0.9:
                others.append(service.add_engine())
            else:
                others.append(service.remove_engine(int(rng.integers(0, count))))
        for taker in takers:
            taker.join(WAIT_S)
            assert not taker.is_alive(), f"seed {seed} hangs"
        for (wanted, stream), delivered in zip(streams, got, strict=True):
            assert sorted(delivered) == sorted(p.uid for p in wanted), f"seed {seed}"
            assert (stream.waiting, stream.running, stream.ready) == (0, 0, 0)
        reports = [update.result(WAIT_S) for update in updates]
        assert [report.version for report in reports] == list(range(1, version + 1))
        for future in others:
            assert future.exception(WAIT_S) is None or isinstance(future.exception(), (ValueError, EngineDied))
        if updates:
            assert {service.version_of(i) for i in service.engines} <= {version, None}
        restarts = service.restarts
    for process in engines.all_processes:
        assert process.versions == sorted(set(process.versions)), f"versions of engine {process.index} must grow"
    assert len([s for s in spans if s[1].startswith("train/")]) == sum(len(g) for g in got)
    assert all(start <= end for _, _, start, end in spans)
    return restarts


def test_groups_after_an_update_have_its_version(fakes: Any) -> None:
    engines = fakes(2, 0.01)
    with GenerationService(engines) as service:
        before = service.generate(prompts(6, "a"), 1, SAMPLING, 0)
        wait_until(lambda: before.running == 6)
        update = service.update(3, [], {}, "finish")
        after = service.generate(prompts(4, "b"), 1, SAMPLING, 0)
        assert {s.weight_versions for group in after for s in group} == {((0, 3),)}
        assert {s.weight_versions for group in before for s in group} == {((0, 0),)}
        report = update.result(WAIT_S)
        assert set(report.engine_seconds) == {0, 1}
        assert min(report.drained_seconds.values()) > 0
        assert report.seconds >= max(report.drained_seconds.values())
        assert (service.version_of(0), service.version_of(1)) == (3, 3)


def test_engines_are_updated_each_for_itself(fakes: Any) -> None:
    engines = fakes(2, lambda uid: 0.3 if uid == "a/0" else 0.002)
    with GenerationService(engines) as service:
        slow = service.generate(prompts(2, "a"), 1, SAMPLING, 0)
        wait_until(lambda: slow.running == 1)
        update = service.update(1, [], {}, "finish")
        assert len(list(service.generate(prompts(5, "b"), 1, SAMPLING, 0))) == 5
        assert not update.done(), "engine 0 has still its long sample"
        assert (service.version_of(0), service.version_of(1)) == (0, 1)
        assert len(list(slow)) == 2
        assert update.result(WAIT_S).version == 1


def test_samples_in_flight_go_on_under_new_weights(fakes: Any) -> None:
    engines = fakes(1, 0.05)
    with GenerationService(engines) as service:
        stream = service.generate(prompts(1), 1, SAMPLING, 0)
        wait_until(lambda: stream.running == 1)
        service.update(1, [], {}, "continue").result(WAIT_S)
        assert stream.running == 1
        assert next(stream)[0].weight_versions == ((0, 0), (1, 1))


def test_a_newer_update_replaces_one_that_has_not_begun(fakes: Any) -> None:
    engines = fakes(1, 0.05)
    with GenerationService(engines) as service:
        stream = service.generate(prompts(1), 1, SAMPLING, 0)
        wait_until(lambda: stream.running == 1)
        first, second = service.update(1, [], {}), service.update(2, [], {})
        assert first.result(WAIT_S).replaced == (0,)
        assert second.result(WAIT_S).replaced == ()
        assert engines.processes[0].versions == [0, 2]
        with pytest.raises(ValueError, match="version 2 or later, got 1"):
            service.update(1, [], {}).result(WAIT_S)


def test_no_new_groups_while_complete_ones_wait(fakes: Any) -> None:
    engines = fakes(1, 0.002, max_num_seqs=1)  # two groups at the engine at most
    with GenerationService(engines) as service:
        stream = service.generate(prompts(20), 1, SAMPLING, 0, buffer_groups=3)
        wait_until(lambda: stream.ready >= 3 and stream.running == 0)
        time.sleep(0.03)
        assert stream.ready <= 3 + 2
        assert stream.waiting == 20 - stream.ready
        other = service.generate(prompts(3, "other"), 1, SAMPLING, 0)
        assert len(list(other)) == 3, "a full stream must not hold up others"
        assert len(list(stream)) == 20


def test_earlier_streams_go_first(fakes: Any) -> None:
    engines = fakes(1, 0.003, max_num_seqs=1)
    with GenerationService(engines) as service:
        first = service.generate(prompts(6, "a"), 2, SAMPLING, 0)
        second = service.generate(prompts(6, "b"), 2, SAMPLING, 0)
        assert len(list(second)) == len(list(first)) == 6
    assert [uid[0] for _, uid in engines.sent] == ["a"] * 6 + ["b"] * 6


def test_a_single_engine_is_waited_for(fakes: Any) -> None:
    engines = fakes(1, 0.01, start_s=0.05)
    with GenerationService(engines, max_restarts=1) as service:
        service.update(4, [], {}).result(WAIT_S)
        stream = service.generate(prompts(4), 2, SAMPLING, 0)
        wait_until(lambda: stream.running > 0)
        engines.kill(0)
        assert {s.weight_versions for group in stream for s in group} == {((0, 4),)}
        assert service.restarts == 1
        engines.kill(0)
        with pytest.raises(EngineDied, match=r"engine 0 died.*max_restarts=1 used up"):
            list(service.generate(prompts(1), 1, SAMPLING, 0))
        with pytest.raises(EngineDied, match="engine 0"):
            service.generate(prompts(1), 1, SAMPLING, 0)
        assert isinstance(service.update(5, [], {}).exception(WAIT_S), EngineDied)


def test_no_replacement_with_weights_that_nobody_has(fakes: Any) -> None:
    engines = fakes(1)
    engines.version = 7
    with GenerationService(engines) as service:
        assert service.version_of(0) == 7
        assert "send weights through the service" in str(service.add_engine().exception(WAIT_S))
        engines.kill(0)
        with pytest.raises(EngineDied, match="Send weights through the service"):
            list(service.generate(prompts(1), 1, SAMPLING, 0))


def test_closing_aborts_and_frees_the_ids(fakes: Any) -> None:
    engines = fakes(1, lambda uid: 30.0 if uid.startswith("long") else 0.001)
    with GenerationService(engines) as service:
        stream = service.generate([*prompts(1), *prompts(5, "long")], 1, SAMPLING, 0)
        next(stream)
        stream.close()
        stream.close()
        assert stream.next() is None
        engines.group_s = lambda uid: 0.001
        assert len(list(service.generate(prompts(5, "long"), 1, SAMPLING, 0))) == 5
        assert service.update(1, [], {}).result(WAIT_S).version == 1


def test_errors_reach_the_stream_they_belong_to(fakes: Any) -> None:
    engines = fakes(2)
    engines.generate_error = lambda uid: ArithmeticError("a bug") if uid == "a/1" else None
    with GenerationService(engines) as service:
        bad, good = service.generate(prompts(3, "a"), 1, SAMPLING, 0), service.generate(prompts(3, "b"), 1, SAMPLING, 0)
        with pytest.raises(ArithmeticError, match="a bug"):
            list(bad)
        assert len(list(good)) == 3
        engines.generate_error = lambda uid: TornWeights("torn")
        with pytest.raises(TornWeights):
            list(service.generate(prompts(1), 1, SAMPLING, 0))


def test_an_update_that_no_engine_takes_is_not_given_to_later_ones(fakes: Any) -> None:
    engines = fakes(1)
    engines.update_error = lambda index, version: WeightMismatch("1 missing") if version == 2 else None
    with GenerationService(engines) as service:
        service.update(1, [], {}).result(WAIT_S)
        with pytest.raises(WeightMismatch):
            service.update(2, [], {}).result(WAIT_S)
        assert service.version_of(0) == 1
        assert service.add_engine().result(WAIT_S) == 1
        assert service.version_of(1) == 1
        with pytest.raises(ValueError, match="expected a manifest"):
            service.update(3, [object()])
        with pytest.raises(ValueError, match="in_flight"):
            service.update(3, [], {}, "refuse")


def test_engines_that_do_not_answer_are_named(fakes: Any) -> None:
    engines = fakes(1, 60.0, generate_timeout_s=0.05, update_timeout_s=0.05, stop_timeout_s=0.05, update_s=60.0)
    service = GenerationService(engines)
    stream = service.generate(prompts(1), 1, SAMPLING, 0)
    with pytest.raises(EngineTimeout, match=r"no group of samples completed within 0\.01 s: . are at engines"):
        stream.next(timeout_s=0.01)
    with pytest.raises(EngineTimeout, match=r"engine 0: waited 0\.1 s for samples of prompt train/0/0"):
        stream.next(WAIT_S)
    with pytest.raises(EngineTimeout, match=r"engine 0: waited 0\.1 s for the weight update to version 1"):
        service.update(1, [], {}).result(WAIT_S)
    service._dispatcher._thread.join(0)
    service.stop()


def test_engines_come_and_go(fakes: Any) -> None:
    engines = fakes(1, 0.01, start_s=0.01)
    with GenerationService(engines) as service:
        with pytest.raises(ValueError, match="the only one"):
            service.remove_engine(0).result(WAIT_S)
        service.update(1, [], {}).result(WAIT_S)
        assert service.add_engine().result(WAIT_S) == 1
        assert (service.engines, service.version_of(1)) == ([0, 1], 1)
        stream = service.generate(prompts(12), 2, SAMPLING, 0)
        wait_until(lambda: stream.running > 0)
        service.remove_engine(0).result(WAIT_S)
        assert service.engines == [1]
        assert len(list(stream)) == 12
        assert service.add_engine().result(WAIT_S) == 2, "an index is never used again"
        with pytest.raises(ValueError, match=r"expected one of the engines \[1, 2\], got 0"):
            service.remove_engine(0).result(WAIT_S)
        with pytest.raises(ValueError, match=r"expected one of the engines \[1, 2\], got 0"):
            service.version_of(0)
        engines.kills_before_up = 1
        with pytest.raises(EngineDied):
            service.add_engine().result(WAIT_S)
        assert service.engines == [1, 2]


def test_fast_engines_are_measured_and_get_more(fakes: Any) -> None:
    engines = fakes(2, 0.004, speeds=[4.0, 1.0], max_num_seqs=1)
    with GenerationService(engines) as service:
        assert service.engine_speed() == {0: None, 1: None}
        assert len(list(service.generate(prompts(60), 1, SAMPLING, 0))) == 60
        speed = service.engine_speed()
        assert speed[0] > 2 * speed[1]
        assert 0 < service.busy_seconds(0) < 10
    counts = np.bincount([index for index, _ in engines.sent])
    assert counts[0] > 2 * counts[1]


def test_busy_time_and_speed_ignore_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = WorkMeter()
    meter.begin()
    now = 2.0
    meter.completed(100)
    meter.end()
    now = 1000.0
    assert (meter.busy_seconds, meter.tokens_per_second) == (2.0, 50.0)
    meter.begin()
    now = 1600.0
    meter.completed(6000)  # ten minutes at 10 tokens/s: what was before has faded
    assert meter.busy_seconds == 602.0
    assert meter.tokens_per_second == pytest.approx(10.0, rel=1e-3)


def test_predictors_are_asked_and_told(fakes: Any) -> None:
    class Predictor:
        told: list[tuple[str, list[int]]]

        def predict(self, wanted: Any) -> np.ndarray:
            return np.array([np.nan if p.ordinal == 0 else float(p.ordinal) for p in wanted])

        def observe(self, prompt: Prompt, lengths: Any) -> None:
            self.told.append((prompt.uid, list(lengths)))

    predictor = Predictor()
    predictor.told = []
    engines = fakes(1, max_num_seqs=1)
    with GenerationService(engines, dispatch=get_dispatch("longest_first"), predictor=predictor) as service:
        assert len(list(service.generate(prompts(6), 2, SAMPLING, 0))) == 6
    assert [uid for _, uid in engines.sent][:2] == ["train/0/5", "train/0/4"]
    assert sorted(predictor.told) == [(p.uid, [4, 4]) for p in prompts(6)]


def test_a_policy_that_idles_or_repeats_is_an_error(fakes: Any) -> None:
    class Policy:
        def __init__(self, pairs: list[tuple[int, int]]) -> None:
            self.pairs = pairs

        def assign(self, waiting: Any, engines: Any) -> list[tuple[int, int]]:
            return self.pairs

    for pairs, message in (([], "sent nothing though every engine is idle"), ([(0, 0), (0, 0)], "twice")):
        with (
            GenerationService(fakes(1, 1.0), dispatch=Policy(pairs)) as service,
            pytest.raises(RuntimeError, match=message),
        ):
            list(service.generate(prompts(2), 1, SAMPLING, 0))


def test_after_the_end(fakes: Any) -> None:
    service = GenerationService(fakes(1, 5.0))
    stream = service.generate(prompts(1), 1, SAMPLING, 0)
    assert list(service.generate([], 1, SAMPLING, 0)) == []
    wait_until(lambda: stream.running == 1)
    update = service.update(1, [], {})
    service.stop()
    service.stop()
    with pytest.raises(ServiceStopped):
        next(stream)
    for future in (update, service.update(2, [], {}), service.add_engine(), service.remove_engine(0)):
        assert isinstance(future.exception(WAIT_S), ServiceStopped)
    with pytest.raises(ServiceStopped):
        service.generate(prompts(1), 1, SAMPLING, 0)
    with pytest.raises(ValueError, match="buffer_groups"):
        GenerationService(fakes(1)).generate(prompts(1), 1, SAMPLING, 0, buffer_groups=0)
