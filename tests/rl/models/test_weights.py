"""A directory that is loaded and saved is bitwise the same, whatever the layout and whoever is home to an expert."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_ultraep.megatron.attach import moe_layers
from megatron_ultraep.megatron.checkpoint import set_home_slot
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from rl.models import tiny
from rl.models.architecture import architecture, read_architecture
from rl.models.builder import build_model
from rl.models.names import Logical
from rl.models.weights import export_weights, load_weights, save_hf, to_hugging_face, to_megatron
from tests.ranks import RankError
from tests.rl.models.test_architecture import QWEN3_MOE
from tests.rl.models.test_hf_files import contents, shard

MODELS = {
    "qwen3_moe": lambda path: tiny.qwen3_moe(path, seed=1),
    "qwen3_moe bf16": lambda path: tiny.qwen3_moe(path, seed=2, dtype="bfloat16", mlp_only_layers=[0], experts=4),
    "qwen3_moe sharded": lambda path: shard(tiny.qwen3_moe(path.with_name("whole"), seed=3), path, "300KB"),
    "mixtral": lambda path: tiny.mixtral(path, seed=4, heads=4, kv_heads=2),
    "llama": lambda path: tiny.llama(path, seed=5, heads=4, kv_heads=2),
    "llama tied": lambda path: tiny.llama(path, seed=6, heads=4, kv_heads=2, tie_word_embeddings=True),
}
LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}),
    "tp2xetp2": (2, {"tp": 2, "etp": 2}),
    "tp2xpp2xep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {name: make(root / name.replace(" ", "_")) for name, make in MODELS.items()}


def build(directory, layout, dtype="float32", permutation=None):
    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **layout), timeout_s=60)
    model = build_model(read_architecture(directory), groups, dtype=getattr(torch, dtype))
    if permutation:
        for layer in moe_layers(model.chunks):
            set_home_slot(layer, permutation)
    return model


def load_and_save(jobs):
    """Each job: (source, target, layout, dtype, home slots)."""
    for source, target, layout, dtype, permutation in jobs:
        model = build(source, layout, dtype, permutation)
        load_weights(model, source)
        save_hf(model, source, target)


def dense_layout(layout):
    return {k: v for k, v in layout.items() if k not in ("ep", "etp")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_and_saved_is_bitwise_the_same(ranks, directories, tmp_path, layout):
    world, sizes = LAYOUTS[layout]
    jobs = []
    for name, source in directories.items():
        kwargs = sizes if "llama" not in name else dense_layout(sizes)
        jobs.append((str(source), str(tmp_path / source.name), kwargs, "float32", None))
    ranks(world).run(load_and_save, jobs)
    for source in directories.values():
        assert contents(tmp_path / source.name) == contents(source), source.name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(d.name for d in directories.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_bf16_directory_through_any_dtype(ranks, directories, tmp_path, dtype):
    source = directories["qwen3_moe bf16"]
    ranks(2).run(load_and_save, [(str(source), str(tmp_path / "out"), {"ep": 2}, dtype, None)])
    assert contents(tmp_path / "out") == contents(source)


PERMUTATION = (5, 0, 7, 2, 1, 6, 3, 4)


def test_experts_away_from_home_are_saved_in_logical_order(ranks, directories, tmp_path):
    source = directories["qwen3_moe"]
    jobs = [(str(source), str(tmp_path / "out"), {"ep": 2, "pp": 2}, "float32", PERMUTATION)]
    ranks(4).run(load_and_save, jobs)
    assert contents(tmp_path / "out") == contents(source)


def where_experts_are(directory, permutation):
    model = build(directory, {"ep": 2}, permutation=permutation)
    load_weights(model, directory)
    experts = model.chunks[0].decoder.layers[1].mlp.experts.local_experts
    return [e.linear_fc2.weight.detach().numpy().copy() for e in experts]


def test_experts_are_loaded_into_their_home_slots(ranks, directories):
    source = directories["qwen3_moe"]
    slots = [w for one in ranks(2).run(where_experts_are, str(source), PERMUTATION) for w in one]
    stored = load_file(source / "model.safetensors")
    for expert, slot in enumerate(PERMUTATION):
        assert np.array_equal(slots[slot], stored[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].numpy())


def exported(directory, layout, permutation):
    model = build(directory, layout, permutation=permutation)
    load_weights(model, directory)
    return [(name, tensor.numpy().copy()) for name, tensor in export_weights(model)]


@pytest.mark.parametrize(
    ("layout", "permutation"),
    [({"tp": 2, "pp": 2, "ep": 2}, PERMUTATION), ({"ep": 2}, PERMUTATION), ({"tp": 2, "ep": 4}, None)],
    ids=["tp2xpp2xep2", "dp4 ep2", "tp2xep4"],
)
def test_over_all_ranks_each_tensor_is_exported_once(ranks, directories, layout, permutation):
    source = directories["qwen3_moe"]
    stored = load_file(source / "model.safetensors")
    got = [entry for answers in ranks(4).run(exported, str(source), layout, permutation) for entry in answers]
    assert sorted(name for name, _ in got) == sorted(stored)
    assert all(np.array_equal(tensor, stored[name].numpy()) for name, tensor in got)


def test_a_tied_output_layer_that_is_stored_is_stored_again(ranks, directories, tmp_path):
    """Some published models hold the tied tensor under both names."""
    source = tmp_path / "source"
    shutil.copytree(directories["llama tied"], source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ranks(2).run(load_and_save, [(str(source), str(tmp_path / "out"), {"pp": 2}, "float32", None)])
    assert contents(tmp_path / "out") == contents(source)


def test_config_and_tensors_that_disagree_are_refused(ranks, directories, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(directories["llama"], source)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(RankError, match=r"gate_proj.* config.json and the tensors in .* disagree"):
        ranks(1).run(load_and_save, [(str(source), str(tmp_path / "out"), {}, "float32", None)])
    (source / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 8'))
    with pytest.raises(RankError, match=r"has no tensor 'model.layers.4.*similar"):
        ranks(1).run(load_and_save, [(str(source), str(tmp_path / "out"), {}, "float32", None)])
    assert not (tmp_path / "out").exists()


KINDS = {
    "qkv": (("q", "k", "v"), 0),
    "gated": (("gate", "up"), 0),
    "vocab": (("embedding",), 0),
    "rows": (("down",), 1),
    "replicated": (("norm",), None),
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))
def test_cutting_and_joining_are_inverse(kind, tp_power, per_group, groups_per_rank, vocab):
    tp = 2**tp_power
    kv_heads = tp * groups_per_rank
    heads = kv_heads * per_group
    arch = dataclasses.replace(
        architecture(QWEN3_MOE), hidden=6, heads=heads, kv_heads=kv_heads, head_dim=3, vocab=vocab
    )
    shapes = {
        "q": (heads * 3, 6),
        "k": (kv_heads * 3, 6),
        "v": (kv_heads * 3, 6),
        "gate": (tp * 5, 6),
        "up": (tp * 5, 6),
        "embedding": (vocab, 6),
        "down": (6, tp * 5),
        "norm": (6,),
    }
    names, tp_dim = KINDS[kind]
    tensors = [torch.randn(shapes[n], generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names)]
    entry = Logical((0, 0, 0), names, kind if kind in ("qkv", "gated", "vocab") else "plain", tp_dim)
    parts = [to_megatron(tensors, entry, arch, rank, tp) for rank in range(tp)]
    assert len({p.shape for p in parts}) == 1
    assert all(torch.equal(a, b) for a, b in zip(to_hugging_face(parts, entry, arch), tensors, strict=True))
