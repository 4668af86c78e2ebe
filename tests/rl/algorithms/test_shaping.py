"""Overlong penalties and informative groups, by hand."""

from __future__ import annotations

import pytest
import torch

from rl.algorithms.shaping import informative, overlong_penalty


def test_overlong_penalty_by_hand():
    # Longest 10, buffer 4: 0 up to 6, then a quarter of the factor for each token.
    lengths = torch.tensor([0, 6, 7, 9, 10, 11])
    expected = torch.tensor([0, 0, -0.5, -1.5, -2, -2])
    torch.testing.assert_close(overlong_penalty(lengths, longest=10, buffer=4, factor=2.0), expected)
    torch.testing.assert_close(overlong_penalty(torch.tensor([9, 10]), 10, 1), torch.tensor([0.0, -1.0]))


def test_refusals():
    for buffer in (0, 11):
        with pytest.raises(ValueError, match="1 to 10 tokens"):
            overlong_penalty(torch.tensor([1]), 10, buffer)
    with pytest.raises(ValueError, match="factor >= 0, got -1"):
        overlong_penalty(torch.tensor([1]), 10, 2, -1)


@pytest.mark.parametrize(
    ("rewards", "expected"), [([], False), ([1.0], False), ([0.1] * 3, False), ([0, 0, 1e-6], True), ([1, 0], True)]
)
def test_informative(rewards, expected):
    assert informative(torch.tensor(rewards)) is expected
