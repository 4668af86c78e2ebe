"""Directories are read by their headers, and written whole or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.models import tiny
from rl.models.hf_files import ModelFiles, ModelWriter

INDEX = "model.safetensors.index.json"


def shard(source, target, size="100KB"):
    """Cut a model directory into several files with an index."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size=size)
    shutil.copy(source / "config.json", target / "config.json")
    return target


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return tiny.qwen3_moe(tmp_path_factory.mktemp("files") / "m", layers=2, experts=4, hidden=32, seed=1)


@pytest.fixture(scope="module")
def sharded(single, tmp_path_factory):
    return shard(single, tmp_path_factory.mktemp("files") / "sharded")


def write(source, target, order=sorted, change=lambda name, tensor: tensor):
    writer = ModelWriter(source, target)
    files = ModelFiles(source)
    for name in order(files.tensors):
        writer.add(name, change(name, files.read(name)))
    return writer


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.mark.parametrize("cut", ["single", "sharded"])
def test_reading(cut, single, request):
    directory = request.getfixturevalue(cut)
    files = ModelFiles(directory)
    assert len(files.metadata) == (1 if cut == "single" else len(list(directory.glob("*.safetensors"))))
    expected = load_file(single / "model.safetensors")
    assert set(files.tensors) == set(expected)
    for name, tensor in expected.items():
        info = files.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(files.read(name), tensor)
    files.close()
    assert torch.equal(files.read(name), tensor)


def test_it_is_cut_into_several_files(sharded):
    assert len(ModelFiles(sharded).metadata) > 2


@pytest.mark.parametrize("cut", ["single", "sharded"])
@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)], ids=["forwards", "backwards"])
def test_writing_back_is_bitwise_the_same(cut, order, tmp_path, request):
    source = request.getfixturevalue(cut)
    write(source, tmp_path / "out", order).finish()
    assert contents(tmp_path / "out") == contents(source)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_tensors_are_written_in_the_type_they_had(single, tmp_path):
    write(single, tmp_path / "out", change=lambda name, t: t.double()).finish()
    assert contents(tmp_path / "out") == contents(single)


def test_an_interrupted_write_leaves_nothing_visible(sharded, tmp_path):
    target = tmp_path / "out"
    writer = ModelWriter(sharded, target)
    files = ModelFiles(sharded)
    names = sorted(files.tensors)
    for name in names[:-1]:
        writer.add(name, files.read(name))
    with pytest.raises(ValueError, match=rf"1 tensors were not written, the first are \['{names[-1]}'\]"):
        writer.finish()
    assert not target.exists()
    # The next attempt is not disturbed by the leftovers.
    write(sharded, target).finish()
    assert contents(target) == contents(sharded)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_in_use_is_not_overwritten(single, tmp_path):
    (tmp_path / "keep").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty: choose another directory or remove it"):
        ModelWriter(single, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_wrong_tensors_are_refused(single, tmp_path):
    writer = ModelWriter(single, tmp_path / "out")
    norm = torch.ones(32)
    writer.add("model.norm.weight", norm)
    with pytest.raises(ValueError, match=r"'model.norm.weight' is not expected \(unknown, or written already\)"):
        writer.add("model.norm.weight", norm)
    with pytest.raises(ValueError, match=r"'model.norm.bias' is not expected"):
        writer.add("model.norm.bias", norm)
    with pytest.raises(ValueError, match=r"'lm_head.weight': expected shape \(320, 32\), got \(32,\)"):
        writer.add("lm_head.weight", norm)


def test_a_missing_tensor_is_named_with_its_neighbours(single):
    with pytest.raises(KeyError, match=r"has no tensor 'model.norms.weight'; similar: \['model.norm.weight'"):
        ModelFiles(single).read("model.norms.weight")


def test_missing_files(single, sharded, tmp_path):
    with pytest.raises(FileNotFoundError, match="convert other formats to safetensors"):
        ModelFiles(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(sharded, broken)
    gone = next(broken.glob("model-00002*"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {gone.name}, which is missing"):
        ModelFiles(broken)


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor x has dtype F8_E4M3, expected one of .*: dequantize the checkpoint"):
        ModelFiles(tmp_path)


def test_weights_in_other_formats_are_not_carried_along(single, tmp_path):
    """They would hold the old values beside the new ones."""
    source = tmp_path / "source"
    shutil.copytree(single, source)
    for name in (
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
    ):
        (source / name).write_text("stale")
    write(source, tmp_path / "out").finish()
    assert contents(tmp_path / "out") == contents(single)


def test_the_index_is_kept(sharded, tmp_path):
    write(sharded, tmp_path / "out").finish()
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {f: {n for n in weight_map if weight_map[n] == f} for f in weight_map.values()} == {
        p.name: set(load_file(p)) for p in (tmp_path / "out").glob("*.safetensors")
    }
