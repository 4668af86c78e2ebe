"""Seconds of a step: beside what was measured, and never below their bounds."""

import json
import re

import pytest

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture
from rl.planning import constants
from rl.planning.cluster import Cluster, cluster_of
from rl.planning.times import Batch, Training, generation, one_pass, transfer, turns
from tests.rl.planning.models import ROOT, published
from tests.rl.planning.test_memory import RESULTS, benchmarked

H200 = cluster_of("h200", 8, 50.0)
BATCH = Batch(samples=1024, prompts=64, prompt=512, response=2048, longest=8192)


def training(**changed):
    settings = {
        "parallel": ParallelSection(ep=8),
        "ranks": 8,
        "tokens_per_micro_batch": 8192,
        "recompute": "none",
        "modules": (),
        "imbalance": 1.0,
    }
    return Training(**settings | changed)


def seconds(batch=BATCH, backward=True, arch=None, cluster=H200, **changed):
    return one_pass(
        "training", arch or published("qwen3-30b-a3b"), batch, cluster, training(**changed), backward=backward
    )


def test_every_result_that_constants_name_is_there():
    text = (ROOT / "rl" / "planning" / "constants.py").read_text()
    named = re.findall(r"benchmarks/results/[\w.-]+?\.json", text)
    assert len(named) >= 5
    for name in named:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(("name", "imbalance"), [("model-gpu-ep4", 1.0), ("model-trace-gpu-ep4", 1.38)])
def test_a_measured_training_step(name, imbalance):
    """Two micro-batches of 8,192 tokens a rank, planned ahead; the efficiency is that of the second."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    shape = document["shapes"][0]
    row = next(
        r
        for r in document["rows"]
        if r["method"] == "foresight" and r["imbalance"] == pytest.approx(imbalance, abs=0.01)
    )
    tokens = shape["tokens"] * shape["micro_batches"] * row["gpus"]
    sequences = tokens // shape["sequence"]
    batch = Batch(sequences, sequences, 1, shape["sequence"] - 1, shape["sequence"] - 1)
    planned = seconds(
        batch, arch=benchmarked(shape), parallel=ParallelSection(ep=4), ranks=4, tokens_per_micro_batch=shape["tokens"]
    )
    assert planned.seconds == pytest.approx(row["ms"] / 1e3, rel=0.25)
    assert planned.bound < row["ms"] / 1e3


def test_the_measured_colocated_run():
    """Generation's constants come from both runs of the file.

    Training took longer there than it is planned: Megatron's rotary embedding went over packed sequences one by one.
    """
    row = next(
        r for r in json.loads((RESULTS / "stream-real-gpu.json").read_text())["rows"] if r["mode"] == "colocated"
    )
    arch = Architecture(
        "mixtral", 30, tuple(range(30)), 576, 9, 3, 64, 1536, 1536, 8, 2, True, False, False, 384, False, 1e-6, 1e4,
        4096, "bfloat16",
    )  # fmt: skip
    batch = Batch(samples=256, prompts=32, prompt=40, response=55, longest=128)
    trained = {"arch": arch, "parallel": ParallelSection(ep=2), "ranks": 2, "tokens_per_micro_batch": 16384}
    both = seconds(batch, **trained).seconds + seconds(batch, backward=False, **trained).seconds
    assert both < row["train_s"]
    generated = generation(arch, batch, H200, engines=2, tensor_parallel=1, seats=512, kv_cache_bytes=16 << 30, width=2)
    assert generated.seconds == pytest.approx(row["generate_s"] - row["transfer_s"], rel=0.25)


def test_nothing_is_faster_than_its_bound():
    for recompute in ("none", "full"):
        for backward in (True, False):
            found = seconds(backward=backward, recompute=recompute)
            assert found.seconds > found.bound > 0


def test_what_makes_a_pass_longer():
    plain = seconds().seconds
    assert seconds(recompute="full").seconds > plain
    assert seconds(imbalance=2.0).seconds > plain
    assert seconds(cluster=Cluster(H200.gpu, gpus_per_node=4)).seconds > plain, "all-to-alls leave the node"
    few = Batch(samples=64, prompts=4, prompt=512, response=2048, longest=8192)
    piped = {"parallel": ParallelSection(pp=8), "ranks": 8}
    bubbles = [seconds(few, tokens_per_micro_batch=size, **piped).seconds for size in (8192, 65536)]
    assert bubbles == sorted(bubbles)
    assert bubbles[-1] > 1.5 * bubbles[0]
    assert seconds(BATCH, ranks=16).seconds < plain


def test_small_micro_batches_wait_for_the_host():
    found = seconds(tokens_per_micro_batch=512)
    assert "waits for the host" in found.note
    assert found.seconds > seconds().seconds
    fewest = BATCH.tokens / 8 / 512 * 48 * constants.LAYER_HOST_S * 3
    assert found.seconds == pytest.approx(fewest, rel=0.2)


def test_generation():
    arch = published("qwen3-30b-a3b")
    sizes = {"tensor_parallel": 1, "kv_cache_bytes": 48 << 30, "width": 2}
    eight = generation(arch, BATCH, H200, engines=8, seats=256, **sizes)
    assert eight.seconds > eight.bound > 0
    assert generation(arch, BATCH, H200, engines=16, seats=256, **sizes).seconds < eight.seconds
    assert generation(arch, BATCH, H200, engines=8, seats=16, **sizes).seconds > eight.seconds
    small = generation(arch, BATCH, H200, engines=8, seats=256, **sizes | {"kv_cache_bytes": 1 << 30})
    assert small.seconds > eight.seconds, "fewer samples fit a small cache"


def test_weights_and_turns():
    arch = published("qwen3-30b-a3b")
    store = transfer(arch, H200, path="store", engines=4, tensor_parallel=1, width=2)
    direct = transfer(arch, H200, path="nccl", engines=4, tensor_parallel=1, width=2)
    assert store.seconds > direct.seconds > direct.bound == store.bound
    assert turns(80 * 10**9).seconds == pytest.approx(2 * 80 / constants.OFFLOAD_GBS)
