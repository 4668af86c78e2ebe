"""What a run's processes are started with."""

import pytest

from rl.config import from_dict
from rl.orchestration.actors import _dispatch, predictor
from rl.rollout.dispatch import EngineState, WaitingGroup
from tests.rl.test_config import changed

PROFILE = "benchmarks/data/latency-tiny-cpu.json"


@pytest.mark.parametrize(
    "stream",
    [
        {},
        {"dispatch": "random"},
        {"dispatch": "longest_first", "predictor": "history"},
        {"dispatch": "skew_aware", "predictor": "features", "latency_profile": PROFILE},
        {"dispatch": "skew_aware", "predictor": "ranker", "latency_profile": PROFILE, "long_fraction": 0.5},
    ],
)
def test_every_dispatch_policy_hands_out_groups(stream):
    config = from_dict(changed(("stream", stream)))
    assert (predictor(config) is None) == ("predictor" not in stream)
    groups = [WaitingGroup(f"train/0/{i}", i, 4, float(10 * i + 1)) for i in range(6)]
    engines = [EngineState(i, 16, 0, None, True) for i in range(2)]
    sent = _dispatch(config).assign(groups, engines)
    assert sorted(group for group, _ in sent) == list(range(6))
