"""The tail of generation is gathered on few engines: the same samples, nothing lost, nothing twice, whatever dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.rollout.config import Sampling
from rl.rollout.service import GenerationService
from rl.rollout.streams import GroupStream
from rl.rollout.tail import TailRule
from rl.types import Prompt, Sample
from tests.rl.rollout.fake_engines import TokenEngines, greedy

SAMPLING = Sampling(400)
WAIT_S = 20.0
SLOW_S = 0.004  # of a token, where a test must look at the tail before it has ended


def prompts(count: int, name: str = "train/0") -> list[Prompt]:
    return [Prompt(f"{name}/{i}", i, 0, "", np.arange(3, dtype=np.int32)) for i in range(count)]


def rule(threshold: int, seats: int = 64) -> TailRule:
    return TailRule(threshold, seats, kv_tokens=1 << 20, longest=403, poll_s=0.002)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Callable[..., TokenEngines]]:
    made = []

    def make(engines: int, length: Callable[[str], int], **settings: Any) -> TokenEngines:
        made.append(TokenEngines(tmp_path, engines, length, **settings))
        return made[-1]

    yield make
    for engines in made:
        engines.close()


def check(groups: list[list[Sample]], early: list[Sample], length: Callable[[str], int]) -> None:
    """Every sample is what it would have been without moving; early ones are those that came with their groups."""
    samples = {sample.sample_id: sample for group in groups for sample in group}
    for name, sample in samples.items():
        np.testing.assert_array_equal(sample.response_tokens, greedy(name)[: length(name)])
        np.testing.assert_array_equal(sample.rollout_logprobs, -sample.response_tokens / 1e4)
        assert sample.finish_reason == "stop"
        starts = [start for start, _ in sample.weight_versions]
        assert starts[0] == 0
        assert starts == sorted(set(starts))
    assert len({sample.sample_id for sample in early}) == len(early)
    for sample in early:
        assert sample is samples[sample.sample_id]


def test_the_rest_goes_on_where_most_is_left(fakes: Any) -> None:
    lengths = {"train/0/0": 120, "train/0/1": 90, "train/0/2": 100, "train/0/3": 5}
    spans: list[tuple[Any, ...]] = []
    engines = fakes(2, lambda name: 4 if name.endswith("1") else lengths[name.rsplit("/", 1)[0]], token_s=SLOW_S)
    with GenerationService(engines, on_span=lambda *span: spans.append(span)) as service:
        stream = service.generate(prompts(4), 2, SAMPLING, 0, tail=rule(3))
        wait_until(lambda: stream.tail is not None)
        early = stream.take_early()
        report = stream.tail
        assert report is not None
        assert (report.unfinished, len(report.kept), len(report.freed)) == (3, 1, 1)
        assert report.moved in (1, 2)
        assert report.kept_tokens > 0
        assert service.version_of(report.freed[0]) == 0
        groups = list(stream)
        assert len({s.prompt.uid for s in early}) == 3, "the short half of each of the three groups was there before"
        check(groups, early, engines.length)
        assert len(engines.continued) == report.moved
        assert next(span for span in spans if span[1] == "migrate")[4]["kept_tokens"] > 0
        engines.length = lambda name: 20
        assert len(list(service.generate(prompts(6, "train/1"), 1, SAMPLING, 0))) == 6
        assert {i for i, uid in engines.sent if uid.startswith("train/1")} == {0, 1}, "freed engines serve again"


def test_no_engine_more_is_freed_than_can_be(fakes: Any) -> None:
    engines = fakes(3, lambda name: 60 if name.endswith("0") else 3, token_s=SLOW_S)
    with GenerationService(engines) as service:
        stream = service.generate(prompts(6), 2, SAMPLING, 0, tail=rule(6, seats=3))
        wait_until(lambda: stream.tail is not None)
        assert stream.tail is not None
        assert (len(stream.tail.kept), len(stream.tail.freed)) == (2, 1)
        groups = list(stream)
    check(groups, stream.take_early(), engines.length)


def test_a_threshold_that_is_never_met_moves_nothing(fakes: Any) -> None:
    engines = fakes(2, lambda name: 30)
    with GenerationService(engines) as service:
        stream = service.generate(prompts(8), 2, SAMPLING, 0, tail=rule(3))
        groups = list(stream)
    assert stream.tail is None
    assert engines.continued == []
    check(groups, [], engines.length)


def test_kept_engine_dies(fakes: Any) -> None:
    engines = fakes(2, lambda name: 150 if name.endswith("0") else 3, token_s=SLOW_S)
    with GenerationService(engines, max_restarts=3) as service:
        stream = service.generate(prompts(4), 2, SAMPLING, 0, tail=rule(4))
        wait_until(lambda: stream.tail is not None)
        assert stream.tail is not None
        moved = {name for _, name, _ in engines.continued}
        engines.kill(stream.tail.kept[0])
        groups = list(stream)
        assert service.restarts == 1
    check(groups, stream.take_early(), engines.length)
    again = [name for _, name, _ in engines.continued]
    assert all(again.count(name) == 2 for name in moved), "what was broken off went on, it did not begin again"


@pytest.mark.parametrize("when", ["abort_on", "continue_on", "finished_on"])
def test_an_engine_dies_in_the_middle_of_the_move(fakes: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The source when it is to break off, the target when it gets what moves, the target before that."""
    engines = fakes(2, lambda name: 60 if name.endswith("0") else 3, token_s=SLOW_S)
    original, killed = getattr(engines, when), []

    def dies_first(index: int, *arguments: Any) -> Any:
        if not killed:
            killed.append(index)
            engines.kill(index)
        return original(index, *arguments)

    monkeypatch.setattr(engines, when, dies_first)
    with GenerationService(engines, max_restarts=1) as service:
        stream = service.generate(prompts(4), 2, SAMPLING, 0, tail=rule(4))
        groups = list(stream)
        assert service.restarts == len(killed) == 1
        assert stream.tail is not None
        assert killed[0] in (stream.tail.freed if when == "abort_on" else stream.tail.kept)
    check(groups, stream.take_early(), engines.length)
    assert len(groups) == 4


