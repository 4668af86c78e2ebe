"""Planned memory beside what was measured on GPUs, and what each setting does to it."""

import json
from dataclasses import replace

import pytest

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture
from rl.planning.activations import Workload, kept_by_layer
from rl.planning.cluster import GIB
from rl.planning.memory import (
    Balancing,
    ModelOnRanks,
    engine_memory,
    kv_bytes_per_token,
    residue_bytes,
    slot_bytes,
    trainer_memory,
)
from rl.planning.parameters import total_parameters
from rl.transfer.turns import DEPTH, GPU_BUCKET_BYTES
from tests.rl.planning.models import ROOT, published, tiny

RESULTS = ROOT / "benchmarks" / "results"
BAR = 0.10


def benchmarked(shape):
    """The model of scripts/bench_subject.py, whose attention has a quarter of the heads as keys and values."""
    return Architecture(
        family="mixtral",
        layers=shape["layers"],
        moe_layers=tuple(range(shape["layers"])),
        hidden=shape["hidden"],
        heads=shape["heads"],
        kv_heads=shape["heads"] // 4,
        head_dim=shape["hidden"] // shape["heads"],
        ffn=shape["ffn"],
        moe_ffn=shape["ffn"],
        experts=shape["experts"],
        topk=shape["topk"],
        normalize_topk=True,
        qk_norm=False,
        attention_bias=False,
        vocab=shape["vocabulary"],
        tied=False,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_positions=shape["sequence"],
        dtype="bfloat16",
    )


def measured_models():
    """Training steps of whole models: device memory less the CUDA context, of the fullest rank."""
    for name in ("model-gpu-ep2", "model-gpu-ep4", "model-gpu-ep4-first", "model-trace-gpu-ep4"):
        document = json.loads((RESULTS / f"{name}.json").read_text())
        shapes = {f"{s['experts']} experts top-{s['topk']}": s for s in document["shapes"]}
        for row in document["rows"]:
            shape = next(shape for key, shape in shapes.items() if key in row["layout"])
            slots = document["settings"]["balance"]["slots"]
            yield pytest.param(shape, slots, row, id=f"{name}, {shape['name']}, {row['imbalance']:g}, {row['method']}")


@pytest.mark.parametrize(("shape", "slots", "row"), measured_models())
def test_measured_models(shape, slots, row):
    work = Workload(shape["tokens"], 2, max(1.0, row["after"]), fused=True)
    model = ModelOnRanks("actor", benchmarked(shape), ParallelSection(ep=row["gpus"]), True, work)
    balanced = row["method"] in ("ours", "foresight")
    (memory,) = trainer_memory(
        [model],
        row["gpus"],
        shape["micro_batches"],
        distributed_optimizer=True,
        balancing=Balancing(slots) if balanced else None,
    )
    planned = (memory.total - memory.bytes_of("context")) / GIB
    assert planned == pytest.approx(row["device_gib"], rel=BAR), [(p.name, p.bytes / GIB) for p in memory.parts]


def beside_two_ranks(arch, model, staging):
    """GiB of an engine's GPU with a cache of 16 GiB, beside one of two trainer ranks that are offloaded."""
    residue = residue_bytes(model, 2, None, staging)
    memory = engine_memory(
        arch, width=2, tensor_parallel=1, kv_cache_bytes=16 * GIB, seats=512, trainer_residue=residue
    )
    return memory.total / GIB


def test_measured_run():
    """The colocated run of stream-real-gpu.json: everything that is on a GPU at the end of each one's turn.

    Micro-batches are planned at their budget of tokens; how full they were was not recorded.
    """
    row = next(
        row for row in json.loads((RESULTS / "stream-real-gpu.json").read_text())["rows"] if row["mode"] == "colocated"
    )
    arch = Architecture(
        "mixtral", 30, tuple(range(30)), 576, 9, 3, 64, 1536, 1536, 8, 2, True, False, False, 384, False, 1e-6, 1e4,
        4096, "bfloat16",
    )  # fmt: skip
    model = ModelOnRanks("actor", arch, ParallelSection(ep=2), True, Workload(16384, 2, 1.2))
    (memory,) = trainer_memory([model], 2, 1, distributed_optimizer=True, asleep=True)
    assert memory.total / GIB == pytest.approx(row["memory_gib"]["train"], rel=BAR)
    assert beside_two_ranks(arch, model, 0) == pytest.approx(row["memory_gib"]["generate"], rel=BAR)


def test_measured_engines_beside_staging_memory():
    """The colocated run of stream-real-gpu-2.json, turn of engines: CUDA graphs, weights through a ring of buckets."""
    rows = json.loads((RESULTS / "stream-real-gpu-2.json").read_text())["rows"]
    (row,) = [row for row in rows if row["mode"] == "colocated"]
    arch = Architecture(
        "mixtral", 30, tuple(range(30)), 576, 9, 3, 64, 1536, 1536, 8, 2, True, False, False, 49152, True, 1e-5, 1e4,
        8192, "bfloat16",
    )  # fmt: skip
    model = ModelOnRanks("actor", arch, ParallelSection(ep=2), True, Workload(16384, 2, 1.2))
    planned = beside_two_ranks(arch, model, DEPTH * GPU_BUCKET_BYTES)
    assert planned == pytest.approx(row["memory_gib"]["generate"], rel=BAR)


