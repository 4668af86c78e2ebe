import pytest
import torch

from rl.rollout.expert_stacks import ExpertStacks

BEFORE = "model.layers.1.mlp.experts."


def tensors(experts, matrices=("gate_proj.weight", "down_proj.weight")):
    return {f"{BEFORE}{e}.{m}": torch.full((2, 3), 10.0 * e + i) for e in experts for i, m in enumerate(matrices)}


def manifest(pairs):
    return {name: tuple(tensor.shape) for name, tensor in pairs.items()}


@pytest.mark.parametrize("seed", range(3))
def test_experts_come_together_whatever_the_order_and_the_chunks(seed):
    given = tensors(range(4)) | {"model.norm.weight": torch.ones(3), "model.layers.1.mlp.gate.weight": torch.ones(4, 3)}
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [list(given)[i] for i in order]
    stacks = ExpertStacks(manifest(given))
    found = {}
    for chunk in (names[:3], names[3:7], [], names[7:]):
        found |= dict(stacks.feed((name, given[name]) for name in chunk))
    assert stacks.waiting == 0
    assert set(found) == {f"{BEFORE}0.gate_proj.weight", f"{BEFORE}0.down_proj.weight", "model.norm.weight",
                          "model.layers.1.mlp.gate.weight"}  # fmt: skip
    for i, matrix in enumerate(("gate_proj.weight", "down_proj.weight")):
        stacked = found[f"{BEFORE}0.{matrix}"]
        assert stacked.shape == (4, 2, 3)
        assert stacked[:, 0, 0].tolist() == [10.0 * e + i for e in range(4)]


def test_held_until_the_last_one():
    given = tensors(range(2), ("w1.weight",))
    stacks = ExpertStacks(manifest(given))
    names = list(given)
    assert list(stacks.feed([(names[1], given[names[1]])])) == []
    assert stacks.waiting == 1
    assert [name for name, _ in stacks.feed([(names[0], given[names[0]])])] == [names[0]]


@pytest.mark.parametrize("experts", [[0, 2], [1, 2], [0]])
def test_others_are_passed_on(experts):
    given = tensors(experts, ("w1.weight",))
    assert [name for name, _ in ExpertStacks(manifest(given)).feed(given.items())] == list(given)


def test_different_shapes_are_passed_on():
    given = {f"{BEFORE}0.w1.weight": torch.ones(2), f"{BEFORE}1.w1.weight": torch.ones(3)}
    assert len(list(ExpertStacks(manifest(given)).feed(given.items()))) == 2
