"""Who is the actor's partner, and why nobody is."""

import pytest

from rl.config import from_dict
from rl.config.fused_training import fused_partner
from tests.rl.test_config import PPO, changed

PP2 = [("trainer.ranks", 4), ("trainer.parallel", {"pp": 2, "ep": 2})]
GPUS = [("trainer.backend", "nccl"), ("rollout.device", "cuda")]
REFERENCE = [*PP2, ("algorithm.kl.coef", 0.1), ("algorithm.mini_batches", 2)]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ([*PP2, *PPO], "critic"),
        ([*PP2, *PPO, ("critic.parallel", {"ep": 2})], "critic"),
        ([*PP2, *PPO, ("algorithm.kl.coef", 0.1), ("algorithm.mini_batches", 2)], "critic"),
        ([*PP2, *PPO, ("stream.staleness", 1)], "critic"),
        ([*PP2, *PPO, *GPUS], "critic"),
        (REFERENCE, "reference"),
        ([*REFERENCE, ("fuse.training.mode", "on")], "reference"),
    ],
)
def test_partner(changes, name):
    partner = fused_partner(from_dict(changed(*changes)))
    assert (partner.name, partner.reason) == (name, "")
    assert str(partner) == f"on, the {name} in the actor's pipeline bubbles"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([*PP2, *PPO, ("fuse.training.mode", "off")], "mode says so"),
        (PPO, "no bubbles"),
        ([*REFERENCE, ("trainer.parallel", {"pp": 2, "vpp": 2})], "virtual pipeline stages"),
        ([*PP2, *PPO, ("stream.pipelining", True), ("algorithm.gae.whiten", False)], "as they arrive"),
        (PP2, "grpo without a critic and without a reference"),
        ([*REFERENCE, ("algorithm.kl.in", "reward")], "rewards need"),
        ([*PP2, ("algorithm.kl.coef", 0.1)], "raise algorithm.mini_batches"),
        ([*REFERENCE, ("fuse.tail.enabled", True)], "in the tail of generation"),
        ([*PP2, *PPO, ("critic.parallel", {"pp": 4})], "4 stages do not divide the actor's 2"),
        ([*PP2, *PPO, ("critic.parallel", {"ep": 4})], "takes lcm(tp, etp*ep) = 4 ranks"),
        ([*REFERENCE, ("reference.parallel", {"pp": 2, "vpp": 2})], "set reference.parallel.vpp to 1"),
    ],
)
def test_nobody(changes, said):
    partner = fused_partner(from_dict(changed(*changes)))
    assert partner.name is None
    assert said in partner.reason
    assert str(partner).startswith("off: ")
    assert partner.fields
