"""One engine as a Ray actor, a Mixtral model this time, through its whole life."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from megatron_ultraep.replay import layer_digests
from rl.models import tiny
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.engine import EngineTimeout
from rl.rollout.pool import EngineDied, EnginePool
from rl.rollout.weights import WeightMismatch
from rl.training.engine_routes import RoutesLost, RoutesOfEngines
from rl.types import Prompt, Sample
from tests.rl.rollout.reference import assert_equals_transformers

TEMPERATURE = 0.8
SAMPLING = Sampling(24, temperature=TEMPERATURE, ignore_eos=True)


def prompts(count: int) -> list[Prompt]:
    tokens = np.random.default_rng(0).integers(3, 200, (count, 40)).astype(np.int32)
    return [Prompt(f"train/0/{i}", i, 0, "", tokens[i]) for i in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mixtral")
    return [tiny.mixtral(root / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def pool(models: list[Path]) -> Iterator[EnginePool]:
    repository = str(Path(__file__).resolve().parents[3])
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=128 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": repository}},
    )
    try:
        config = EngineConfig(
            str(models[0]), max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=16 << 20, stop_timeout_s=15
        )
        with EnginePool(config) as pool:
            yield pool
    finally:
        ray.shutdown()


def test_every_prompt_comes_back_once_with_its_group(pool: EnginePool, models: list[Path]) -> None:
    assert (pool.info.moe_layers, pool.info.experts, pool.info.topk) == ((0, 1, 2, 3), 8, 2)
    groups = list(pool.generate(prompts(10), 4, SAMPLING, seed=1))
    assert sorted(group[0].prompt.uid for group in groups) == sorted(p.uid for p in prompts(10))
    for group in groups:
        assert [s.sample_id for s in group] == [f"{group[0].prompt.uid}/{k}" for k in range(4)]
    sample = groups[0][0]
    assert isinstance(sample.routes.handle, ray.ObjectRef), "rows must travel by reference"
    assert_equals_transformers(
        sample, models[0], TEMPERATURE, routes=sample.routes.of(ray.get(sample.routes.handle, timeout=30))
    )


def test_async_generation(pool: EnginePool) -> None:
    async def collect() -> int:
        return len([group async for group in pool.agenerate(prompts(3), 2, SAMPLING, seed=1)])

    assert asyncio.run(collect()) == 3


def test_rows_are_sliced_where_they_are(pool: EnginePool) -> None:
    samples = [group[0] for group in pool.generate(prompts(2), 1, SAMPLING, seed=2)]
    requests = [(samples[0].routes, 3, 9, 1, 2), (samples[1].routes, 0, 2, 0, 4)]
    parts = ray.get(pool.handles[0].slice_routes.remote(requests), timeout=30)
    for part, (reference, row, row_stop, layer, layer_stop) in zip(parts, requests, strict=True):
        whole = reference.of(ray.get(reference.handle, timeout=30))
        np.testing.assert_array_equal(part, whole[row:row_stop, layer:layer_stop])


def test_samples_of_a_group_share_an_object(pool: EnginePool) -> None:
    (group,) = pool.generate(prompts(1), 3, SAMPLING, seed=3)
    assert len({s.routes.handle for s in group}) == 1
    assert [s.routes.first for s in group] == np.cumsum([0, *(s.length - 1 for s in group[:2])]).tolist()
    parts = ray.get(pool.handles[0].slice_routes.remote([(s.routes, 0, s.length - 1, 0, 4) for s in group]), timeout=30)
    counts = ray.get(pool.handles[0].count_routes.remote([(s.routes, 0, s.length - 1) for s in group]), timeout=30)
    for sample, part, count in zip(group, parts, counts, strict=True):
        np.testing.assert_array_equal(layer_digests(part), sample.route_digests)
        np.testing.assert_array_equal(count, sample.histogram)


def test_weights_arrive_as_references(pool: EnginePool, models: list[Path]) -> None:
    for version, path in ((1, models[1]), (2, models[0])):
        # Numpy, as an exporter without torch on the wire would send.
        tensors = [(name, tensor.numpy()) for name, tensor in load_file(path / "model.safetensors").items()]
        manifest = {name: tensor.shape for name, tensor in tensors}
        with pytest.raises(ValueError, match="pass manifest="):
            pool.update_weights(version, [ray.put(dict(tensors))])
        with pytest.raises(WeightMismatch, match="1 missing"):
            pool.update_weights(version, [], dict(list(manifest.items())[1:]))
        chunks = [ray.put(dict(tensors[i : i + 16])) for i in range(0, len(tensors), 16)]
        assert pool.update_weights(version, chunks, manifest) < 30
        sample = next(pool.generate(prompts(1), 1, SAMPLING, seed=version))[0]
        assert sample.weight_versions == ((0, version),)
        assert_equals_transformers(
            sample, path, TEMPERATURE, routes=sample.routes.of(ray.get(sample.routes.handle, timeout=30))
        )


def test_stopping_early_aborts_the_rest(pool: EnginePool) -> None:
    groups = pool.generate(prompts(8), 2, Sampling(200, ignore_eos=True), seed=3)
    next(groups)
    groups.close()
    assert len(list(pool.generate(prompts(8), 2, Sampling(2), seed=4))) == 8, "aborted ids must be free again"


def test_a_wait_that_is_too_long_names_the_engine(pool: EnginePool) -> None:
    with pytest.raises(EngineTimeout, match=r"engine 0: waited 0 s for its health"):
        pool._all({0: pool.handles[0].health.remote()}, 0.0, "its health")


@ray.remote(num_cpus=0)
class Owner:
    """Something else than this process to own rows."""

    def put(self, rows: np.ndarray) -> list[ray.ObjectRef]:
        return [ray.put(rows)]


def test_rows_whose_owner_is_gone_are_an_error(pool: EnginePool) -> None:
    samples = sorted(
        (group[0] for group in pool.generate(prompts(2), 1, SAMPLING, seed=6)), key=lambda one: one.sample_id
    )
    owner = Owner.remote()
    [handle] = ray.get(owner.put.remote(ray.get(samples[0].routes.handle, timeout=30)), timeout=60)
    lost = replace(samples[0].routes, handle=handle)
    fetch = RoutesOfEngines(60)
    fetch.engines = pool.handles
    np.testing.assert_array_equal(fetch([(lost, 0, 4, 0, 4)])[0], fetch([(samples[0].routes, 0, 4, 0, 4)])[0])
    ray.kill(owner)

    def keep_asking() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # news of the death take a moment
            time.sleep(0.1)
            fetch([(lost, 0, 4, 0, 4), (samples[1].routes, 0, 4, 0, 4)])

    with pytest.raises(RoutesLost, match=r"routes that engine 0 captured are lost .* of samples train/0/0/0"):
        keep_asking()
    assert fetch([(samples[1].routes, 0, 4, 0, 4)])[0].shape == (4, 4, 2)


def test_death_of_an_engine_is_named(pool: EnginePool) -> None:
    """The last test: it kills the engine."""
    groups = pool.generate(prompts(8), 2, Sampling(200, ignore_eos=True), seed=5)
    sample = next(groups)[0]
    assert isinstance(sample, Sample)
    os.kill(pool.info.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"engine 0 died while we waited for samples of prompt train/0/"):
        list(groups)
    with pytest.raises(EngineDied, match="engine 0 died while we waited for its health"):
        pool.health()
    assert pool.sleep() == pool.wake() == 0.0  # it holds nothing that would have to be freed
    # What was delivered before keeps its routes; with no engine left, who trains cuts them.
    fetch = RoutesOfEngines(30)
    fetch.engines = pool.handles
    [rows] = fetch([(sample.routes, 0, sample.length - 1, 0, 4)])
    np.testing.assert_array_equal(layer_digests(rows), sample.route_digests)
    with pytest.raises(RuntimeError, match="engine 0 is gone and no other is left to count"):
        fetch.count([(sample.routes, 0, 4)])
