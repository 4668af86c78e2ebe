"""What a run is made of, by its configuration."""

from types import SimpleNamespace

import pytest

from rl.config import from_dict
from rl.data.dataset import Cursor
from rl.orchestration.setup import Run
from tests.rl.test_config import changed


@pytest.mark.parametrize(("sampling", "expected"), [({"enabled": True, "max_rounds": 3}, 3), ({}, None)])
def test_the_feed_fills_batches_as_dynamic_sampling_says(sampling, expected):
    config = from_dict(changed(("run.steps", 5), ("algorithm.dynamic_sampling", sampling)))
    run = SimpleNamespace(
        _feed=None,
        config=config,
        data=SimpleNamespace(train=None),
        cursor=Cursor(),
        step=0,
        reward=None,
        prompts_left=lambda: 100,
        total_steps=lambda: 5,
        _generate=None,
    )
    assert Run.feed.fget(run)._max_rounds == expected
