"""Surrogate losses by hand: values, gradients, and what counts as clipped."""

from __future__ import annotations

import math

import torch

from rl.algorithms.surrogates import cispo, gspo, ppo_clip, ppo_sequence

F64 = torch.float64


def logs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64).log()


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=F64)


def test_dual_clip_by_hand():
    # A = -1: r = 5 -> max(5, 1.2) = 5, at most 3.  r = 2 -> 2, below 3.  r = 0.5 -> 0.8, clipped.
    # A = +1: r = 5 -> max(-5, -1.2) = -1.2, clipped: dual clip is for negative advantages.
    new = logs(5, 2, 0.5, 5).requires_grad_()
    result = ppo_clip(new, zeros(4), torch.tensor([-1, -1, -1, 1], dtype=F64), 0.2, 0.2, dual_clip=3.0)
    torch.testing.assert_close(result.loss.detach(), torch.tensor([3, 2, 0.8, -1.2], dtype=F64))
    assert result.clipped.tolist() == [True, False, True, True]
    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([0, 2, 0, 0], dtype=F64))


# Sequence 0: ratios 2 and 0.5 (and one token that is masked), sequence 1: ratio 1.5.
NEW = logs(2, 0.5, 9, 1.5)
MASK = torch.tensor([True, True, False, True])
INDEX = torch.tensor([0, 0, 0, 1])


def test_gspo_by_hand():
    # Sequence 0: sqrt(2 x 0.5) = 1, within bounds. Sequence 1: 1.5, clipped at 1.2 for A > 0.
    new = NEW.clone().requires_grad_()
    result = gspo(new, zeros(4), torch.tensor([3, 3, 0, 2], dtype=F64), MASK, INDEX, 0.2, 0.2)
    torch.testing.assert_close(result.loss.detach()[MASK], torch.tensor([-3, -3, -2.4], dtype=F64))
    assert result.clipped.tolist() == [False, False, False, True]
    result.loss[MASK].sum().backward()
    # Each token has the ratio of its sequence as the factor of its own gradient.
    torch.testing.assert_close(new.grad, torch.tensor([-3, -3, 0, 0], dtype=F64))
    # For A < 0 the larger ratio is not clipped.
    negative = gspo(NEW, zeros(4), torch.tensor([-1, -1, 0, -2], dtype=F64), MASK, INDEX, 0.2, 0.2)
    torch.testing.assert_close(negative.loss[MASK], torch.tensor([1, 1, 3], dtype=F64))


def test_gspo_has_the_gradient_of_the_sequence_ratio():
    generator = torch.Generator().manual_seed(1)
    old, shift = (torch.randn(7, generator=generator, dtype=F64) for _ in range(2))
    new = (old + 0.1 * shift).requires_grad_()
    mask, index = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.int64)
    loss = gspo(new, old, torch.full((7,), 1.5, dtype=F64), mask, index, 1.0, 9.0).loss.mean()
    (mine,) = torch.autograd.grad(loss, new)
    (expected,) = torch.autograd.grad(-1.5 * torch.exp((new - old).mean()), new)
    torch.testing.assert_close(mine, expected)


def test_ppo_sequence_by_hand():
    # Sequence 0: 2 x 0.5 = 1. Sequence 1: 1.5, clipped at 1.2.
    new = NEW.clone().requires_grad_()
    result = ppo_sequence(new, zeros(4), torch.tensor([3, 3, 0, 2], dtype=F64), MASK, INDEX, 0.2, 0.2)
    torch.testing.assert_close(result.loss.detach()[MASK], torch.tensor([-3, -3, -2.4], dtype=F64))
    assert result.clipped[MASK].tolist() == [False, False, True]
    # The mean over tokens is the sequence's loss; its gradient counts every token in full.
    result.loss[:2].mean().backward()
    torch.testing.assert_close(new.grad, torch.tensor([-3, -3, 0, 0], dtype=F64))


def test_cispo_by_hand():
    # Bounds 0.5 and 3: weights 2, 0.5 (from 0.1) and 3 (from 8), none without a gradient.
    new = logs(2, 0.1, 8).requires_grad_()
    result = cispo(new, zeros(3), torch.tensor([1, 2, -1], dtype=F64), clip_low=0.5, clip_high=2.0)
    expected = torch.tensor([-2 * math.log(2), -0.5 * 2 * math.log(0.1), 3 * math.log(8)], dtype=F64)
    torch.testing.assert_close(result.loss.detach(), expected)
    assert result.clipped.tolist() == [False, True, True]
    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([-2, -1, 3], dtype=F64))
