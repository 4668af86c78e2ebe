"""Packed rotary embeddings are stock's, to the bit, gradients too."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from megatron_ultraep.megatron import compat, rotary

LENGTHS = (5, 1, 17, 8)


@pytest.fixture(scope="module")
def both():
    module = compat.rotary_module()
    rotary.install()
    packed = module._apply_rotary_pos_emb_thd
    rotary.install()
    assert module._apply_rotary_pos_emb_thd is packed, "installed once"
    return packed.__wrapped__, packed


def embedded(function, dtype, group, lengths=LENGTHS, **settings):
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(sum(lengths), 3, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    freqs = torch.randn(20, 1, 1, 6, generator=generator)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out = function(t, bounds, freqs, cp_group=group, **settings)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype))
    return out, t.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"rotary_interleaved": True}, {"latent": True, "mscale": 1.3}])
def test_equals_stock(both, dtype, settings):
    settings = dict(settings)
    if settings.pop("latent", False):
        known = inspect.signature(both[0]).parameters
        settings["mla_rotary_interleaved" if "mla_rotary_interleaved" in known else "multi_latent_attention"] = True
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    stock, packed = (embedded(function, dtype, group, **settings) for function in both)
    assert all(torch.equal(a, b) for a, b in zip(stock, packed, strict=True))


def test_one_sequence(both):
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    stock, packed = (embedded(function, torch.float32, group, lengths=(20,)) for function in both)
    assert torch.equal(stock[0], packed[0])


def test_context_parallel_ranks_get_stock(both):
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    bounds, freqs = torch.tensor([0, 8, 24], dtype=torch.int32), torch.randn(20, 1, 1, 6)
    t = torch.randn(12, 3, 8)
    assert torch.equal(*(function(t, bounds, freqs, cp_group=group) for function in both))


def test_positions():
    assert rotary.positions(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 5).tolist() == [0, 1, 2, 0, 1]