def test_slots_are_those_that_balancing_makes():
    row = json.loads((RESULTS / "model-gpu-ep4.json").read_text())
    shape, slots = row["shapes"][0], row["settings"]["balance"]["slots"]
    model = ModelOnRanks("actor", benchmarked(shape), ParallelSection(ep=4), True, Workload(shape["tokens"]))
    measured = next(r["slot_gib"] for r in row["rows"] if r["method"] == "ours")
    assert slot_bytes(model, Balancing(slots)) / GIB == pytest.approx(measured, abs=1e-5)
    assert slot_bytes(model, Balancing(slots, slot_sets=2)) == 2 * slot_bytes(model, Balancing(slots))


def planned(parallel=None, ranks=8, micro_batches=8, **work):
    arch = published("qwen3-30b-a3b")
    model = ModelOnRanks("actor", arch, ParallelSection(**(parallel or {"ep": 8})), True, Workload(**SIZE | work))
    return trainer_memory([model], ranks, micro_batches, distributed_optimizer=True)


SIZE = {"tokens": 8192}


def test_a_float32_stream_is_kept_twice_as_wide():
    arch = published("qwen3-30b-a3b")
    rows = SIZE["tokens"] * arch.hidden
    kept, wide = (
        [
            kept_by_layer(arch, ParallelSection(), Workload(**SIZE, recompute=mode, stream=stream), moe=True)
            for mode in MODES
        ]
        for stream in (None, 4)
    )
    assert [b - a for a, b in zip(kept, wide, strict=True)] == [2 * 2 * rows, 2 * rows]
    grown = planned(stream=4)[0].bytes_of("activations")
    assert grown - planned()[0].bytes_of("activations") == 2 * 2 * rows * arch.layers + 2 * rows


MODES = ("none", "full")


def test_recomputation_keeps_less():
    by_mode = [
        planned(**mode)[0].bytes_of("activations")
        for mode in (
            {},
            {"recompute": "selective", "modules": ("layernorm",)},
            {"recompute": "selective", "modules": ("moe_act", "layernorm")},
            {"recompute": "selective", "modules": ("moe", "layernorm")},
            {"recompute": "full"},
        )
    ]
    assert by_mode == sorted(by_mode, reverse=True)
    assert len(set(by_mode)) == len(by_mode)


def test_imbalance_takes_memory():
    even, uneven = planned()[0], planned(imbalance=2.0)[0]
    assert uneven.total > even.total
    assert uneven.bytes_of("actor: parameters") == even.bytes_of("actor: parameters")


def test_a_larger_layout_takes_less():
    assert planned({"ep": 16}, ranks=16)[0].total < planned({"ep": 8}, ranks=16)[0].total
    assert max(m.total for m in planned({"ep": 8, "pp": 2}, ranks=16)) < planned({"ep": 8}, ranks=8)[0].total


def test_the_last_stage_holds_logits():
    first, last = planned({"ep": 4, "pp": 2}, ranks=8)
    assert last.bytes_of("coming and going") > first.bytes_of("coming and going")
    assert first.bytes_of("activations") > last.bytes_of("activations")


def test_other_models_on_the_ranks():
    arch = tiny("qwen3_moe")
    actor = ModelOnRanks("actor", arch, ParallelSection(ep=2), True, Workload(64, 4))
    reference = ModelOnRanks("reference", arch, ParallelSection(), False, Workload(64, 4))
    scalar = replace(arch, scalar_head=True)
    critic = ModelOnRanks("critic", scalar, ParallelSection(pp=2), True, Workload(64, 4))
    alone = trainer_memory([actor], 2, 1, distributed_optimizer=True)[0]
    together = trainer_memory([actor, critic, reference], 2, 1, distributed_optimizer=True)[0]
    names = [part.name for part in together.parts]
    assert [n for n in names if n.startswith("critic")] == [
        "critic: parameters",
        "critic: gradients",
        "critic: optimizer",
    ]
    assert [n for n in names if n.startswith("reference")] == ["reference: parameters"]
    assert together.total > alone.total


def test_cache_of_a_token():
    assert kv_bytes_per_token(published("qwen3-30b-a3b"), 2, 1) == 48 * 2 * 4 * 128 * 2
    assert kv_bytes_per_token(published("qwen3-30b-a3b"), 2, 8) == 48 * 2 * 1 * 128 * 2


def test_cache_of_a_latent():
    assert kv_bytes_per_token(published("deepseek-v3"), 2, 8) == 61 * (512 + 64) * 2


def test_the_upcycled_model_is_counted():
    arch = published("smollm2-moe")
    assert arch.tied
    # 134.5 million of SmolLM2-135M, whose 30 MLPs of 2.65 million are there eight times, and a router each.
    assert total_parameters(arch) == 134_515_008 + 30 * (7 * 3 * 576 * 1536 + 8 * 576)
