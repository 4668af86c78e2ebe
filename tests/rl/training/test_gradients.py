"""Same seed and data: loss and every gradient, in logical order, are the same under every layout."""

import numpy as np
import pytest

from megatron_ultraep.replay import layer_digests
from rl.models import tiny
from rl.models.architecture import read_architecture
from tests.rl.training.common import make_samples, merge, one_step, worst

LAYOUTS = {
    "ep2": (2, {"ep": 2}, {}),
    "dp2": (2, {}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "pp4": (4, {"pp": 4}, {}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}, {}),
    "vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}, {}),
    "tp2xetp2": (2, {"tp": 2, "etp": 2}, {}),
    "tp2xpp2xep2": (4, {"tp": 2, "pp": 2, "ep": 2}, {}),
    "ep2 recompute full": (2, {"ep": 2}, {"recompute": ("full",)}),
    "pp2 recompute full": (2, {"pp": 2}, {"recompute": ("full",)}),
    "vpp2 recompute full": (2, {"pp": 2, "vpp": 2}, {"recompute": ("full",)}),
    "ep2 recompute moe": (2, {"ep": 2}, {"recompute": ("selective", ("moe",))}),
    "ep2 recompute core_attn": (2, {"ep": 2}, {"recompute": ("selective", ("core_attn",))}),
    "ep2 recompute layernorm": (2, {"ep": 2}, {"recompute": ("selective", ("layernorm",))}),
}
OTHER_MODELS = {
    "tied": lambda path: tiny.qwen3_moe(path, seed=4, tie_word_embeddings=True, mlp_only_layers=[1]),
    "mixtral": lambda path: tiny.mixtral(path, seed=5, heads=4, kv_heads=2),
    "seven layers": lambda path: tiny.qwen3_moe(path, seed=7, layers=7, mlp_only_layers=[0]),
    "llama tied": lambda path: tiny.llama(path, seed=6, heads=4, kv_heads=2, tie_word_embeddings=True),
}
OTHER_LAYOUTS = {
    "pp2": (2, {"pp": 2}),
    "tp2xpp2xep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "vpp2xdp2": (4, {"pp": 2, "vpp": 2}),
}
UNEVEN_LAYOUTS = {"pp2xep2": (4, {"pp": 2, "ep": 2}), "pp4": (4, {"pp": 4})}  # 4, 3; and 2, 2, 2, 1
BAR = {"float64": 1e-8, "float32": 1e-5}


def gradients(ranks, directory, world, layout, **spec):
    return merge(ranks(world).run(one_step, directory, layout, distributed_optimizer=False, **spec))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("gradients") / "m", seed=3))


@pytest.fixture(scope="module")
def stock(ranks, directory):
    """One rank, by dtype."""
    return {dtype: gradients(ranks, directory, 1, {}, dtype=dtype) for dtype in BAR}


@pytest.mark.parametrize("dtype", BAR)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_one_rank(ranks, directory, stock, layout, dtype):
    world, parallel, spec = LAYOUTS[layout]
    got = gradients(ranks, directory, world, parallel, dtype=dtype, **spec)
    assert_same(got, stock[dtype], BAR[dtype])
    captured = {s.sample_id: layer_digests(s.routes.handle) for s in make_samples(read_architecture(directory))}
    assert set(captured) == set(got["digests"])
    assert all(np.array_equal(captured[name], got["digests"][name]) for name in captured)


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_gradients_of_other_models(ranks, tmp_path, model):
    """Tied embeddings have a gradient from both ends of the pipeline; dense layers none from experts."""
    directory = str(OTHER_MODELS[model](tmp_path / "m"))
    one = gradients(ranks, directory, 1, {}, dtype="float64")
    assert ("lm_head.weight" in one["tensors"]) == ("tied" not in model)
    for world, layout in (UNEVEN_LAYOUTS if model == "seven layers" else OTHER_LAYOUTS).values():
        sizes = layout if model != "llama tied" else {k: v for k, v in layout.items() if k != "ep"}
        assert_same(gradients(ranks, directory, world, sizes, dtype="float64"), one, BAR["float64"])


def assert_same(got, expected, bar):
    assert abs(got["loss"] - expected["loss"]) <= bar * max(1, abs(expected["loss"]))
    assert worst(got["tensors"], expected["tensors"]) <= bar
    assert all(np.abs(g).max() > 0 for g in got["tensors"].values())


@pytest.mark.parametrize("layout", ["ep2", "pp2", "tp2xep2"])
def test_bfloat16_is_as_close_to_float32_as_on_one_rank(ranks, directory, stock, layout):
    def error(got):
        exact = stock["float32"]["tensors"]
        return max(float(np.linalg.norm(got["tensors"][n] - g) / np.linalg.norm(g)) for n, g in exact.items())

    world, parallel, _ = LAYOUTS[layout]
    one = merge(ranks(1).run(one_step, directory, {}, dtype="bfloat16", distributed_optimizer=False))
    got = merge(ranks(world).run(one_step, directory, parallel, dtype="bfloat16", distributed_optimizer=False))
    assert 1e-3 < error(one) < 0.2
    assert error(got) <= 1.5 * error(one)
