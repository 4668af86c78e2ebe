"""Truncated importance weights."""

from __future__ import annotations

import math

import pytest
import torch

from rl.algorithms.importance import safe_ratio, truncated_weights


def test_by_hand():
    # Ratios 0.5 / 0.25 = 2 (at the cap, not above it), 0.9 / 0.3 = 3 (cut to 2), 0.1 / 0.4 = 0.25.
    train = torch.tensor([0.5, 0.9, 0.1], dtype=torch.float64).log().requires_grad_()
    rollout = torch.tensor([0.25, 0.3, 0.4], dtype=torch.float64).log()
    result = truncated_weights(train, rollout, cap=2.0 + 1e-12)
    torch.testing.assert_close(result.weights, torch.tensor([2, 2, 0.25], dtype=torch.float64))
    assert result.truncated.tolist() == [False, True, False]
    assert not result.weights.requires_grad


def test_a_broken_token_stays_finite():
    assert torch.isfinite(safe_ratio(torch.tensor([1e9, -1e9, math.inf]))).all()


def test_refusals():
    with pytest.raises(ValueError, match="cap > 0, got 0"):
        truncated_weights(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="same order"):
        truncated_weights(torch.zeros(1), torch.zeros(2), 2)
