"""Samples to reward, and what running code needs."""

from __future__ import annotations

import numpy as np
import pytest

from rl.rewards import sandbox
from rl.types import Prompt, Sample


@pytest.fixture(scope="session")
def isolation():
    """Skips where the machine refuses user namespaces: there a sandbox refuses too, see docs/data.md."""
    try:
        sandbox.check()
    except sandbox.SandboxError as error:
        if "namespaces" in str(error):
            pytest.skip(str(error))
        raise


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
