"""Value loss: hand-computed values, no gradient where it is clipped, sums that do not depend on the packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms.losses import Normaliser
from rl.algorithms.values import ValueTokens, explained_variance, value_loss

F64 = torch.float64


def tokens(values, old, returns, mask=None):
    new = torch.tensor(values, dtype=F64, requires_grad=True)
    kept = [True] * len(values) if mask is None else mask
    return ValueTokens(new, torch.tensor(old, dtype=F64), torch.tensor(returns, dtype=F64), torch.tensor(kept))


def test_by_hand():
    # Within the clip; beyond it, away from the return; beyond it, towards the return (the unclipped error is smaller).
    case = tokens([1.1, 2.0, 2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 3.0])
    loss, sums = value_loss(case, 0.5, Normaliser(3.0, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.01 + 1.0 + 1.5**2) / 3)
    # The clipped branch has no gradient: the third token has moved far enough.
    torch.testing.assert_close(case.values.grad, torch.tensor([0.1, 1.0, 0.0], dtype=F64) / 3)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {"loss_sum": 3 * loss.item(), "clipfrac": 1.0, "abs_error": 0.1 + 1 + 1}
    )


def test_without_a_clip():
    case = tokens([1.0, 5.0], [0.0, 0.0], [2.0, 2.0])
    loss, sums = value_loss(case, None, Normaliser(2.0, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (1 + 9) / 2)
    torch.testing.assert_close(case.values.grad, torch.tensor([-0.5, 1.5], dtype=F64))
    assert sums["clipfrac"] == 0


def test_masked_tokens_count_for_nothing_whatever_they_are():
    nan = float("nan")
    case = tokens([1.0, nan, 3.0], [0.0, nan, nan], [2.0, 1.0, nan], [True, False, False])
    loss, sums = value_loss(case, 0.2, Normaliser(1.0, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 1.8**2)
    assert case.values.grad.tolist()[1:] == [0.0, 0.0]
    assert all(torch.isfinite(value) for value in sums.values())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 11), st.sampled_from([None, 0.2, 1.0]))
def test_shares_add_up_however_tokens_are_packed(seed, count, cut, clip):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(count, generator=generator, dtype=F64) for _ in range(3)]
    mask = torch.rand(count, generator=generator) < 0.7
    normaliser = Normaliser(float(max(1, int(mask.sum()))), 1.0)
    whole, sums = value_loss(ValueTokens(*rows, mask), clip, normaliser)
    parts = [value_loss(ValueTokens(*(r[s] for r in rows), mask[s]), clip, normaliser) for s in
             (slice(0, min(cut, count)), slice(min(cut, count), None))]  # fmt: skip
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole))
    for name, value in sums.items():
        assert float(sum(part[name] for _, part in parts)) == pytest.approx(float(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_values": torch.zeros(3)}, "old_values: expected"),
        ({"mask": torch.ones(2)}, "mask: expected bool"),
        ({"clip": 0.0}, "expected a clip > 0"),
    ],
)
def test_refusals(change, message):
    import dataclasses

    change = dict(change)
    clip = change.pop("clip", 0.2)
    with pytest.raises(ValueError, match=message):
        value_loss(dataclasses.replace(tokens([1, 2], [1, 2], [1, 2]), **change), clip, Normaliser(1.0, 1.0))


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns + 5, returns) == 1.0  # a constant error varies nothing
    assert explained_variance(torch.zeros(4), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(torch.zeros(4), torch.ones(4)) == 0.0
    assert explained_variance(torch.zeros(1), torch.ones(1)) == 0.0
