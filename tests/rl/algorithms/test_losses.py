"""Policy losses: hand-computed values, and sums that do not depend on the packing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms.losses import (
    POLICY_LOSSES,
    Normaliser,
    PolicyLossConfig,
    PolicyTokens,
    aggregate,
    kl,
    policy_loss,
    ppo_clip,
    sample_index_of,
    sequence_token_counts,
)

F64 = torch.float64


def logs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64).log()


def test_ppo_clip_by_hand():
    # Ratios 1.5, 1.5, 0.5, 0.5, 1.1; bounds 0.8 and 1.3.
    # A=+1 r=1.5: max(-1.5, -1.3) = -1.3, clipped.  A=-1 r=1.5: max(1.5, 1.3) = 1.5.
    # A=+1 r=0.5: max(-0.5, -0.8) = -0.5.           A=-1 r=0.5: max(0.5, 0.8) = 0.8, clipped.   A=+2 r=1.1: -2.2.
    new = logs(1.5, 1.5, 0.5, 0.5, 1.1).requires_grad_()
    advantages = torch.tensor([1, -1, 1, -1, 2], dtype=F64)
    result = ppo_clip(new, torch.zeros(5, dtype=F64), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(result.loss.detach(), torch.tensor([-1.3, 1.5, -0.5, 0.8, -2.2], dtype=F64))
    assert result.clipped.tolist() == [True, False, False, True, False]
    # d(-A r)/d new = -A r where it is not clipped.
    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([0, 1.5, -0.5, 0, -2.2], dtype=F64))


def test_kl_by_hand():
    # policy 0.5, reference 0.25: x = log 2.
    new = logs(0.5).requires_grad_()
    x = math.log(2)
    for estimator, value, gradient in [
        ("k1", x, 1.0),
        ("k2", x * x / 2, x),
        ("k3", 0.5 - 1 + x, 1 - 0.5),
        ("k1+", x, x),
        ("k3+", 0.5 - 1 + x, x),
    ]:
        estimate = kl(new, logs(0.25), estimator)
        (grad,) = torch.autograd.grad(estimate.sum(), new)
        assert estimate.item() == pytest.approx(value, abs=1e-12)
        assert grad.item() == pytest.approx(gradient, abs=1e-12)
    with pytest.raises(ValueError, match="choose k1, k2, k3"):
        kl(new, logs(0.25), "k4")


def test_kl_estimators_in_expectation():
    """Over all outcomes: k1 and k3 give the KL; as losses k2 and k3 give the gradients that the table claims."""
    theta = torch.tensor([0.3, -0.4, 0.9, 0.0], dtype=F64, requires_grad=True)
    ref = torch.tensor([-0.2, 0.5, 0.1, 0.3], dtype=F64).log_softmax(0)
    logp = theta.log_softmax(0)
    p = logp.detach().exp()
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl(logp, ref, estimator)).sum(), reverse)
    torch.testing.assert_close(gradient((p * kl(logp, ref, "k1")).sum()), torch.zeros(4, dtype=F64))
    torch.testing.assert_close(gradient((p * kl(logp, ref, "k2")).sum()), gradient(reverse))
    torch.testing.assert_close(gradient((p * kl(logp, ref, "k3")).sum()), gradient(forward))
    for estimator in ("k1+", "k3+"):
        estimate = (p * kl(logp, ref, estimator)).sum()
        torch.testing.assert_close(estimate, reverse)
        torch.testing.assert_close(gradient(estimate), gradient(reverse))
    # Sampled by another policy, weighted with the ratio: value and gradient as if by this one.
    old = torch.tensor([0.1, 0.7, -0.5, 0.2], dtype=F64).log_softmax(0)
    for estimator in ("k1", "k3"):
        estimate = (old.exp() * kl(logp, ref, estimator, weight=(logp - old).exp())).sum()
        torch.testing.assert_close(estimate, reverse)
        torch.testing.assert_close(gradient(estimate), gradient(reverse))


def test_aggregate_by_hand():
    # Two sequences: values 1, 2, (masked) and 4.
    values = torch.tensor([1.0, 2.0, 100.0, 4.0])
    mask = torch.tensor([True, True, False, True])
    index = sample_index_of(torch.tensor([0, 3, 4]))
    assert index.tolist() == [0, 0, 0, 1]
    counts = sequence_token_counts(mask, index, 2)
    assert counts.tolist() == [2, 1]
    normaliser = Normaliser(3, 2, counts)
    assert aggregate(values, mask, "token_mean", normaliser).item() == pytest.approx(7 / 3)
    # ((1 + 2) / 2 + 4) / 2
    assert aggregate(values, mask, "sequence_mean", normaliser, index).item() == pytest.approx(2.75)
    # (1 + 2 + 4) / (2 sequences x 5 tokens)
    assert aggregate(values, mask, "sequence_sum", normaliser, sequence_length=5.0).item() == pytest.approx(0.7)
    with pytest.raises(ValueError, match="sequence_token_counts"):
        aggregate(values, mask, "sequence_mean", Normaliser(3, 2), index)
    with pytest.raises(ValueError, match="choose token_mean"):
        aggregate(values, mask, "mean", normaliser)


def test_policy_loss_by_hand():
    # Token 0: r = 0.6 / 0.5 = 1.2, A = 1, weight min(0.5 / 0.4, 1.1) = 1.1: -1.32; x = log(0.6 / 0.3) = log 2.
    # Token 1: r = 0.2 / 0.4 = 0.5, A = -1, clipped at 0.8: 0.8, weight 0.4 / 0.5 = 0.8: 0.64; x = log(0.2 / 0.2) = 0.
    tokens = PolicyTokens(
        logprobs=logs(0.6, 0.2, 0.9).requires_grad_(),
        advantages=torch.tensor([1.0, -1.0, 5.0], dtype=F64),
        mask=torch.tensor([True, True, False]),
        sample_index=torch.tensor([0, 1, 1]),
        old_logprobs=logs(0.5, 0.4, 0.9),
        rollout_logprobs=logs(0.4, 0.5, 0.9),
        ref_logprobs=logs(0.3, 0.2, 0.1),
        entropy=torch.tensor([0.5, 0.7, 9.0], dtype=F64, requires_grad=True),
    )
    config = PolicyLossConfig(kl_coef=0.1, kl_estimator="k2", entropy_coef=0.01, importance_cap=1.1)
    loss, sums = policy_loss(tokens, config, Normaliser(total_tokens=2, total_sequences=2))
    kl_0 = math.log(2) ** 2 / 2
    assert loss.item() == pytest.approx((-1.32 + 0.64 + 0.1 * kl_0 - 0.01 * 1.2) / 2)
    expected = {
        "pg_loss": -1.32 + 0.64,
        "pg_clipfrac": 1,
        "ppo_kl": -math.log(1.2) - math.log(0.5),
        "ratio": 1.7,
        "rollout_logprob_abs_diff": 2 * math.log(1.25),
        "rollout_kl": (1.25 - 1 - math.log(1.25)) + (0.8 - 1 - math.log(0.8)),
        "importance_weight": 1.9,
        "importance_weight_squared": 1.1**2 + 0.8**2,
        "importance_truncated": 1,
        "kl": kl_0,
        "entropy": 1.2,
    }
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in sums.values())
    loss.backward()
    # Token 0: (-1.32 + 0.1 log 2) / 2; token 1: clipped and at the reference; token 2: masked.
    torch.testing.assert_close(tokens.logprobs.grad, torch.tensor([(-1.32 + 0.1 * math.log(2)) / 2, 0, 0], dtype=F64))
    torch.testing.assert_close(tokens.entropy.grad, torch.tensor([-0.005, -0.005, 0], dtype=F64))


def random_batch(seed: int, lengths: list[int]) -> list[PolicyTokens]:
    """One ``PolicyTokens`` per sequence; masked rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        mask = torch.rand(length, generator=generator) < 0.7

        def row(mask: torch.Tensor = mask, length: int = length) -> torch.Tensor:
            values = -torch.rand(length, generator=generator, dtype=F64)
            return values.masked_fill(~mask, math.nan)

        sequences.append(
            PolicyTokens(
                logprobs=row().requires_grad_(),
                advantages=row() + 0.5,
                mask=mask,
                sample_index=torch.zeros(length, dtype=torch.int64),
                old_logprobs=row(),
                rollout_logprobs=row(),
                ref_logprobs=row(),
                entropy=row().requires_grad_(),
            )
        )
    return sequences


