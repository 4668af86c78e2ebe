"""Engines take each version once, directly or from its copy; whole runs go on when an engine dies."""

import json
import signal
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from rl.orchestration.direct import Direct, DirectEngines, OnDemand
from rl.rollout.fleet import EngineDied
from rl.rollout.weights import TornWeights
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

COPY: tuple[list[Any], dict[str, tuple[int, ...]]] = (["copy"], {"w": (1,)})


class Pool:
    """Engines 0 and 1; notes what they are sent, and leaves the answers to the test."""

    def __init__(self) -> None:
        self.config, self.version = SimpleNamespace(), 0
        self.sent: list[tuple[int, int, list[Any]]] = []
        self.answers: list[Future[float]] = []
        self.starts: list[Future[Any]] = []

    def indices(self) -> list[int]:
        return [0, 1]

    def start_engine(self, index: int) -> Future[Any]:
        self.starts.append(Future())
        return self.starts[-1]

    def update_on(self, index: int, version: int, chunks: Any, manifest: Any, in_flight: str) -> Future[float]:
        self.sent.append((index, version, list(chunks)))
        self.answers.append(Future())
        return self.answers[-1]

    def stop_engine(self, index: int) -> Future[Any]:
        return Future()

    def kill_engine(self, index: int) -> None:
        pass


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def broken() -> list[tuple[int, str]]:
    return []


@pytest.fixture
def engines(pool: Pool, broken: list[tuple[int, str]]) -> DirectEngines:
    return DirectEngines(pool, lambda generation, reason: broken.append((generation, reason)))


def direct(engines: DirectEngines, copied: bool = True) -> Direct:
    members = engines.members()
    assert members is not None
    copy: Future[Any] = Future()
    if copied:
        copy.set_result(COPY)
    return Direct("directly", members, lambda: copy, generation=7)


def update(engines: DirectEngines, index: int, chunk: Any, version: int = 1) -> Future[float]:
    return engines.update_on(index, version, [chunk], {"w": (1,)}, "refuse")


def test_members_take_it_directly_and_other_chunks_pass(engines, pool, broken):
    chunk = direct(engines)
    futures = [update(engines, i, chunk) for i in (0, 1)]
    plain = update(engines, 0, "bucket", version=2)
    assert pool.sent == [(0, 1, ["directly"]), (1, 1, ["directly"]), (0, 2, ["bucket"])]
    for seconds, answer in enumerate(pool.answers):
        answer.set_result(float(seconds))
    assert [f.result(1) for f in (*futures, plain)] == [0.0, 1.0, 2.0]
    assert engines.fallbacks == 0
    assert broken == []


def test_a_torn_transfer_is_followed_by_the_copy_when_it_is_there(engines, pool, broken):
    chunk = direct(engines, copied=False)
    future = update(engines, 0, chunk)
    pool.answers[0].set_exception(TornWeights("half-way"))
    assert broken == [(7, "engine 0: half-way")]
    assert len(pool.sent) == 1
    chunk.copy().set_result(COPY)
    assert pool.sent[1] == (0, 1, ["copy"])
    pool.answers[1].set_result(0.5)
    assert future.result(1) == 0.5
    assert engines.fallbacks == 1


def test_a_new_process_takes_the_copy_and_the_others_do_not_wait_for_the_dead_one(engines, pool, broken):
    chunk = direct(engines)
    first = update(engines, 1, chunk)
    died = EngineDied("engine 1 died")
    pool.answers[0].set_exception(died)
    assert first.exception(1) is died
    assert broken == [(7, "engine 1: engine 1 died")]
    engines.start_engine(1)
    assert engines.members() is None  # nobody joins while it starts
    pool.starts[0].set_result(None)
    assert engines.members() == {0: 0, 1: 1}
    update(engines, 1, chunk)
    assert pool.sent[-1] == (1, 1, ["copy"])


def test_an_engine_replaced_or_ended_during_a_transfer_ends_it(engines, pool, broken):
    chunk = direct(engines)
    update(engines, 0, chunk)
    update(engines, 1, chunk)
    engines.start_engine(0)
    engines.kill_engine(1)
    assert [generation for generation, _ in broken] == [7, 7]
    pool.starts[0].set_result(None)
    assert engines.members() == {0: 1}


def test_no_process_takes_a_transfer_twice(engines, pool):
    chunk = direct(engines)
    update(engines, 0, chunk)
    pool.answers[0].set_result(0.0)
    update(engines, 0, chunk)
    assert pool.sent[-1] == (0, 1, ["copy"])


def test_what_the_copy_met_is_reported(engines, pool):
    chunk = direct(engines, copied=False)
    future = update(engines, 0, chunk)
    pool.answers[0].set_exception(TornWeights("half-way"))
    chunk.copy().set_exception(RuntimeError("trainer rank 0 is gone"))
    with pytest.raises(RuntimeError, match="trainer rank 0"):
        future.result(1)


def test_a_copy_on_demand_is_made_once_and_only_when_asked_for(engines, pool):
    made = []

    def make():
        made.append(Future())
        return made[-1]

    chunk = Direct("directly", engines.members(), OnDemand(make), generation=7)
    futures = [update(engines, i, chunk) for i in (0, 1)]
    assert made == []
    for answer in pool.answers[:2]:
        answer.set_exception(TornWeights("half-way"))
    assert len(made) == 1
    made[0].set_result(COPY)
    for answer in pool.answers[2:]:
        answer.set_result(0.5)
    assert [future.result(1) for future in futures] == [0.5, 0.5]


