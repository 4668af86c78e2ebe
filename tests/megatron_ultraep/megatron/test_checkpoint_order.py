"""Checkpoints hold experts in logical order, wherever they live when they are saved or loaded."""

import types

import numpy as np
import pytest
import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.checkpoint import _Rank, local_expert_of, local_experts, set_home_slot
from tests.megatron_ultraep.megatron import moving
from tests.megatron_ultraep.megatron.moving import Kind, merged

PLAIN = Kind(dtype=torch.float64, experts=8)
BF16 = Kind(dtype=torch.bfloat16, experts=8)
DISTRIBUTED = Kind(distributed=True, experts=8, overlap=True)
DISTRIBUTED_BF16 = Kind(distributed=True, dtype=torch.bfloat16, experts=6)
# world, what saves and under which homes, world, what loads and under which homes; no seed: Megatron's own order
CASES = {
    "float64, moved to none": (2, PLAIN, 1, 2, PLAIN, None),
    "float64, none to moved": (2, PLAIN, None, 2, PLAIN, 1),
    "bfloat16, moved to moved": (2, BF16, 1, 2, BF16, 2),
    "distributed, moved to none": (4, DISTRIBUTED, 1, 4, DISTRIBUTED, None),
    "distributed, none to moved": (2, DISTRIBUTED, None, 2, DISTRIBUTED, 1),
    "distributed, bfloat16, moved to none": (4, DISTRIBUTED_BF16, 1, 4, DISTRIBUTED_BF16, None),
    "distributed, moved to moved, ep2 to ep4": (2, DISTRIBUTED, 1, 4, Kind(4, 8, distributed=True), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_what_was_saved(ranks, tmp_path, name):
    """Bit by bit: what is loaded, and the step after it."""
    world, kind, seed, other_world, other_kind, other_seed = CASES[name]
    saved = ranks(world).run(moving.saved, kind, seed, str(tmp_path))
    resumed = ranks(other_world).run(moving.resumed, other_kind, other_seed, str(tmp_path))
    for step in range(2):
        one, other = merged(resumed, step), merged(saved, step)
        assert set(one) == set(other)
        for key in one:
            assert np.array_equal(one[key], other[key]), (step, key)


@pytest.mark.parametrize("singleton", [False, True])
def test_sharded_tensors_are_those_without_moves(ranks, singleton):
    """Names, offsets and values over all ranks; only where they lie has changed."""
    stock, moved = (ranks(2).run(moving.sharded, PLAIN, seed, singleton_local_shards=singleton) for seed in (None, 1))
    whole = [{key: value for rank in results for key, (_, value) in rank.items()} for results in (stock, moved)]
    assert set(whole[0]) == set(whole[1])
    assert all(np.array_equal(whole[0][key], whole[1][key]) for key in whole[0])
    for before, after in zip(stock, moved, strict=True):
        assert {name for name, _ in before.values()} == {name for name, _ in after.values()}
        assert set(before) != set(after)


def test_formats_that_follow_buffers_are_refused_while_experts_are_away(ranks):
    for before, away, back in ranks(2).run(moving.formats, DISTRIBUTED):
        assert (before, back) == ("written", "written")
        assert "set the format to 'fully_reshardable'" in away


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local_experts.12.linear_fc1.weight", (12, "linear_fc1.weight")),
        ("linear_fc2.weight3", (3, "linear_fc2.weight")),
        ("linear_fc1.bias0", (0, "linear_fc1.bias")),
        ("linear_fc1._extra_state", (0, "linear_fc1._extra_state")),
        ("linear_fc1._extra_state2", (2, "linear_fc1._extra_state")),
        ("linear_fc1.layer_norm.weight", None),
    ],
)
def test_names_of_local_experts(name, expected):
    assert local_expert_of(name) == expected


class Linear(torch.nn.Module):
    """What Megatron's wrapper of Transformer Engine's grouped linear layer is to a checkpoint."""

    def __init__(self, ids, group):
        super().__init__()
        self.num_gemms = len(ids)
        self._pg_collection = types.SimpleNamespace(ep=group)
        for place, expert in enumerate(ids):
            self.register_parameter(f"weight{place}", torch.nn.Parameter(torch.tensor([float(expert)])))


class Grouped(torch.nn.Module):
    """Names and numbers experts as ``TEGroupedMLP`` does: by two groups, one of them its linear layers'."""

    def __init__(self, ids, group):
        super().__init__()
        self.ep_group = group
        self.linear_fc1, self.linear_fc2 = Linear(ids, group), Linear(ids, group)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        found = {}
        for name, linear in self.named_children():
            group = linear._pg_collection.ep
            assert (group.rank(), group.size()) == (self.ep_group.rank(), self.ep_group.size())
            for place in range(linear.num_gemms):
                key = f"{prefix}experts.{name}.weight", group.rank() * linear.num_gemms + place
                found[f"{prefix}{name}.weight{place}"] = key, getattr(linear, f"weight{place}")
                extra = f"{prefix}{name}._extra_state{place or ''}"
                found[extra] = (f"{prefix}experts.{name}._extra_state", key[1]), None
        return found


@pytest.mark.parametrize("seed", range(5))
def test_grouped_experts(monkeypatch, seed):
    """Every parameter under its own name here and its logical id there; afterwards the module is as it was."""
    monkeypatch.setattr(compat, "grouped_mlp_class", lambda: Grouped)
    layout = ExpertLayout(8, 2, tuple(np.random.default_rng(seed).permutation(8).tolist()))
    for rank in range(2):
        mine, group = layout.experts_of(rank), _Rank(rank, 2)
        experts = Grouped(mine, group)
        layer = types.SimpleNamespace(experts=experts, ep_group=group, config=types.SimpleNamespace(num_moe_experts=8))
        before = dict(experts.named_parameters())
        set_home_slot(layer, layout.home_slot)
        found = experts.sharded_state_dict("p.")
        for linear in ("linear_fc1", "linear_fc2"):
            for place, expert in enumerate(mine):
                key, parameter = found.pop(f"p.{linear}.weight{place}")
                assert key == (f"p.experts.{linear}.weight", expert)
                assert parameter is before[f"{linear}.weight{place}"]
                (_, number), _ = found.pop(f"p.{linear}._extra_state{place or ''}")
                assert number == expert
        assert not found
        after = dict(experts.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert experts.ep_group is experts.linear_fc1._pg_collection.ep is group
        assert local_experts(layer) == mine
        set_home_slot(layer, range(8))
        assert "sharded_state_dict" not in experts.__dict__