def pack(sequences: list[PolicyTokens]) -> PolicyTokens:
    rows = {
        field.name: torch.cat([getattr(sequence, field.name) for sequence in sequences])
        for field in dataclasses.fields(PolicyTokens)
    }
    rows["sample_index"] = torch.cat([torch.full((len(s.mask),), i) for i, s in enumerate(sequences)])
    return PolicyTokens(**rows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    mode=st.sampled_from(["token_mean", "sequence_mean"]),
    data=st.data(),
)
def test_any_packing_sums_to_the_full_batch(seed, lengths, mode, data):
    sequences = random_batch(seed, lengths)
    config = PolicyLossConfig(aggregation=mode, kl_coef=0.3, entropy_coef=0.2, importance_cap=1.5)
    per_sequence = torch.tensor([int(s.mask.sum()) for s in sequences])
    if per_sequence.sum() == 0:
        return
    totals = (float(per_sequence.sum()), float((per_sequence > 0).sum()))
    microbatch_of = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))

    def run(groups: list[list[PolicyTokens]]) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        losses, sums = [], []
        for group in groups:
            packed = pack(group)
            counts = sequence_token_counts(packed.mask, packed.sample_index, len(group))
            loss, metric = policy_loss(packed, config, Normaliser(*totals, counts))
            losses.append(loss)
            sums.append(metric)
        leaves = [leaf for s in sequences for leaf in (s.logprobs, s.entropy)]
        gradients = torch.autograd.grad(sum(losses), leaves)
        return sum(losses), {name: sum(s[name] for s in sums) for name in sums[0]}, list(gradients)

    whole = run([sequences])
    groups = [[s for s, m in zip(sequences, microbatch_of, strict=True) if m == wanted] for wanted in range(3)]
    parts = run([group for group in groups if group])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)

    # And the full batch is what the definition says, one sequence at a time.
    def mean_loss(s: PolicyTokens) -> torch.Tensor:
        keep = s.mask
        weight = (s.old_logprobs - s.rollout_logprobs).exp().clamp(max=1.5)
        ratio = (s.logprobs - s.old_logprobs).exp()
        pg = torch.maximum(-s.advantages * ratio, -s.advantages * ratio.clamp(0.8, 1.2)) * weight
        x = s.logprobs - s.ref_logprobs
        return (pg + 0.3 * ((-x).exp() - 1 + x) - 0.2 * s.entropy)[keep].sum()

    if mode == "token_mean":
        expected = sum(mean_loss(s) for s in sequences) / totals[0]
    else:
        expected = sum(mean_loss(s) / s.mask.sum() for s in sequences if s.mask.any()) / totals[1]
    torch.testing.assert_close(whole[0], expected, rtol=1e-12, atol=1e-12)
    assert all(torch.isfinite(gradient).all() for gradient in whole[2])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    name=st.sampled_from(sorted(POLICY_LOSSES)),
    mode=st.sampled_from(["token_mean", "sequence_mean", "sequence_sum"]),
    level=st.sampled_from(["token", "sequence", "sequence_mean"]),
    cut=st.integers(1, 5),
)
def test_every_loss_adds_up_over_micro_batches(seed, lengths, name, mode, level, cut):
    sequences = random_batch(seed, lengths)
    config = PolicyLossConfig(
        name=name,
        aggregation=mode,
        sequence_length=9.0,
        kl_coef=0.3,
        kl_weighted=True,
        importance_cap=1.5,
        importance_band=(0.6, 1.8),
        importance_level=level,
    )
    counts = torch.tensor([int(s.mask.sum()) for s in sequences])
    totals = (max(1.0, float(counts.sum())), max(1.0, float((counts > 0).sum())))
    leaves = [s.logprobs for s in sequences]

    def run(group: list[PolicyTokens]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        packed = pack(group)
        mine = sequence_token_counts(packed.mask, packed.sample_index, len(group))
        return policy_loss(packed, config, Normaliser(*totals, mine))

    whole, sums = run(sequences)
    parts = [run(group) for group in (sequences[:cut], sequences[cut:]) if group]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=1e-12)
    for key, value in sums.items():
        torch.testing.assert_close(sum(part[key] for _, part in parts), value, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(whole, leaves)
    together = torch.autograd.grad(sum(loss for loss, _ in parts), leaves)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.isfinite(row).all() for row in expected)


