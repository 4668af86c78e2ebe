"""Samples to reward."""

from __future__ import annotations

import numpy as np
import pytest

from rl.types import Prompt, Sample


@pytest.fixture
def make_sample():
    def make(response: str, label=None, metadata=None, index: int = 0) -> Sample:
        prompt = Prompt(f"train/0/{index}", index, 0, "Q", np.array([1], np.int32), label, metadata or {})
        return Sample(
            sample_id=f"train/0/{index}/0",
            prompt=prompt,
            response_tokens=np.array([2, 3], np.int32),
            rollout_logprobs=np.zeros(2, np.float32),
            weight_versions=((0, 0),),
            finish_reason="stop",
            routes=None,
            histogram=None,
            response_text=response,
        )

    return make
