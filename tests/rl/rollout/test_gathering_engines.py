"""The tail of generation on real engines: samples that move have the tokens that they would have had."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from megatron_ultraep.replay import layer_digests
from rl.models import tiny
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.pool import EnginePool
from rl.rollout.service import GenerationService, GroupStream, TailRule
from rl.training.engine_routes import RoutesOfEngines
from rl.types import Prompt, Sample
from tests.rl.rollout.reference import assert_equals_transformers

LENGTHS = (220, 200, 180, 12, 9, 15, 11, 8)
GREEDY = Sampling(220, temperature=0.0, ignore_eos=True)


def prompts() -> list[Prompt]:
    """A few long responses among short ones; a prompt's samples are equally long."""
    tokens = np.random.default_rng(0).integers(3, 200, (len(LENGTHS), 40)).astype(np.int32)
    return [Prompt(f"train/0/{i}", i, 0, "", tokens[i], metadata={"max_tokens": n}) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def pool(model: Path) -> Iterator[EnginePool]:
    repository = str(Path(__file__).resolve().parents[3])
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=128 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": repository}},
    )
    try:
        config = EngineConfig(
            str(model), max_model_len=512, max_num_seqs=8, kv_cache_memory_bytes=16 << 20, stop_timeout_s=15
        )
        with EnginePool(config, 2) as pool:
            yield pool
    finally:
        ray.shutdown()


def rule(pool: EnginePool) -> TailRule:
    return TailRule(threshold=6, seats=8, kv_tokens=pool.info.kv_tokens, longest=260, poll_s=0.02)


def by_id(stream: GroupStream) -> dict[str, Sample]:
    return {sample.sample_id: sample for group in stream for sample in group}


def check(
    pool: EnginePool, model: Path, moved: dict[str, Sample], plain: dict[str, Sample], temperature: float = 0.0
) -> None:
    """Tokens and routes of samples that moved are whole; the tokens are those of samples that did not."""
    assert moved.keys() == plain.keys()
    fetch = RoutesOfEngines(60)
    fetch.engines = pool.handles
    for name, sample in moved.items():
        np.testing.assert_array_equal(sample.response_tokens, plain[name].response_tokens)
        np.testing.assert_allclose(sample.rollout_logprobs, plain[name].rollout_logprobs, atol=2e-5)
        assert sample.weight_versions == ((0, 0),)
        assert sample.finish_reason == "length"
        assert sample.routes is not None
        (rows,) = fetch([(sample.routes, 0, sample.routes.shape[0], 0, sample.routes.shape[1])])
        assert rows.shape[0] == sample.length - 1
        assert sample.route_digests is not None
        np.testing.assert_array_equal(layer_digests(rows), sample.route_digests)
    for name in ("train/0/0/0", "train/0/2/1"):
        compare(moved[name], model, temperature)


def compare(sample: Sample, model: Path, temperature: float) -> None:
    """With transformers, which reads all tokens at once."""
    assert sample.routes is not None
    assert_equals_transformers(
        sample, model, temperature, routes=sample.routes.of(ray.get(sample.routes.handle, timeout=30))
    )


@pytest.mark.slow
def test_moved_samples_have_the_same_tokens(pool: EnginePool, model: Path) -> None:
    with GenerationService(pool, max_restarts=2) as service:
        plain = by_id(service.generate(prompts(), 2, GREEDY, 1))
        stream = service.generate(prompts(), 2, GREEDY, 1, tail=rule(pool))
        moved = by_id(stream)
        report = stream.tail
        assert report is not None
        assert (len(report.kept), len(report.freed)) == (1, 1)
        assert report.unfinished <= 6
        assert report.moved >= 2
        assert report.kept_tokens > 0
        check(pool, model, moved, plain)

        # The engine that was kept dies: what had been broken off goes on from there.
        stream = service.generate(prompts(), 2, GREEDY, 1, tail=rule(pool))
        while stream.tail is None:
            assert stream.ready + stream.running + stream.waiting == len(LENGTHS)
            time.sleep(0.01)
        os.kill(pool.infos[stream.tail.kept[0]].pid, signal.SIGKILL)
        survived = by_id(stream)
        assert service.restarts == 1
        check(pool, model, survived, plain)


@pytest.mark.slow
def test_moved_samples_draw_the_numbers_they_would_have_drawn(pool: EnginePool, model: Path) -> None:
    sampling = Sampling(220, temperature=0.8, ignore_eos=True)
    with GenerationService(pool) as service:
        plain = by_id(service.generate(prompts(), 2, sampling, 1))
        stream = service.generate(prompts(), 2, sampling, 1, tail=rule(pool))
        moved = by_id(stream)
        assert stream.tail is not None
        assert stream.tail.moved >= 2
    check(pool, model, moved, plain, 0.8)
