"""Importance weights: hand-computed, at each level."""

from __future__ import annotations

import math

import pytest
import torch

from rl.algorithms.importance import importance_weights, ratio_at, safe_ratio

F64 = torch.float64
# Two sequences, of 2 and of 3 tokens; the last token of the second is masked. Ratios 2, 3 | 0.25, 2, (8).
TRAIN = torch.tensor([0.5, 0.9, 0.1, 0.6, 0.8], dtype=F64).log()
ROLLOUT = torch.tensor([0.25, 0.3, 0.4, 0.3, 0.1], dtype=F64).log()
MASK = torch.tensor([True, True, True, True, False])
INDEX = torch.tensor([0, 0, 1, 1, 1])


def test_truncated_by_hand():
    train = TRAIN.clone().requires_grad_()
    result = importance_weights(train, ROLLOUT, MASK, INDEX, cap=2.0 + 1e-12)
    torch.testing.assert_close(result.weights[MASK], torch.tensor([2, 2, 0.25, 2], dtype=F64))
    assert result.truncated[MASK].tolist() == [False, True, False, False]
    assert result.dropped is None
    assert not result.weights.requires_grad


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [2, 3, 0.25, 2]),
        ("sequence", [6, 6, 0.5, 0.5]),  # 2 x 3; 0.25 x 2
        ("sequence_mean", [6**0.5, 6**0.5, 0.5**0.5, 0.5**0.5]),
    ],
)
def test_levels_by_hand(level, expected):
    ratio = ratio_at(TRAIN - ROLLOUT, level, MASK, INDEX)
    torch.testing.assert_close(ratio[MASK], torch.tensor(expected, dtype=F64))
    weights = importance_weights(TRAIN, ROLLOUT, MASK, INDEX, level=level, cap=2.2).weights
    torch.testing.assert_close(weights[MASK], torch.tensor(expected, dtype=F64).clamp(max=2.2))


def test_a_band_drops_tokens_and_sequences():
    of_tokens = importance_weights(TRAIN, ROLLOUT, MASK, INDEX, band=(0.5, 2.5))
    torch.testing.assert_close(of_tokens.weights[MASK], torch.tensor([2, 0, 0, 2], dtype=F64))
    assert of_tokens.dropped[MASK].tolist() == [False, True, True, False]
    # Sequence 0 has ratio 6 and is dropped whole; the other's, 0.5, is the edge of the band and stays.
    of_sequences = importance_weights(TRAIN, ROLLOUT, MASK, INDEX, level="sequence", band=(0.5 - 1e-12, 2.5), cap=0.4)
    torch.testing.assert_close(of_sequences.weights[MASK], torch.tensor([0, 0, 0.4, 0.4], dtype=F64))
    assert of_sequences.dropped[MASK].tolist() == [True, True, False, False]
    assert of_sequences.truncated[MASK].tolist() == [False, False, True, True]


def test_masked_tokens_do_not_reach_the_ratio_of_their_sequence():
    x = torch.tensor([0.1, math.nan, 0.2], dtype=F64, requires_grad=True)
    ratio = ratio_at(x, "sequence", torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(ratio.detach(), torch.full((3,), math.exp(0.3), dtype=F64))
    ratio[0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([math.exp(0.3), 0, math.exp(0.3)], dtype=F64))


def test_mixed_versions_are_corrected_token_by_token():
    # Sampled half under one policy, half under a newer one that training has: only the first half has weights.
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=F64)
    sampled = old + torch.tensor([0.5, -0.2, 0.0, 0.0], dtype=F64)
    mask, index = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    weights = importance_weights(old, sampled, mask, index, cap=10.0).weights
    torch.testing.assert_close(weights, torch.tensor([-0.5, 0.2, 0, 0], dtype=F64).exp())
    whole = importance_weights(old, sampled, mask, index, level="sequence", cap=10.0).weights
    torch.testing.assert_close(whole, torch.full((4,), math.exp(-0.3), dtype=F64))


def test_a_broken_token_stays_finite():
    assert torch.isfinite(safe_ratio(torch.tensor([1e9, -1e9, math.inf]))).all()


def test_refusals():
    one, true, zero = torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="cap > 0, got 0"):
        importance_weights(one, one, true, zero, cap=0)
    with pytest.raises(ValueError, match="same order"):
        importance_weights(one, torch.zeros(2), true, zero)
    with pytest.raises(ValueError, match="0 <= low < high"):
        importance_weights(one, one, true, zero, band=(2.0, 1.0))
    with pytest.raises(ValueError, match="choose token, sequence, sequence_mean"):
        importance_weights(one, one, true, zero, level="group")
