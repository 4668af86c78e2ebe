"""Scalar heads: values equal transformers', a head that is missing is zero, one of several labels is refused."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.critic import build_scalar_model, load_scalar_weights
from rl.models.weights import copy_weights, export_weights
from rl.training.passes import PassRunner
from tests.ranks import RankError
from tests.rl.training.common import make_layout, make_samples
from tests.rl.training.critics import with_head

LAYOUTS = {"one": (1, {}), "tp2xpp2": (4, {"tp": 2, "pp": 2}), "vpp2": (2, {"pp": 2, "vpp": 2})}


@pytest.fixture(scope="module", params=["qwen3_moe", "llama tied"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scalar") / "m"
    if request.param == "qwen3_moe":
        return with_head(tiny.qwen3_moe(path, seed=3, mlp_only_layers=[0]))
    return with_head(tiny.llama(path, seed=6, heads=4, kv_heads=2, tie_word_embeddings=True))


def values_of(directory, sizes):
    from rl.training.batch import MiniBatch

    arch = read_architecture(directory)
    if arch.is_moe and sizes.get("tp"):
        sizes = {**sizes, "ep": 2}
    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **sizes), timeout_s=60)
    model = build_scalar_model(arch, groups, name="critic")
    load_scalar_weights(model, directory, head_required=True)
    samples = make_samples(arch)
    batch = MiniBatch.make(samples, make_layout(samples, groups.layout)).part(groups.coordinates["dp"])
    return PassRunner(model, None).values(batch, pass_="old_logprob", step=0)


def by_transformers(directory):
    """The head on every hidden state, ``[T]`` per sample, aligned with the tokens that are predicted from them."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    head = load_file(f"{directory}/model.safetensors")["score.weight"]
    found = {}
    for s in make_samples(read_architecture(directory)):
        with torch.no_grad():
            hidden = model(torch.from_numpy(s.tokens).long()[None, :-1]).last_hidden_state[0]
        values = (hidden @ head.T)[:, 0].numpy()
        found[s.sample_id] = np.where(s.loss_mask, np.concatenate([[0], values]), 0)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_the_head_on_transformers_hidden_states(ranks, directory, layout):
    world, sizes = LAYOUTS[layout]
    expected, got = by_transformers(directory), {}
    for values in ranks(world).run(values_of, directory, sizes):
        assert not set(got) & set(values)
        got |= values
    assert set(got) == set(expected)
    for name, values in expected.items():
        assert got[name].shape == values.shape
        assert np.abs(got[name] - values).max() <= 1e-5 * max(1, np.abs(values).max())


def heads(directory, required):
    arch = read_architecture(directory)
    model = build_scalar_model(arch, create_groups(ParallelLayout(world=1), timeout_s=60), name="critic")
    load_scalar_weights(model, directory, head_required=required)
    return dict(export_weights(model))["score.weight"].abs().max().item()


def test_a_head_that_is_missing(ranks, tmp_path):
    directory = str(tiny.qwen3_moe(tmp_path / "m", layers=1))
    assert ranks(1).run(heads, directory, False) == [0.0]
    with pytest.raises(RankError, match=r"score\.weight"):
        ranks(1).run(heads, directory, True)


def test_a_head_of_several_labels_is_refused(ranks, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = tiny.qwen3_moe(tmp_path / "m", layers=1)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"score.weight": torch.zeros(3, 64)}, directory / "model.safetensors")
    with pytest.raises(RankError, match=r"score\.weight.*expected values for .* of shape \(1, 64\), got \(3, 64\)"):
        ranks(1).run(heads, str(directory), False)


def copied(directory, source, target):
    """Tensors of a model copied between layouts that are not those of one that was loaded."""
    from rl.models.builder import build_model
    from rl.models.weights import load_weights

    arch = read_architecture(directory)
    models = []
    for sizes in (source, target, target):
        groups = create_groups(ParallelLayout(world=dist.get_world_size(), **sizes), timeout_s=60)
        models.append(build_model(arch, groups))
    first, second, expected = models
    load_weights(first, directory)
    load_weights(expected, directory)
    with torch.no_grad():
        for chunk in second.chunks:
            for p in chunk.parameters():
                p.fill_(5.0)
    copy_weights(first, second)
    got, wanted = dict(export_weights(second)), dict(export_weights(expected))
    return [name for name in wanted if not torch.equal(got[name], wanted[name])]


@pytest.mark.parametrize(
    ("source", "target"), [({"ep": 2}, {"pp": 2}), ({"pp": 2}, {"tp": 2, "ep": 2}), ({"tp": 2, "ep": 2}, {})]
)
def test_weights_are_copied_between_layouts(ranks, tmp_path, source, target):
    directory = str(tiny.qwen3_moe(tmp_path / "m", layers=2))
    assert ranks(2).run(copied, directory, source, target) == [[], []]
