"""Staged transfers as a run makes them, with a real trainer in Ray; engines are actors that only keep what they load.

What fails half-way is followed by the copy in the object store, and the next version goes directly again.
"""

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models import tiny
from rl.orchestration import transfer as orchestration
from rl.orchestration.transfer import WeightTransfer
from rl.rollout.pool import _future
from rl.rollout.weights import TornWeights, checked, fetch
from rl.training.group import Trainer, TrainerDied
from rl.training.spec import OptimizerSpec, TrainerSpec
from rl.transfer.receiver import receiver_name
from rl.transfer.staged_receiver import StagedReceiver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WAIT_S = 240.0


class Engine:
    """Takes updates as an engine's worker does."""

    def __init__(self, index: int) -> None:
        torch.set_num_threads(1)
        self.receiver = StagedReceiver(receiver_name(index, 0), torch.device("cpu"))
        self.loaded: dict[str, torch.Tensor] = {}
        self.fault: str | None = None

    def transfer_join(self, membership: Any, staging: Any) -> None:
        self.receiver.join(membership, staging)

    def fail_next(self, fault: str) -> None:
        """The next update: ``"raises"`` half-way, or ``"hangs"`` there until somebody gave the transfer up."""
        self.fault = fault

    def update_weights(self, chunks: list[Any], manifest: Any) -> float:
        fault, self.fault, loaded = self.fault, None, {}
        try:
            for number, (name, tensor) in enumerate(checked(fetch(chunks, WAIT_S, self.receiver), manifest)):
                loaded[name] = tensor.clone()
                if number == 5 and fault == "raises":
                    raise RuntimeError("a layer of another kind")
                if number == 5 and fault == "hangs":
                    store, deadline = self.receiver._board.store, time.monotonic() + WAIT_S
                    while not store.check(["failed"]) and time.monotonic() < deadline:
                        time.sleep(0.1)
        except Exception as error:
            raise TornWeights(str(error)) from error
        self.loaded = loaded
        return 0.0

    def weights(self) -> dict[str, torch.Tensor]:
        return self.loaded


class Pool:
    """What ``WeightTransfer`` needs of an ``EnginePool``."""

    def __init__(self, count: int) -> None:
        self.config, self.version = SimpleNamespace(tensor_parallel=1), 0
        self.handles = [ray.remote(Engine).options(num_cpus=0).remote(i) for i in range(count)]

    def indices(self) -> list[int]:
        return list(range(len(self.handles)))

    def start_engine(self, index: int) -> Future[Any]:
        ray.kill(self.handles[index])
        self.handles[index] = ray.remote(Engine).options(num_cpus=0).remote(index)
        return _future(self.handles[index].weights.remote(), index, "its start")

    def update_on(self, index: int, version: int, chunks: Any, manifest: Any, in_flight: str) -> Future[float]:
        return _future(self.handles[index].update_weights.remote(list(chunks), manifest), index, "an update")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.qwen3_moe(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture(scope="module")
def trainer(model: Path) -> Any:
    repository = str(Path(__file__).resolve().parents[3])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": repository}},
    )
    layout = ParallelLayout(world=2, tp=2, ep=2)
    try:
        with Trainer(TrainerSpec(str(model), layout, dtype="float32", optimizer=OptimizerSpec(1e-3))) as trainer:
            yield trainer
    finally:
        ray.shutdown()


def transfer_of(trainer: Trainer, pool: Pool, monkeypatch: pytest.MonkeyPatch, limit_s: float) -> WeightTransfer:
    monkeypatch.setattr(orchestration, "_BUCKET_BYTES", 60_000)
    config = SimpleNamespace(
        transfer_path="ipc",
        engine_dtype="float32",
        balance=SimpleNamespace(enabled=False, reorder=False),
        run=SimpleNamespace(limits=SimpleNamespace(weight_update_s=4 * limit_s)),
        trainer=SimpleNamespace(ranks=2, backend="gloo"),
    )
    return WeightTransfer(config, pool, trainer, lambda *_: None)


