import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import imbalance
from megatron_ultraep.telemetry.metrics import METRICS, REASONS, StepMetrics, max_vio, merge_groups, rank_tokens
from tests.megatron_ultraep.telemetry.plans import make_plan


def test_a_worked_example():
    # One layer: ranks have 17 and 3 tokens before, 9 and 11 after; experts 16, 1, 3, 0.
    plan = make_plan(ExpertLayout(4, 2, slots=1), loads=[[10, 1, 1, 0], [6, 0, 2, 0]])
    metrics = StepMetrics()
    metrics.add(5, plan)
    found = metrics.finish()
    assert found["moe/imbalance_before/mean"] == found["moe/imbalance_before/max"] == pytest.approx(17 / 10)
    assert found["moe/imbalance_after/mean"] == pytest.approx(11 / 10)
    assert found["moe/max_vio"] == found["moe/max_vio/layer_5"] == pytest.approx(16 / 5 - 1)
    assert found["moe/replicas/mean"] == 1
    assert all(found[f"moe/skipped/{reason}"] == 0 for reason in REASONS)


def test_over_layers_and_micro_batches():
    layout = ExpertLayout(32, 8, tuple(np.random.default_rng(0).permutation(32).tolist()), 4, 2)
    plans = [(layer, make_plan(layout, seed=10 * layer + mb)) for layer in (1, 2) for mb in range(3)]
    metrics = StepMetrics()
    for layer, plan in plans:
        metrics.add(layer, plan)
    found = metrics.finish()
    before, after = ([imbalance(getattr(p, name)) for _, p in plans] for name in ("before", "after"))
    assert found["moe/imbalance_before/mean"] == pytest.approx(np.mean(before))
    assert found["moe/imbalance_before/max"] == pytest.approx(max(before))
    assert found["moe/imbalance_after/mean"] == pytest.approx(np.mean(after))
    assert found["moe/imbalance_after/max"] == pytest.approx(max(after))
    per_layer = [max_vio(sum(p.loads.sum(0) for layer, p in plans if layer == wanted)) for wanted in (1, 2)]
    assert found["moe/max_vio"] == pytest.approx(np.mean(per_layer))
    assert found["moe/max_vio/layer_2"] == pytest.approx(per_layer[1])
    assert metrics.finish() == {}, "finish starts the next step"


def test_skipped_shares_and_names():
    metrics = StepMetrics()
    metrics.add(0, make_plan(ExpertLayout(4, 2, slots=0)))
    metrics.add(0, make_plan(ExpertLayout(4, 2, slots=1)))
    found = metrics.finish()
    assert found["moe/skipped/no_replica_possible"] == 0.5
    documented = {name.partition("<")[0] for name in METRICS}
    assert all(any(name.startswith(prefix) for prefix in documented) for name in found)


def test_empty_layers_are_ideal():
    metrics = StepMetrics()
    metrics.add(0, make_plan(ExpertLayout(4, 2, slots=1), loads=np.zeros((2, 4), dtype=int)))
    found = metrics.finish()
    assert found["moe/imbalance_before/max"] == found["moe/imbalance_after/max"] == 1.0
    assert found["moe/max_vio"] == 0.0


def test_rank_tokens_agrees_with_the_plan():
    layout = ExpertLayout(32, 8, tuple(np.random.default_rng(0).permutation(32).tolist()), 4, 2)
    plan = make_plan(layout, seed=4)
    before, after, tokens = rank_tokens(plan)
    assert before.tolist() == plan.before.tolist()
    assert after.tolist() == plan.after.tolist()
    assert tokens.tolist() == plan.loads.sum(axis=0).tolist()


def test_groups_are_merged_by_largest_and_mean():
    parts = [{"moe/replicas/max": 3.0, "moe/max_vio": 1.0}, {"moe/replicas/max": 5.0, "moe/max_vio": 2.0, "moe/x": 4.0}]
    assert merge_groups(parts) == {"moe/replicas/max": 5.0, "moe/max_vio": 1.5, "moe/x": 4.0}
    assert merge_groups([]) == {}
