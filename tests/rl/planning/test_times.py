"""Seconds of a step: beside what was measured, and never below their bounds."""

import json
import re
from dataclasses import replace

import pytest

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture
from rl.planning import constants
from rl.planning.cluster import Cluster, cluster_of
from rl.planning.times import Batch, Training, generation, one_pass, transfer, turns
from tests.rl.planning.models import ROOT, published
from tests.rl.planning.test_memory import RESULTS, benchmarked

H200 = cluster_of("h200", 8, 50.0)
SMOLLM2 = Architecture(
    "mixtral", 30, tuple(range(30)), 576, 9, 3, 64, 1536, 1536, 8, 2, True, False, False, 384, False, 1e-6, 1e4,
    4096, "bfloat16",
)  # fmt: skip
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


def measured_run(file, mode):
    return next(row for row in json.loads((RESULTS / file).read_text())["rows"] if row["mode"] == mode)


def smollm2(batch, **changed):
    settings = {"engines": 2, "tensor_parallel": 1, "seats": 512, "kv_cache_bytes": 16 << 30, "width": 2}
    return generation(SMOLLM2, batch, H200, **settings | changed)


def test_the_measured_eager_run(monkeypatch):
    """The layer's constant comes from both runs of the file.

    A running sample's does not: generators were still asked one after the other, for 0.34 ms. Training took longer
    there than it is planned: Megatron's rotary embedding went over packed sequences one by one.
    """
    row = measured_run("stream-real-gpu.json", "colocated")
    batch = Batch(samples=256, prompts=32, prompt=40, response=55, longest=128)
    trained = {"arch": SMOLLM2, "parallel": ParallelSection(ep=2), "ranks": 2, "tokens_per_micro_batch": 16384}
    both = seconds(batch, **trained).seconds + seconds(batch, backward=False, **trained).seconds
    assert both < row["train_s"]
    measured = row["generate_s"] - row["transfer_s"]
    assert smollm2(batch, graphs=False).seconds < measured
    monkeypatch.setattr(constants, "DECODE_SAMPLE_S", 0.00034)
    monkeypatch.setattr(constants, "REQUEST_S", 0.0)
    assert smollm2(batch, graphs=False).seconds == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("mode", "engines"), [("colocated", 2), ("one-step-continue", 1)])
def test_the_measured_runs_with_graphs(mode, engines):
    """Constants come from the first; the second has twice the samples on an engine, beside a trainer."""
    row = measured_run("stream-real-gpu-2.json", mode)
    batch = Batch(samples=256, prompts=32, prompt=52, response=142, longest=512)
    planned = smollm2(batch, engines=engines, graphs=True)
    assert "CUDA graphs" in planned.note
    assert planned.seconds == pytest.approx(row["generate_s"] - row["transfer_s"], rel=0.25)
    assert planned.bound < row["generate_s"]


def test_the_measured_run_of_short_responses():
    """``recipes/smollm2-moe-4gpu.yaml`` on 4 H200, the median of its steps; nearly all of it is no decoding step."""
    batch = Batch(samples=1024, prompts=64, prompt=49, response=3, longest=7)
    planned = smollm2(batch, kv_cache_bytes=8 << 30, graphs=True)
    assert planned.seconds == pytest.approx(1.02, rel=0.25)
    steps = planned.seconds - 512 * constants.REQUEST_S
    assert 0 < steps < planned.seconds / 4


def test_graphs_save_launches_not_reading():
    """A small model's layers wait for their launches, a large one's for the memory."""
    small = Batch(samples=16, prompts=16, prompt=64, response=256, longest=256)
    eager, graphs = (smollm2(small, graphs=on).seconds for on in (False, True))
    launches = 256 * SMOLLM2.layers * (constants.DECODE_LAYER_EAGER_S - constants.DECODE_LAYER_GRAPHS_S)
    assert eager - graphs == pytest.approx(launches)
    sizes = {"engines": 1, "tensor_parallel": 1, "seats": 256, "kv_cache_bytes": 48 << 30, "width": 2}
    large = {
        on: generation(
            published("qwen3-30b-a3b"), replace(BATCH, longest=2048), cluster_of("h100", 8, 50.0), graphs=on, **sizes
        )
        for on in (False, True)
    }
    assert large[False].seconds == large[True].seconds


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
    sizes = {"tensor_parallel": 1, "kv_cache_bytes": 48 << 30, "width": 2, "graphs": True}
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
