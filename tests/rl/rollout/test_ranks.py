"""An engine of two tensor-parallel ranks, each a process, as a Ray actor; and what of ranks needs no engine."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from rl.models import tiny
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.pool import EngineDied, EnginePool
from rl.rollout.ranks import Answer, answered, call_ranks
from rl.rollout.service import GenerationService
from rl.rollout.weights import TornWeights
from rl.transfer.links import Limits, Rendezvous, source_name
from rl.transfer.plan import TensorSpec, make_plan
from rl.transfer.receiver import Incoming, receiver_names
from rl.transfer.sender import Sender
from rl.types import Prompt, Sample
from tests.rl.rollout.reference import assert_equals_transformers

TEMPERATURE = 0.8
SAMPLING = Sampling(24, temperature=TEMPERATURE, ignore_eos=True)
DENSE = 1  # the layer that is dense


def prompts(count: int) -> list[Prompt]:
    tokens = np.random.default_rng(0).integers(3, 200, (count, 40)).astype(np.int32)
    return [Prompt(f"train/0/{i}", i, 0, "", tokens[i]) for i in range(count)]


class Unportable(RuntimeError):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class Engine:
    """Answers as two ranks."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers

    def collective_rpc(self, method: str, args: tuple) -> list[Answer]:
        return self.answers


