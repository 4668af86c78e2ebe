"""Counts of parameters, gradients and optimizer states are those of really built models."""

import dataclasses

import pytest

from rl.config.trainer import ParallelSection
from rl.models.architecture import FAMILIES
from rl.planning.activations import Workload
from rl.planning.memory import ModelOnRanks, optimizer_bytes, static_parts
from rl.planning.parameters import (
    Sharing,
    Sizes,
    active_parameters,
    buffer_elements,
    chunks_of_stage,
    stage_sizes,
    total_parameters,
)
from tests.rl.planning.models import TINY, published, really_built, tiny

PUBLISHED = {  # billions, in the models' own cards
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.0, 22.0),
    "glm-4.5-air": (106.9, 12.0),
    "deepseek-v3": (671.0, 37.0),
}
DENSE = ("llama", "qwen3 tied")
LAYOUTS = {
    "one rank": (1, {}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "pp3": (3, {"pp": 3}),
    "pp2xvpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}),
    "tp2xetp2": (2, {"tp": 2, "etp": 2}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}),
}
SOME = ("one rank", "pp3", "tp2xep2", "pp2xep2")


def test_every_family_is_counted():
    assert set(FAMILIES) <= {config["model_type"] for config in TINY.values()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    arch = published(name)
    total, active = PUBLISHED[name]
    assert total_parameters(arch) == pytest.approx(total * 1e9, rel=0.005)
    # Cards count the embedding among the active ones, or round to whole billions.
    assert active_parameters(arch) == pytest.approx(active * 1e9, rel=0.1)


def cases():
    for name in TINY:
        for layout, (world, sizes) in LAYOUTS.items():
            if name in DENSE and ("ep" in sizes or "etp" in sizes):
                continue
            if name != "qwen3_moe" and layout not in SOME:
                continue  # layouts are alike for all families
            if name in ("deepseek_v3", "olmoe") and sizes.get("tp", 1) > 1:
                continue  # refused
            yield pytest.param(name, world, sizes, id=f"{name}, {layout}")


@pytest.mark.parametrize(("name", "world", "layout"), cases())
def test_sizes_of_every_rank(ranks, name, world, layout):
    parallel = ParallelSection(**layout)
    for built in ranks(world).run(really_built, name, layout):
        planned = stage_sizes(tiny(name), parallel, built["coordinates"]["pp"])
        assert len(planned) == len(built["chunks"])
        for sizes, chunk in zip(planned, built["chunks"], strict=True):
            held = sizes.in_buffers(parallel)
            assert sorted(held.dense) == sorted(chunk["dense"])
            assert sorted(held.experts) == sorted(chunk["experts"])


@pytest.mark.parametrize("layout", ["one rank", "tp2xep2", "pp2"])
def test_sizes_of_a_critic(ranks, layout):
    world, sizes = LAYOUTS[layout]
    arch = dataclasses.replace(tiny("qwen3_moe"), tied=False, scalar_head=True)
    for built in ranks(world).run(really_built, "qwen3_moe", sizes, scalar=True):
        planned = stage_sizes(arch, ParallelSection(**sizes), built["coordinates"]["pp"])
        assert [sorted(each.dense + each.experts) for each in planned] == [
            sorted(chunk["dense"] + chunk["experts"]) for chunk in built["chunks"]
        ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [("qwen3_moe", 2, {"ep": 2}), ("qwen3_moe", 4, {"ep": 2}), ("mixtral", 4, {"pp": 2, "ep": 2}), ("llama", 2, {})],
)
def test_bytes_of_every_rank(ranks, name, world, layout, distributed, dtype):
    parallel = ParallelSection(**layout)
    built = ranks(world).run(really_built, name, layout, dtype=dtype, distributed=distributed)
    width = built[0]["width"]
    for rank in built:
        model = ModelOnRanks("actor", tiny(name), parallel, True, Workload(64, width))
        parts = static_parts(model, rank["coordinates"]["pp"], world, distributed_optimizer=distributed)
        weights, gradients, optimizer = (part.bytes for part in parts)
        assert weights == rank["weights"]
        assert gradients == rank["gradients"]
        padding = 16 * (optimizer // 12 - rank["optimizer"] // 12)
        assert rank["optimizer"] <= optimizer
        # A rank's share may hold padding, which has no states: at most 63 elements for each parameter.
        assert padding <= 16 * 63 * sum(len(c["dense"]) + len(c["experts"]) for c in rank["chunks"]) + 16 * 128
        if not distributed:
            assert rank["optimizer"] == optimizer
    if distributed:
        each = 12 if width == 2 else 8
        copies = 0
        for rank in built:
            sharing = Sharing.of(world, parallel)
            for chunk in rank["chunks"]:
                copies += sum(chunk["dense"]) / sharing.dense + sum(chunk["experts"]) / sharing.experts
        assert sum(rank["optimizer"] for rank in built) == each * copies, "states of all ranks are of every parameter"


def test_padding_of_buffers():
    assert buffer_elements((10, 70), 3, distributed_optimizer=False) == 80
    # 64 and 128, to a multiple of lcm(3, 128)
    assert buffer_elements((10, 70), 3, distributed_optimizer=True) == 384
    assert optimizer_bytes(Sizes((10, 70)), Sharing(3, 1), 2, distributed=True) == 12 * 128


def test_layers_are_cut_as_the_builder_does():
    parallel = ParallelSection(pp=2, vpp=2)
    assert chunks_of_stage(tiny("mixtral"), parallel, 1) == (range(1, 2), range(3, 4))
    uneven = [chunks_of_stage(tiny("mixtral"), ParallelSection(pp=3), stage) for stage in range(3)]
    assert uneven == [(range(0, 1),), (range(1, 3),), (range(3, 4),)]
