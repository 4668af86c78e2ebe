"""Specs whose MoE layers balance themselves: what is replaced, what stays, and that a layer adopts itself once."""

import functools
import sys
import types

import pytest

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import compat, spec, training
from megatron_ultraep.megatron.support import Unsupported


def layer_of(*, moe):
    return compat.layer_spec(moe=moe, experts=8, qk_layernorm=False, transformer_engine=False)


def class_of(layer):
    mlp = layer.submodules.mlp
    return mlp.func if isinstance(mlp, functools.partial) else getattr(mlp, "module", mlp)


def test_moe_layers_are_replaced_in_a_copy():
    stock = layer_of(moe=True)
    new = spec.with_self_balancing_layers(stock)
    assert class_of(new) is spec.SelfBalancingMoELayer
    assert class_of(stock) is compat.moe_layer_class(), "the job's spec was changed"
    assert new.module is stock.module
    assert new.submodules.self_attention is stock.submodules.self_attention


def test_dense_layers_of_a_block_stay():
    dense, moe = layer_of(moe=False), layer_of(moe=True)
    block = compat.block_spec([dense, moe], None)
    new = spec.with_self_balancing_layers(block)
    assert new.layer_specs[0] is dense
    assert class_of(new.layer_specs[1]) is spec.SelfBalancingMoELayer
    assert block.layer_specs[1] is moe


def test_a_spec_without_experts_is_refused():
    with pytest.raises(Unsupported, match="set --num-experts"):
        spec.with_self_balancing_layers(layer_of(moe=False))


@pytest.fixture
def job_before_019(monkeypatch):
    """Makes the arguments of a job whose `megatron.training` turns them into this configuration."""

    def make(**changed):
        given = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 8} | changed
        arguments = types.ModuleType("megatron.training.arguments")
        arguments.core_transformer_config_from_args = lambda args: compat.transformer_config(**given)
        package = types.ModuleType("megatron.training")
        package.arguments = arguments
        monkeypatch.setitem(sys.modules, "megatron.training", package)
        monkeypatch.setitem(sys.modules, "megatron.training.arguments", arguments)
        return types.SimpleNamespace(transformer_impl="local", normalization="RMSNorm", qk_l2_norm=False)

    return make


def test_before_019_the_spec_comes_from_the_arguments(job_before_019):
    assert class_of(spec.layer_spec_before_019(job_before_019())) is spec.SelfBalancingMoELayer


def test_before_019_layers_must_be_alike(job_before_019):
    with pytest.raises(Unsupported, match="the job has dense layers"):
        spec.layer_spec_before_019(job_before_019(moe_layer_freq=2))


def test_flags_come_from_the_environment(monkeypatch):
    monkeypatch.delenv(spec.VARIABLE, raising=False)
    assert spec.flags_of_environment() == BalanceConfig()
    monkeypatch.setenv(spec.VARIABLE, "--ultraep-slots 3 --ultraep-record 'a folder'")
    assert spec.flags_of_environment() == BalanceConfig(slots=3, record="a folder")


@pytest.fixture
def stock_layer(monkeypatch):
    """The stock layer, reduced to noting its forwards."""
    stock = compat.moe_layer_class()
    monkeypatch.setattr(stock, "__init__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(stock, "forward", lambda self, hidden: ("stock forward", hidden))
    monkeypatch.setattr(spec.support, "refusals", lambda layer: [])


def test_a_layer_adopts_itself_at_its_first_forward(stock_layer, monkeypatch):
    adopted = []
    monkeypatch.setattr(spec, "_balancer", types.SimpleNamespace(adopt=adopted.append))
    layer = spec.SelfBalancingMoELayer()
    assert adopted == []
    for hidden in (1, 2):
        assert layer.forward(hidden) == ("stock forward", hidden)
    assert adopted == [layer]


def test_a_layer_without_balancer_stays_stock(stock_layer, monkeypatch):
    monkeypatch.setattr(spec, "_balancer", None)
    monkeypatch.setattr(spec.support, "refusals", lambda layer: ["never asked"])
    assert spec.SelfBalancingMoELayer().forward(1) == ("stock forward", 1)


def test_a_layer_that_cannot_be_balanced_is_refused_when_built(stock_layer, monkeypatch):
    monkeypatch.setattr(spec, "_balancer", object())
    monkeypatch.setattr(spec.support, "refusals", lambda layer: ["set this to that"])
    with pytest.raises(Unsupported, match="set this to that"):
        spec.SelfBalancingMoELayer()


def test_switched_off_makes_no_balancer(monkeypatch):
    monkeypatch.setattr(training, "_decision", None)
    monkeypatch.setattr(training, "_hooks", None)
    monkeypatch.setattr(spec, "_balancer", None)
    monkeypatch.setenv(spec.VARIABLE, "--no-ultraep-enabled")
    spec.set_up()  # without process groups: it would fail if it made one
    assert spec._balancer is None
    assert not training.is_waiting()
