"""What a plan says about itself agrees with its arrays; settings out of range are refused."""

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_ultraep.plan import Costs, PlanSettings, imbalance, solve
from tests.megatron_ultraep.plan.cases import problems


@settings(max_examples=60, deadline=None)
@given(problems())
def test_copies_and_their_sums(problem):
    loads, layout, options = problem
    plan = solve(loads, layout, options)
    width = layout.experts_per_rank + layout.slots
    for expert, copies in enumerate(plan.copies.tolist()):
        used = [c for c in copies if c >= 0]
        home = layout.home_slot[expert]
        assert used[0] == home // layout.experts_per_rank * width + home % layout.experts_per_rank
        assert used[1:] == sorted(r * width + layout.experts_per_rank + s for e, r, s in plan.replicas if e == expert)
        assert copies[len(used) :] == [-1] * (len(copies) - len(used))
        assert all(plan.expert_of[c] == expert for c in used)
    for source in range(layout.ranks):
        until = plan.until(source)
        assert (np.diff(until, axis=1) >= 0).all()
        assert np.array_equal(until[:, -1], loads[source])


@settings(max_examples=30, deadline=None)
@given(problems())
def test_before_and_after_count_all_tokens(problem):
    loads, layout, options = problem
    plan = solve(loads, layout, options)
    assert plan.before.sum() == plan.after.sum() == loads.sum()
    homes = [loads[:, list(layout.experts_of(rank))].sum() for rank in range(layout.ranks)]
    assert plan.before.tolist() == homes


def test_replica_time_rounds_up():
    assert Costs(token_ps=1, copy_ps_per_kib=1, replica_bytes=1025).replica_ps == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ps": -1}, "token_ps must be an integer >= 0, got -1"),
        ({"token_ps": 1.5}, "token_ps must be an integer >= 0, got 1.5"),
        ({"token_ps": 10**12}, "token_ps must be at most"),
        ({"replica_bytes": 10**16}, "replica_ps must be at most"),
        ({"fixed_ps": 10**15}, "fixed_ps must be at most"),
    ],
)
def test_costs_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Costs(**{"token_ps": 1, "copy_ps_per_kib": 1024, "replica_bytes": 1} | fields)


@pytest.mark.parametrize("fields", [{"min_tokens": 0}, {"tolerance_ppm": -1}, {"tolerance_ppm": 2_000_000}])
def test_settings_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PlanSettings(**fields)


def test_imbalance():
    assert imbalance([3, 1]) == 1.5
    assert imbalance([0, 0]) == 1.0
