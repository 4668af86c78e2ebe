"""Experts that change their homes take everything with them, bit by bit."""

import types

import numpy as np
import pytest
import torch

from megatron_ultraep.megatron.optimizer import refusals_of
from tests.megatron_ultraep.megatron import moving
from tests.megatron_ultraep.megatron.moving import Kind, merged, steps_and_moves

KINDS = {
    "float64": (2, Kind(dtype=torch.float64)),
    "float32, ep4": (4, Kind(ep=4, experts=8)),
    "bfloat16, ep2xdp2": (4, Kind(dtype=torch.bfloat16)),
    "distributed, float32, ep2": (2, Kind(distributed=True)),
    "distributed, float32, ep2xdp2, overlapped": (4, Kind(distributed=True, overlap=True)),
    "distributed, bfloat16, ep2xdp2, overlapped": (4, Kind(distributed=True, dtype=torch.bfloat16, overlap=True)),
    "distributed, bfloat16, biases, ep2xdp2": (
        4, Kind(distributed=True, dtype=torch.bfloat16, config={"add_bias_linear": True}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_everything_moves(ranks, name):
    """Steps with moves between them equal steps without, bit by bit and tensor by tensor."""
    world, kind = KINDS[name]
    stock = ranks(world).run(steps_and_moves, kind, (None, None, None, None))
    moved = ranks(world).run(steps_and_moves, kind, (1, 2, 3, 4), 6000)
    for step in range(4):
        one, other = merged(moved, step), merged(stock, step)
        assert set(one) == set(other)
        for key in one:
            assert np.array_equal(one[key], other[key]), (step, key)
    kinds = {key[3] for key in merged(moved, 3)}
    main = {"main"} if kind.dtype == torch.bfloat16 else set()
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"} | main
    reports = moved[0]["reports"]
    assert all(report.waves > 1 for report in reports), "one wave: bounded memory was not tested"
    assert reports[0].bytes < reports[1].bytes, "before the first step there are no moments to move"


def test_parameters_are_cut_inside(ranks):
    """Under the distributed optimizer each rank holds parts that end inside parameters, or nothing was shown."""
    world, kind = KINDS["distributed, bfloat16, ep2xdp2, overlapped"]
    results = ranks(world).run(steps_and_moves, kind, (None, None))
    assert any(first for result in results for (*_, first) in result["states"][0])


REFUSALS = {
    "gradients": "gradients are not empty",
    "homes": "told different homes",
    "steps": "different numbers of optimizer steps",
    "unknown state": "holds states that are not known: ['max_exp_avg_sq']",
    "layer": "expected homes of the MoE layers [2, 5, 6], got some of [3]",
    "permutation": "must be a permutation",
    "limits": "told different homes or limits",
    "limit": "expected limit_bytes >= 48",
}


@pytest.mark.parametrize("spoil", REFUSALS)
def test_refused_before_anything_moves(ranks, spoil):
    """By all ranks, also where only one has a reason."""
    for said, same in ranks(2).run(moving.refusal, Kind(), spoil):
        assert REFUSALS[spoil] in said
        assert same


class Plain:
    """Stands for one of Megatron's optimizers."""

    def __init__(self, inner, **config):
        self.optimizer = inner
        self.config = types.SimpleNamespace(**config)


def megatron(name, inner, **config):
    kind = type(name, (Plain,), {"__module__": "megatron.core.optimizer.somewhere"})
    return kind(inner, **config)


def adam(**more):
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], **more)


OPTIMIZERS = {
    "plain": (lambda: megatron("FP32Optimizer", adam()), ""),
    "amsgrad": (lambda: megatron("FP32Optimizer", adam(amsgrad=True)), "turn it off"),
    "precision-aware": (
        lambda: megatron("DistributedOptimizer", adam(), use_precision_aware_optimizer=True),
        "precision-aware",
    ),
    "offloaded": (lambda: megatron("FP32Optimizer", adam(), optimizer_cpu_offload=True), "unset optimizer_cpu_offload"),
    "sgd": (
        lambda: megatron("FP32Optimizer", torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1)),
        "SGD was not tested",
    ),
    "muon": (lambda: megatron("TensorParallelMuon", adam()), "TensorParallelMuon was not tested"),
    "layer-wise": (
        lambda: types.SimpleNamespace(chained_optimizers=[megatron("FP32Optimizer", adam())]),
        "was not tested: use Megatron's Adam",
    ),
    "somebody's": (lambda: Plain(adam()), "Plain was not tested"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_are_not_understood(name):
    make, sentence = OPTIMIZERS[name]
    reasons = refusals_of(make())
    assert bool(reasons) == bool(sentence)
    assert sentence in " ".join(reasons)


@pytest.mark.parametrize(
    ("world", "kind", "bytes_per_element"),
    [
        (2, Kind(dtype=torch.float64), 3 * 8),
        (4, Kind(dtype=torch.bfloat16), 2 + 3 * 4),
        (4, Kind(distributed=True, dtype=torch.bfloat16), 2 + 3 * 4 / 2),  # states are shared by two ranks
    ],
)
def test_bytes_of_an_expert(ranks, world, kind, bytes_per_element):
    elements = 96 * 32 + 32 * 48
    for size, report in ranks(world).run(moving.exchanged, kind):
        assert size == elements * bytes_per_element
        assert (report.experts, report.bytes) == (2, 2 * size * world // 2)


def test_a_failure_half_way_says_that_the_state_is_torn(ranks):
    for said in ranks(2).run(moving.torn, Kind()):
        assert "resume from the last checkpoint" in said