def update(transfer: WeightTransfer, version: int) -> str:
    """One version to all engines, as ``send_weights`` does it; how it travelled."""
    payload = transfer.prepare(settled=True)
    futures = [
        transfer.engines.update_on(i, version, payload.chunks, payload.manifest, "refuse")
        for i in transfer.engines.indices()
    ]
    for future in futures:
        future.result(WAIT_S)
    if payload.path == "ipc":
        transfer.release()
    return payload.path


def all_have(pool: Pool, stored: dict[str, torch.Tensor]) -> bool:
    return all(
        weights.keys() == stored.keys() and all(torch.equal(weights[n], t) for n, t in stored.items())
        for weights in ray.get([handle.weights.remote() for handle in pool.handles], timeout=WAIT_S)
    )


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_what_breaks_off_comes_from_the_store_and_the_next_version_directly(trainer, model, monkeypatch, caplog, fault):
    pool, stored = Pool(2), load_file(model / "model.safetensors")
    transfer = transfer_of(trainer, pool, monkeypatch, 5.0 if fault == "hangs" else 60.0)
    assert update(transfer, 1) == "ipc"
    assert transfer.engines.fallbacks == 0
    assert all_have(pool, stored)
    ray.get(pool.handles[1].fail_next.remote(fault), timeout=WAIT_S)
    assert update(transfer, 2) == "ipc"
    assert transfer.engines.fallbacks == 2  # it is a collective: both engines lost it
    assert all_have(pool, stored)
    said = "its caller stopped half-way" if fault == "raises" else "waited 5 s for engine 1 rank 0 to take bucket"
    assert said in caplog.text
    assert update(transfer, 3) == "ipc"
    assert transfer.engines.fallbacks == 2
    assert all_have(pool, stored)
    transfer.close()


def test_a_replaced_engine_gets_its_weights_from_an_offloaded_trainer(trainer, model, monkeypatch):
    pool, stored = Pool(2), load_file(model / "model.safetensors")
    transfer = transfer_of(trainer, pool, monkeypatch, 60.0)
    payload = transfer.prepare(settled=True)
    sent = [transfer.engines.update_on(i, 1, payload.chunks, payload.manifest, "refuse") for i in (0, 1)]
    for future in sent:
        future.result(WAIT_S)
    transfer.release()
    trainer.offload()
    transfer.engines.start_engine(0).result(WAIT_S)
    assert not all_have(pool, stored)
    transfer.engines.update_on(0, 1, payload.chunks, payload.manifest, "refuse").result(WAIT_S)
    assert all_have(pool, stored)
    assert transfer.engines.fallbacks == 1
    assert all(report.torch_allocated == 0 for report in trainer.memory())  # away again
    trainer.onload()
    assert update(transfer, 2) == "ipc"
    assert transfer.engines.fallbacks == 1
    transfer.close()


def test_without_all_engines_a_version_goes_through_the_store(trainer, model, monkeypatch):
    pool, stored = Pool(2), load_file(model / "model.safetensors")
    transfer = transfer_of(trainer, pool, monkeypatch, 60.0)
    monkeypatch.setattr(transfer.engines, "members", lambda: None)
    assert update(transfer, 1) == "store"
    assert all_have(pool, stored)
    monkeypatch.undo()
    monkeypatch.setattr(orchestration, "_BUCKET_BYTES", 60_000)
    ray.kill(pool.handles[1])  # it is not known yet, and is found out while members join
    assert transfer.prepare(settled=True).path == "store"
    transfer.close()


def test_a_rank_that_is_killed_is_named_long_before_the_limit(trainer, model, monkeypatch):
    """The last test here: the trainer is of no use afterwards."""
    pool = Pool(2)
    transfer = transfer_of(trainer, pool, monkeypatch, 10 * WAIT_S)
    ray.get(pool.handles[0].fail_next.remote("hangs"), timeout=WAIT_S)
    payload = transfer.prepare(settled=True)
    futures = [transfer.engines.update_on(i, 1, payload.chunks, payload.manifest, "refuse") for i in (0, 1)]
    os.kill(trainer.ranks[1]["pid"], signal.SIGKILL)
    for future in futures:
        with pytest.raises(TrainerDied, match="trainer rank 1"):
            future.result(WAIT_S)
    with pytest.raises(TrainerDied, match="trainer rank 1"):
        transfer.release()
    transfer.close()