def test_dropped_tokens_count_in_the_denominator():
    # Ratios of old to rollout 4 (outside the band) and 1: the second token alone is learnt from, of two.
    tokens = PolicyTokens(
        logprobs=logs(0.8, 0.5).requires_grad_(),
        advantages=torch.tensor([1.0, 1.0], dtype=F64),
        mask=torch.ones(2, dtype=torch.bool),
        sample_index=torch.zeros(2, dtype=torch.int64),
        old_logprobs=logs(0.8, 0.5),
        rollout_logprobs=logs(0.2, 0.5),
    )
    loss, sums = policy_loss(tokens, PolicyLossConfig(importance_band=(0.5, 2.0)), Normaliser(2, 1))
    assert loss.item() == pytest.approx(-0.5)
    assert sums["importance_dropped"].item() == 1
    assert sums["importance_weight"].item() == pytest.approx(1)
    loss.backward()
    torch.testing.assert_close(tokens.logprobs.grad, torch.tensor([0, -0.5], dtype=F64))


def test_settings_that_contradict_each_other():
    config = PolicyLossConfig(
        name="cispo",
        dual_clip=0.5,
        sequence_length=0,
        kl_estimator="k3+",
        kl_weighted=True,
        importance_band=(2, 1),
        importance_level="group",
    )
    found = "\n".join(config.violations())
    for part in ("> 1 or null, got 0.5", "only ppo_clip", "> 0 tokens", "k1 and k3 only", "low < high", "got 'group'"):
        assert part in found
    assert not PolicyLossConfig(dual_clip=3.0, kl_weighted=True, importance_band=(0, 5)).violations()