def test_a_copy_that_cannot_be_begun_is_reported(engines, pool):
    def make():
        raise RuntimeError("no trainer is there")

    future = update(engines, 0, Direct("directly", engines.members(), OnDemand(make), generation=7))
    pool.answers[0].set_exception(TornWeights("half-way"))
    with pytest.raises(RuntimeError, match="no trainer"):
        future.result(1)


# ------------------------------------------------------------------ whole runs

SETTINGS = {
    "sampling__max_tokens": 24,
    "data__prompts_per_step": 4,
    "checkpoint__every": 0,
    "reward__path": "tests.rl.orchestration.rewards:of_tokens",  # a model that knows nothing learns from it, too
}


def metrics(directory: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "perf/step_time" in line]


def transfers(directory: Any) -> list[str]:
    """How each version travelled."""
    text = (directory / "run" / "timeline.json").read_text().rstrip().rstrip(",]")
    return [e["args"]["path"] for e in json.loads(text + "]") if "path" in e.get("args", {})]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_those_of_the_object_store(tmp_path):
    results = {}
    for path in ("store", "gloo"):
        directory = tmp_path / path
        directory.mkdir()
        command = Command(tiny_config(directory, **SETTINGS, run__steps=3, stream__transfer=path))
        try:
            assert command.end(400) == 0, command.output()[-3000:]
        finally:
            command.kill()
        assert set(transfers(directory)) == {path}
        names = ("train/loss", "train/grad_norm", "rollout/reward/mean", "rollout/response_length/mean")
        results[path] = [{name: line.get(name) for name in names} for line in metrics(directory)]
        assert all(line["stream/transfer_fallbacks"] == 0 for line in metrics(directory))
    assert any(line["train/loss"] for line in results["store"])
    assert results["gloo"] == results["store"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_colocated_engines_get_through_staging_memory_what_the_store_would_bring(tmp_path):
    """Two ranks of one tensor-parallel group, so that buckets pass on while ranks gather with each other."""
    results, responses = {}, {}
    for path in ("store", "ipc"):
        directory = tmp_path / path
        directory.mkdir()
        config = tiny_config(
            directory,
            **SETTINGS,
            run__steps=3,
            rollout__engines=2,
            trainer__parallel={"tp": 2, "ep": 2},
            trainer__sequence_parallel=True,
            stream={"transfer": path, "colocated": True},
        )
        command = Command(config)
        try:
            assert command.end(500) == 0, command.output()[-3000:]
            assert command.orphans() == []
        finally:
            command.kill()
        assert set(transfers(directory)) == {path}
        assert all(line["stream/transfer_fallbacks"] == 0 for line in metrics(directory))
        # Samples of steps after the first were drawn with weights that were sent.
        assert all(0 < line["train/rollout_logprob_abs_diff"] <= 1e-4 for line in metrics(directory))
        names = ("train/loss", "train/grad_norm", "rollout/reward/mean", "rollout/response_length/mean")
        results[path] = [{name: line.get(name) for name in names} for line in metrics(directory)]
        responses[path] = sorted(s for line in ledger_lines(directory / "run") for s in line["sample_ids"])
    assert len(results["store"]) == 3
    assert any(line["train/loss"] for line in results["store"])
    assert results["ipc"] == results["store"]
    assert responses["ipc"] == responses["store"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_colocated_engine_killed_during_the_run_gets_its_weights_from_the_offloaded_trainer(tmp_path):
    config = tiny_config(
        tmp_path,
        **SETTINGS,
        run__steps=6,
        rollout__engines=2,
        trainer__parallel={"tp": 2, "ep": 2},
        trainer__sequence_parallel=True,
        stream={"transfer": "ipc", "colocated": True},
    )
    command = Command(config)
    try:
        command.wait_for(lambda: command.steps() >= 2, 300, "two steps")
        command.actors("EngineActor")[0].send_signal(signal.SIGKILL)
        assert command.end(500) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    lines = ledger_lines(tmp_path / "run")
    samples = [s for line in lines for s in line["sample_ids"]]
    assert len(lines) == 6
    assert len(samples) == len(set(samples)) == 6 * 4 * 4
    assert "takes weights of version" in command.output() or "object store this time" in command.output()
    assert metrics(tmp_path)[-1]["stream/transfer_fallbacks"] >= 1
    assert transfers(tmp_path)[-1] == "ipc"  # the next versions go directly again


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_killed_during_the_run_is_survived(tmp_path, staleness):
    config = tiny_config(
        tmp_path,
        **SETTINGS,
        run__steps=8,
        rollout__engines=2,
        stream__transfer="gloo",
        stream__staleness=staleness,
        stream__in_flight="continue",
    )
    command = Command(config)
    try:
        command.wait_for(lambda: command.steps() >= 2, 300, "two steps")
        command.actors("EngineActor")[0].send_signal(signal.SIGKILL)
        assert command.end(400) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    lines = ledger_lines(tmp_path / "run")
    samples = [s for line in lines for s in line["sample_ids"]]
    assert len(lines) == 8
    assert len(samples) == len(set(samples)) == 8 * 4 * 4
    assert "takes weights of version" in command.output() or "object store this time" in command.output()
    assert metrics(tmp_path)[-1]["stream/transfer_fallbacks"] >= 1
    assert "gloo" in transfers(tmp_path)
