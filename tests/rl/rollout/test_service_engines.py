"""The generation service over real engines whose processes are killed while they generate."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from megatron_ultraep.replay import layer_digests
from rl.models import tiny
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.pool import EnginePool
from rl.rollout.service import GenerationService
from rl.training.engine_routes import RoutesOfEngines
from rl.types import Prompt, Sample
from tests.rl.rollout.reference import assert_equals_transformers

TEMPERATURE = 0.8
KILLS = 5
WAIT_S = 240.0


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
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=256 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": repository}},
    )
    try:
        config = EngineConfig(
            str(models[0]), max_model_len=512, max_num_seqs=4, kv_cache_memory_bytes=16 << 20, stop_timeout_s=15
        )
        with EnginePool(config, 2) as pool:
            yield pool
    finally:
        ray.shutdown()


def serving(service: GenerationService, engine: int) -> bool:
    return engine in service.engines and service.version_of(engine) is not None


def busy(service: GenerationService) -> list[int]:
    return [i for i in service.engines if serving(service, i) and service._dispatcher.records[i].running]


@pytest.mark.slow
def test_killed_engines_lose_and_repeat_nothing(pool: EnginePool, models: list[Path]) -> None:
    rng = random.Random(0)
    wanted = prompts(120)
    weights = load_file(models[1] / "model.safetensors")
    manifest = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    delivered: list[list[Sample]] = []
    spans: list[str] = []
    service = GenerationService(pool, max_restarts=KILLS, on_span=lambda track, name, *rest: spans.append(name))
    with service, service.generate(wanted, 2, Sampling(250, temperature=TEMPERATURE), 1, buffer_groups=2) as stream:
        for kill in range(KILLS):
            delivered += [stream.next(WAIT_S) for _ in range(3)]
            if kill == 2:
                report = service.update(1, [ray.put(dict(weights))], manifest, "continue").result(WAIT_S)
                assert set(report.engine_seconds) == {0, 1}
            while not (victims := busy(service)):  # they stopped while complete groups waited
                delivered.append(stream.next(WAIT_S))
            victim = rng.choice(victims)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pool.infos[victim].pid, signal.SIGKILL)
            delivered.append(stream.next(WAIT_S))
            deadline = time.monotonic() + WAIT_S
            while service.restarts <= kill or not serving(service, victim):
                assert time.monotonic() < deadline, f"engine {victim} did not come back"
                if service.restarts <= kill and stream.ready:
                    delivered.append(stream.next(WAIT_S))  # keep calls going, which is how a death is noticed
                time.sleep(0.05)
        delivered += list(stream)
        assert service.restarts == KILLS
        assert {service.version_of(i) for i in service.engines} == {1}
        later = [group[0] for group in service.generate(prompts(4), 1, Sampling(20, temperature=TEMPERATURE), 2)]
    assert sorted(group[0].prompt.uid for group in delivered) == sorted(p.uid for p in wanted)
    assert {name for name in spans if name.startswith("train")} == {p.uid for p in wanted}
    assert spans.count("start") == KILLS
    samples = [sample for group in delivered for sample in group]
    assert len({sample.sample_id for sample in samples}) == 2 * len(wanted)
    fetch = RoutesOfEngines(60)
    fetch.engines = pool.handles
    rows = fetch([(s.routes, 0, s.length - 1, 0, s.routes.shape[1]) for s in samples])
    for sample, routes in zip(samples, rows, strict=True):
        np.testing.assert_array_equal(layer_digests(routes), sample.route_digests)
    counts = fetch.count([(s.routes, 0, s.length - 1) for s in samples])
    for sample, count in zip(samples, counts, strict=True):
        np.testing.assert_array_equal(count, sample.histogram)
    for sample in later:
        assert sample.weight_versions == ((0, 1),)
        assert_equals_transformers(
            sample, models[1], TEMPERATURE, routes=sample.routes.of(ray.get(sample.routes.handle, timeout=30))
        )


@pytest.mark.slow
def test_engines_come_and_go_and_their_routes_stay(pool: EnginePool) -> None:
    with GenerationService(pool) as service:
        stream = service.generate(prompts(24), 2, Sampling(100, temperature=TEMPERATURE), 3)
        added = service.add_engine().result(WAIT_S)
        groups = list(stream) + list(service.generate(prompts(12), 2, Sampling(50, temperature=TEMPERATURE), 4))
        assert len(groups) == 36
        samples = [sample for group in groups for sample in group]
        assert added in {s.routes.engine for s in samples}
        service.remove_engine(added).result(WAIT_S)
        assert pool.handles[added] is None
        fetch = RoutesOfEngines(60)
        fetch.engines = pool.handles
        for sample, routes in zip(
            samples, fetch([(s.routes, 0, s.length - 1, 0, s.routes.shape[1]) for s in samples]), strict=True
        ):
            np.testing.assert_array_equal(layer_digests(routes), sample.route_digests)