def test_without_recomputed_old_logprobs_the_ratio_is_against_rollout():
    tokens = PolicyTokens(
        logprobs=logs(0.6),
        advantages=torch.ones(1, dtype=F64),
        mask=torch.ones(1, dtype=torch.bool),
        sample_index=torch.zeros(1, dtype=torch.int64),
        rollout_logprobs=logs(0.5),
    )
    loss, sums = policy_loss(tokens, PolicyLossConfig(clip_high=0.5), Normaliser(1, 1))
    assert loss.item() == pytest.approx(-1.2)
    assert sums["rollout_logprob_abs_diff"].item() == pytest.approx(math.log(1.2))


def test_all_that_is_missing_is_said_at_once():
    tokens = PolicyTokens(
        logprobs=torch.zeros(3, requires_grad=True),
        advantages=torch.zeros(2),
        mask=torch.ones(3),
        sample_index=torch.zeros(3, dtype=torch.int64),
        entropy=torch.zeros(3),
    )
    config = PolicyLossConfig(name="pp0", kl_coef=1, entropy_coef=1, importance_cap=-1)
    with pytest.raises(ValueError) as error:
        policy_loss(tokens, config, Normaliser(1, 1))
    for part in (
        "expected one of cispo, gspo, ppo_clip, ppo_sequence, got 'pp0'",
        "advantages: expected [3] like logprobs, got [2]",
        "mask: expected bool, got torch.float32",
        "got neither",
        "needed because kl_coef is 1",
        "expected > 0 or null, got -1",
        "do not detach it",
    ):
        assert part in str(error.value)
