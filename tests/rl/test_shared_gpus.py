"""Which GPU is an actor's own: real Ray, with GPUs that it only counts."""

import os

import pytest
import ray

from rl import shared_gpus
from rl.shared_gpus import SEES_ALL_GPUS, own_gpu


@pytest.mark.parametrize(
    ("shown", "given", "index"), [(None, "1", 1), ("3,5", "5", 1), ("GPU-a,GPU-b", "GPU-a", 0), ("7", "7", 0)]
)
def test_index_among_those_it_sees(monkeypatch, shown, given, index):
    show(monkeypatch, shown, [given])
    assert own_gpu() == index


@pytest.mark.parametrize(("shown", "given"), [(None, []), (None, ["0", "1"]), ("0", ["1"])])
def test_not_one_that_it_sees(monkeypatch, shown, given):
    show(monkeypatch, shown, given)
    with pytest.raises(RuntimeError, match="expected one GPU from Ray"):
        own_gpu()


def show(monkeypatch, shown, given):
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)

    class Context:
        def get_accelerator_ids(self):
            return {"GPU": given}

    monkeypatch.setattr(shared_gpus.ray, "get_runtime_context", Context)


@pytest.mark.timeout(300)
def test_actors_of_a_node_differ(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:

        @ray.remote(num_gpus=1, num_cpus=1, runtime_env={"env_vars": SEES_ALL_GPUS})
        class Rank:
            def look(self):
                return os.environ["CUDA_VISIBLE_DEVICES"], own_gpu()

        ranks = [Rank.remote() for _ in range(2)]
        found = ray.get([rank.look.remote() for rank in ranks], timeout=200)
    finally:
        ray.shutdown()
    assert sorted(found) == [("3,5", 0), ("3,5", 1)]
