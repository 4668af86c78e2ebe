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
    "pp2xep2": (4, {"pp": 2, "ep": 2}, {}),
    "vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "tp2ep2": (2, {"tp": 2, "ep": 2}, {}),
    "tp2xetp2": (2, {"tp": 2, "etp": 2}, {}),
    "tp2xpp2xep2": (4, {"tp": 2, "pp": 2, "ep": 2}, {}),
    "ep2 recompute full": (2, {"ep": 2}, {"recompute": ("full",)}),
    "pp2 recompute full": (2, {"pp": 2}, {"recompute": ("full",)}),
    "vpp2 recompute full": (2, {"pp": 2, "vpp": 2}, {"recompute": ("full",)}),
    "ep2 recompute moe": (2, {"ep": 2}, {"recompute": ("selective", ("moe",))}),
    "ep2 recompute core_attn": (2, {"ep": 2}, {"recompute": ("selective", ("core_attn",))}),
    "ep2 recompute layernorm": (2, {"ep": 2}, {"recompute": ("selective", ("layernorm",))}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("gradients") / "m", seed=3))


@pytest.fixture(scope="module")
def stock(ranks, directory):
    """EP=1 on one rank."""
    return {
        dtype: merge(ranks(1).run(one_step, directory, {}, dtype=dtype, distributed_optimizer=False))
        for dtype in ("float64", "float32")
    }


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_one_rank(ranks, directory, stock, layout, dtype):
    world, parallel, spec = LAYOUTS[layout]
    got = merge(ranks(world).run(one_step, directory, parallel, dtype=dtype, distributed_optimizer=False, **spec))
    expected = stock[dtype]
    bar = 1e-8 if dtype == "float64" else 1e-5
    error = worst(got["tensors"], expected["tensors"])
    print(
        f"{layout} {dtype}: loss {got['loss']:.12f} |dloss| {abs(got['loss'] - expected['loss']):.1e} max|dg|/max|g| {error:.1e}"
    )
    assert abs(got["loss"] - expected["loss"]) <= bar * max(1, abs(expected["loss"]))
    assert error <= bar
    captured = {s.sample_id: layer_digests(s.routes.handle) for s in make_samples(read_architecture(directory))}
    assert set(captured) == set(got["digests"])
    assert all(np.array_equal(captured[name], got["digests"][name]) for name in captured)
