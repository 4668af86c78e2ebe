"""Home gradients have their replicas' share, in every way that gradients are accumulated; no host waits for a GPU."""

import pytest

from tests.megatron_ultraep.runtime import layer_ranks

WAYS = {
    "fused, home parameters themselves": {"fused": True, "main_grad": True, "early": True},
    "fused, aliases": {"fused": True, "main_grad": True, "early": False},
    "main gradients": {"fused": False, "main_grad": True, "early": False},
    "main gradients, early has no effect": {"fused": False, "main_grad": True, "early": True},
    "no main gradients": {"fused": False, "main_grad": False, "early": False},
}


@pytest.mark.parametrize("transport", ["collective", "symmetric"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients(device_ranks, way, transport):
    for wrong, replicas, complete in device_ranks(2).run(layer_ranks.train, transport, **WAYS[way]):
        assert wrong <= 1e-12
        assert replicas > 0
        if not WAYS[way]["early"]:
            assert all(difference <= 1e-12 for difference in complete), "handed on before the replicas' share was added"


@pytest.mark.parametrize("transport", ["collective", "symmetric"])
@pytest.mark.parametrize("way", ["fused, home parameters themselves", "main gradients", "no main gradients"])
def test_plans_made_ahead(device_ranks, way, transport):
    for wrong, replicas, _ in device_ranks(2).run(layer_ranks.train, transport, foresight=True, **WAYS[way]):
        assert wrong <= 1e-12
        assert replicas > 0


def test_three_ranks(ranks):
    for wrong, replicas, _ in ranks(3).run(layer_ranks.train, "symmetric", **WAYS["fused, home parameters themselves"]):
        assert wrong <= 1e-12
        assert replicas > 0