def test_ranks_answer_with_errors_which_the_caller_raises() -> None:
    @answered
    def half(number: int) -> float:
        if number % 2:
            raise Unportable("odd", "number")
        return number / 2

    assert half(4) == Answer(2.0)
    failed = pickle.loads(pickle.dumps(half(3)))
    assert call_ranks(Engine([half(4), half(6)]), "half") == [2.0, 3.0]
    with pytest.raises(RuntimeError, match="Unportable: odd number") as caught:
        call_ranks(Engine([half(4), failed]), "half")
    assert caught.value.__notes__ == ["on rank 1 of 2 of the engine"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("qwen3")
    return [tiny.qwen3_moe(root / str(seed), seed=seed, mlp_only_layers=(DENSE,)) for seed in range(2)]


def engine_config(models: list[Path]) -> EngineConfig:
    return EngineConfig(
        str(models[0]),
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=8 << 20,
        tensor_parallel=2,
        stop_timeout_s=20,
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None, models: list[Path]) -> Iterator[EnginePool]:
    with EnginePool(engine_config(models)) as pool:
        yield pool


def check(pool: EnginePool, model: Path, version: int, count: int = 2) -> None:
    for group in pool.generate(prompts(count), 2, SAMPLING, seed=version):
        for sample in group:
            assert isinstance(sample, Sample)
            assert sample.weight_versions == ((0, version),)
            assert_equals_transformers(
                sample, model, TEMPERATURE, routes=sample.routes.of(ray.get(sample.routes.handle, timeout=30))
            )


def replaced(pool: EnginePool, service: GenerationService, kill: int) -> None:
    """A process of engine 0 is killed while it generates: another takes its place, and every group comes."""
    before = (pool.info.pid, *pool.info.rank_pids)
    stream = service.generate(prompts(8), 2, Sampling(200, temperature=TEMPERATURE, ignore_eos=True), seed=5)
    with stream:
        groups = [next(stream)]
        os.kill(before[kill], signal.SIGKILL)
        groups += list(stream)
    assert sorted(group[0].prompt.uid for group in groups) == sorted(p.uid for p in prompts(8))
    wait_until_gone(before)
    assert len({*before, pool.info.pid, *pool.info.rank_pids}) == 6


@pytest.mark.slow
def test_another_engine_takes_the_place_of_a_dead_one(cluster: None, models: list[Path]) -> None:
    """Once its second rank is killed, once its own process, which must take both ranks with it."""
    with EnginePool(engine_config(models)) as pool:
        with GenerationService(pool, max_restarts=2) as service:
            replaced(pool, service, kill=2)
            replaced(pool, service, kill=0)
        pids = (pool.info.pid, *pool.info.rank_pids)
    wait_until_gone(pids)


def wait_until_gone(pids: tuple[int, ...]) -> None:
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


def test_logprobs_and_routes_equal_transformers(pool: EnginePool, models: list[Path]) -> None:
    assert (pool.info.moe_layers, pool.info.experts, pool.info.topk) == ((0, 2, 3), 8, 2)
    assert len(pool.info.rank_pids) == 2
    check(pool, models[0], 0, count=6)
    # Their segments of shared memory go with them, however they end.
    maps = "".join(Path("/proc", str(pid), "maps").read_text() for pid in pool.info.rank_pids)
    opened = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/dev/shm/" in line}
    assert len([name for name in opened if name.endswith("(deleted)")]) >= 3
    assert [name for name in opened if not name.endswith("(deleted)")] == []


def test_weights_come_through_the_object_store(pool: EnginePool, models: list[Path]) -> None:
    for version, path in ((1, models[1]), (2, models[0])):
        tensors = [(name, tensor.numpy()) for name, tensor in load_file(path / "model.safetensors").items()]
        manifest = {name: tensor.shape for name, tensor in tensors}
        chunks = [ray.put(dict(tensors[i : i + 16])) for i in range(0, len(tensors), 16)]
        # What breaks off half-way breaks off on both ranks, whose answers to later calls are still their own.
        with pytest.raises(TornWeights, match="announced tensors never came"):
            pool.update_weights(version, chunks[:-1], manifest)
        with pytest.raises(TornWeights, match="send a whole update"):
            list(pool.generate(prompts(1), 1, SAMPLING, seed=0))
        assert pool.update_weights(version, chunks, manifest) < 60
        check(pool, path, version)


def test_each_rank_takes_a_direct_transfer(pool: EnginePool, models: list[Path]) -> None:
    new = load_file(models[1] / "model.safetensors")
    plan = make_plan({0: [TensorSpec(n, tuple(t.shape), "float32") for n, t in new.items()]}, 300_000)
    limits = Limits(join_s=60.0, start_s=60.0, bucket_s=60.0)
    members = receiver_names([0], 2)
    assert members == ("engine 0 rank 0", "engine 0 rank 1")
    rendezvous = Rendezvous("127.0.0.1")  # lives as long as the transfer
    membership = rendezvous.generation([source_name(0)], members, "gloo", limits)
    sender = Sender(source_name(0), torch.device("cpu"))
    joining = pool.handles[0].transfer_join.remote(membership)
    sender.join(membership)
    ray.get(joining, timeout=60)
    sending = threading.Thread(target=sender.send, args=(plan, 0, iter(new.items())))
    sending.start()
    try:
        pool.update_weights(3, [Incoming(plan)], plan.manifest)
    finally:
        sending.join(60)
        sender.close()
    check(pool, models[1], 3)


def test_an_engine_must_fit_on_one_node(cluster: None, models: list[Path]) -> None:
    config = EngineConfig(str(models[0]), device="cuda", tensor_parallel=2)
    with pytest.raises(ValueError, match=r"expected a node with 2 GPUs, the largest of Ray's has 0"):
        EnginePool(config)


def test_death_of_a_rank_is_named_and_leaves_none(pool: EnginePool) -> None:
    """The last test of this engine."""
    groups = pool.generate(prompts(8), 2, Sampling(200, ignore_eos=True), seed=5)
    next(groups)
    pids = pool.info.rank_pids
    os.kill(pids[1], signal.SIGKILL)
    said = rf"engine 0 died while we waited for .*rank 1 of 2 \(process {pids[1]}\) ended with exit code -9"
    with pytest.raises(EngineDied, match=said):
        list(groups)
    wait_until_gone(pids)
    [health] = pool.health()
    assert not health["alive"]
    with pytest.raises(EngineDied, match=r"rank 1 of 2"):
        pool.abort(["x"])