def test_newer_weights_at_the_target_are_not_mixed_in(fakes: Any) -> None:
    """What was broken off under older weights is generated anew where only newer ones are to be had."""
    engines = fakes(2, lambda name: 80 if name.endswith("0") else 3, token_s=SLOW_S)
    with GenerationService(engines, max_restarts=3) as service:
        stream = service.generate(prompts(4), 2, SAMPLING, 0, tail=rule(4))
        wait_until(lambda: stream.tail is not None)
        assert stream.tail is not None
        update = service.update(1, [], {}, "finish")
        engines.kill(stream.tail.kept[0])
        groups = list(stream)
        assert update.result(WAIT_S).version == 1
    check(groups, stream.take_early(), engines.length)
    assert {s.weight_versions for group in groups for s in group} == {((0, 0),), ((0, 1),)}


@pytest.mark.parametrize("block", range(4))
def test_every_sample_once_whatever_happens(fakes: Any, block: int) -> None:
    """25 runs a block: engines die before, during and after the move, weights come, engines come and go."""
    found = [random_run(fakes, seed) for seed in range(25 * block, 25 * block + 25)]
    assert sum(moved for moved, _ in found) >= 8
    assert sum(restarts for _, restarts in found) >= 10


def random_run(fakes: Any, seed: int) -> tuple[int, int]:
    """Samples that moved, and processes that were replaced."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5))
    drawn = np.clip(rng.lognormal(2.3, 1.0, 256), 1, 120).astype(int)

    def length(name: str) -> int:
        _, k, prompt, sample = name.split("/")
        return int(drawn[(int(k) * 97 + int(prompt) * 5 + int(sample)) % 256])

    engines = fakes(count, length, token_s=0.001, speeds=rng.choice([0.5, 1.0, 2.0], 8), start_s=0.002)
    with GenerationService(engines, max_restarts=1000) as service:
        streams: list[tuple[list[Prompt], GroupStream]] = []
        for k in range(int(rng.integers(1, 3))):
            wanted, samples = prompts(int(rng.integers(4, 16)), f"train/{k}"), int(rng.integers(1, 4))
            threshold = max(1, int(rng.uniform(0.2, 0.9) * len(wanted) * samples))
            seats = int(rng.choice([4, 64]))
            streams.append((wanted, service.generate(wanted, samples, SAMPLING, seed, tail=rule(threshold, seats))))
        got: list[list[list[Sample]]] = [[] for _ in streams]
        takers = [
            threading.Thread(target=lambda k=k, s=s: got[k].extend(s), daemon=True) for k, (_, s) in enumerate(streams)
        ]
        for taker in takers:
            taker.start()
        version, updates, others = 0, [], []
        for _ in range(int(rng.integers(2, 8))):
            time.sleep(float(rng.uniform(0, 0.012)))
            what = rng.random()
            if what < 0.5:
                engines.kill(int(rng.integers(0, count)))
            elif what < 0.6:
                version += 1
                updates.append(service.update(version, [], {}, str(rng.choice(["finish", "continue"]))))
            elif what < 0.7:
                others.append(service.add_engine())
            elif what < 0.8:
                others.append(service.remove_engine(int(rng.integers(0, count))))
        for taker in takers:
            taker.join(WAIT_S)
            assert not taker.is_alive(), f"seed {seed} hangs"
        for (wanted, stream), groups in zip(streams, got, strict=True):
            assert sorted(group[0].prompt.uid for group in groups) == sorted(p.uid for p in wanted), f"seed {seed}"
            assert (stream.waiting, stream.running, stream.ready) == (0, 0, 0)
            check(groups, stream.take_early(), length)
        for update in updates:
            update.result(WAIT_S)
        for future in others:
            future.exception(WAIT_S)
        assert not any(record.resting for record in service._dispatcher.records.values())
        moved = len({name for _, name, _ in engines.continued})
        return moved, service.restarts
