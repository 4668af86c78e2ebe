"""A residual stream in float32: closer to float32 models than a rounded one, under any layout."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.float32_residual import Float32InputNorm, add_to_stream, configured, use_in_layer
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from tests.rl.training.common import make_layout, make_samples, make_worker, merge, one_step, worst

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
}
WIDE = {"dtype": "bfloat16", "float32_residual": True}


def logprobs(directory, sizes, **spec):
    """Log-probs of some samples with their routes, and the types of what layers gave."""
    worker = make_worker(directory, sizes, **spec)
    samples = make_samples(read_architecture(directory), (24, 17, 30, 9))
    layout = make_layout(samples, ParallelLayout(world=dist.get_world_size(), **sizes), 64)
    types = set()
    for layer in worker.actor.chunks[0].decoder.layers:
        layer.register_forward_hook(lambda _, given, got: types.add(got[0].dtype))
    batch = MiniBatch.make(samples, layout).part(worker.groups.coordinates["dp"])
    found, _ = worker.logprobs(batch, "actor", "old_logprob", 1, "replay", PassSettings())
    return np.concatenate([np.asarray(found[uid]) for uid in sorted(found)]) if found else None, types


def compare(directory, sizes):
    exact, _ = logprobs(directory, sizes, dtype="float32")
    rounded, types = logprobs(directory, sizes, dtype="bfloat16")
    assert types == {torch.bfloat16}
    ours, types = logprobs(directory, sizes, **WIDE)
    assert types == {torch.float32}
    if exact is None:
        return None
    return np.square(rounded - exact).mean(), np.square(ours - exact).mean()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closer_to_float32(ranks, tmp_path, layout):
    world, sizes = LAYOUTS[layout]
    directory = tiny.qwen3_moe(tmp_path / "m", layers=24, seed=3)
    found = [pair for pair in ranks(world).run(compare, str(directory), sizes) if pair is not None]
    for rounded, ours in found:
        assert ours < 0.8 * rounded


def gradients(directory, sizes):
    """Gradients of two models with the same weights."""
    from megatron_ultraep.megatron.groups import create_groups
    from rl.models.builder import build_model
    from rl.models.weights import load_weights

    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **sizes), timeout_s=60)
    of = []
    for dtype, wide in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = build_model(read_architecture(directory), groups, dtype=dtype, float32_residual=wide)
        load_weights(model, directory)
        (chunk,) = model.chunks
        packed = compat.packed_seq_params(torch.tensor([0, 32], dtype=torch.int32), 32)
        logits = chunk(torch.arange(5, 37)[None], torch.arange(32)[None], None, packed_seq_params=packed)[0]
        (logits.float() * torch.linspace(-1, 1, logits.shape[-1]).cos()).sum().backward()
        of.append({name: p.grad.float() for name, p in chunk.named_parameters() if p.grad is not None})
    exact, rounded, ours = of
    assert exact.keys() == rounded.keys() == ours.keys()

    def distance(found):
        return sum((found[name] - exact[name]).square().sum() / exact[name].square().sum() for name in exact)

    assert distance(ours) < 1.1 * distance(rounded)


def test_gradients(ranks, tmp_path):
    directory = tiny.llama(tmp_path / "m", layers=24, seed=3)
    ranks(1).run(gradients, str(directory), {})


MODES = (("full",), ("selective", ("moe", "layernorm")), ("selective", ("mlp", "layernorm", "core_attn")))


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_recomputation(ranks, tmp_path, layout):
    """Gradients are the same but for the order of sums."""
    world, sizes = LAYOUTS[layout]
    directory = str(tiny.qwen3_moe(tmp_path / "m", seed=3, mlp_only_layers=[1]))
    kept = merge(ranks(world).run(one_step, directory, sizes, **WIDE))
    for mode in MODES:
        again = merge(ranks(world).run(one_step, directory, sizes, recompute=mode, **WIDE))
        assert again["loss"] == kept["loss"]
        assert worst(again["tensors"], kept["tensors"]) < 0.02


def test_what_is_left_alone_and_what_is_refused():
    assert configured(torch.float32) == configured(torch.float64) == {}
    x = torch.ones(2).bfloat16()
    assert add_to_stream(True, False)((x, None), x, 0.0).dtype == torch.float32
    with pytest.raises(ValueError, match=r"without dropout, got hidden_dropout=0\.1"):
        add_to_stream(True, False)((x, None), x, 0.1)


@pytest.mark.parametrize("latent", [False, True], ids=["grouped", "latent"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_norms_of_linear_layers_keep_their_names_in_checkpoints(monkeypatch, moe, latent):
    """A spec as Transformer Engine's, which is not here: linear layers that have the norm before them."""
    spec = compat.layer_spec(
        moe=moe, experts=4, qk_layernorm=True, transformer_engine=False, multi_latent_attention=latent
    )
    spec.submodules.sharded_state_dict_keys_map = dict(OF_TRANSFORMER_ENGINE)
    plain = type("TEColumnParallelLinear", (), {})
    monkeypatch.setitem(
        sys.modules,
        "megatron.core.extensions.transformer_engine",
        types.SimpleNamespace(TEColumnParallelLinear=plain),
    )
    use_in_layer(spec, moe=moe, transformer_engine=True)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is Float32InputNorm
    expected = dict(OF_TRANSFORMER_ENGINE)
    if not latent:
        assert attention.linear_qkv is plain
        expected["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not moe:
        expected["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    assert layer.sharded_state_dict_keys_map == expected


OF_TRANSFORMER_ENGINE = {"mlp.0.weight": "mlp.linear_fc1.layer_norm_weight"}
