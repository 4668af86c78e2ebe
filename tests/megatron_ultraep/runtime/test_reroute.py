"""Every (token, expert) pair goes to one copy of the expert, in exactly the numbers of the plan."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ultraep import plan as planners
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.runtime.reroute import reroute, stride, tables


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(2, 4, 1), (2, 8, 2), (4, 8, 3)]), st.booleans())
def test_quotas_are_met_exactly(seed, shape, permuted):
    ranks, experts, topk = shape
    rng = np.random.default_rng(seed)
    home = tuple(int(x) for x in rng.permutation(experts)) if permuted else ()
    layout = ExpertLayout(experts, ranks, home, slots=2)
    preference = rng.dirichlet(np.full(experts, 0.4)) + 1e-9
    maps = []
    for _ in range(ranks):
        rows = int(rng.integers(0, 40))
        scores = torch.tensor(np.log(preference) + rng.gumbel(size=(rows, experts)))
        maps.append(torch.zeros(rows, experts, dtype=torch.bool).scatter(1, scores.topk(topk, dim=1).indices, True))
    loads = np.stack([m.sum(0).numpy().astype(np.int64) for m in maps])
    plan = planners.solve(loads, layout, PlanSettings(min_tokens=1, tolerance_ppm=0))
    physical = ranks * (layout.experts_per_rank + layout.slots)
    for rank, routing_map in enumerate(maps):
        probs = torch.rand(routing_map.shape, dtype=torch.float64, requires_grad=True)
        table = torch.from_numpy(tables(plan, rank))
        found, chosen = reroute(probs * routing_map, routing_map, table, topk=topk, physical=physical)
        assert (chosen.sum(0).numpy() == plan.quota[rank]).all()
        assert (chosen.sum(1) == topk).all()
        # Back to logical experts: the same map, the same probs, and the gradient of a copy.
        logical = torch.zeros(routing_map.shape, dtype=torch.float64)
        filled = np.nonzero(plan.expert_of >= 0)[0]
        logical.index_add_(1, torch.from_numpy(plan.expert_of[filled]), found[:, filled])
        assert torch.equal(logical, probs * routing_map)
        found.sum().backward()
        assert torch.equal(probs.grad, routing_map.double())


def test_strides_are_coprime():
    counts = np.arange(0, 5000, dtype=np.int64)
    found = stride(counts)
    assert (np.gcd(found, np.maximum(1, counts)) == 1).all()
    assert (found[2:] <= counts[2:]).all()
