"""Vocabulary-parallel log-probs and entropy against torch's own, on one rank and on two."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms.logprobs import vocab_parallel_logprobs


def reference(logits, targets, temperature, vocab_size):
    log_p = (logits[:, :vocab_size] / temperature).log_softmax(dim=1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=1)


def random_case(seed: int, tokens: int, vocab_size: int, padding: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(tokens, vocab_size + padding, generator=generator, dtype=torch.float64)
    logits[:, vocab_size:] += 100  # what is not left out will be seen
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    weights = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), targets, weights


def test_by_hand():
    # Probabilities 1/2, 1/4, 1/4: log-probs -log 2 and -2 log 2, entropy 1.5 log 2.
    logits = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]], dtype=torch.float64).log()
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.tensor([0, 2]), with_entropy=True)
    log2 = math.log(2)
    torch.testing.assert_close(logprobs, torch.tensor([-log2, -2 * log2], dtype=torch.float64))
    torch.testing.assert_close(entropy, torch.full((2,), 1.5 * log2, dtype=torch.float64))
    # At half the temperature the probabilities are squared: 4/6, 1/6, 1/6.
    logprobs, nothing = vocab_parallel_logprobs(logits, torch.tensor([0, 2]), temperature=0.5)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([4 / 6, 1 / 6], dtype=torch.float64))
    assert nothing is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 9),
    vocab_size=st.integers(1, 12),
    padding=st.integers(0, 3),
    chunk_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    with_entropy=st.booleans(),
)
def test_equals_log_softmax(seed, tokens, vocab_size, padding, chunk_tokens, temperature, with_entropy):
    logits, targets, weights = random_case(seed, tokens, vocab_size, padding)
    expected = reference(logits, targets, temperature, vocab_size)
    logprobs, entropy = vocab_parallel_logprobs(
        logits,
        targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
        with_entropy=with_entropy,
    )
    torch.testing.assert_close(logprobs, expected[0], rtol=1e-12, atol=1e-12)
    loss, expected_loss = (weights[0] * logprobs).sum(), (weights[0] * expected[0]).sum()
    if with_entropy:
        torch.testing.assert_close(entropy, expected[1], rtol=1e-12, atol=1e-12)
        loss, expected_loss = loss + (weights[1] * entropy).sum(), expected_loss + (weights[1] * expected[1]).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected_loss, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    logits, targets, _ = random_case(0, 5, 7, 2)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprobs(x, targets, None, 0, 0.7, 2, 7, with_entropy=True), (logits,)
    )


def test_entropy_alone_has_a_gradient():
    logits, targets, _ = random_case(1, 4, 6, 0)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_logprobs(x, targets, with_entropy=True)[1], (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit_and_the_logits_are_left_alone(dtype):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(33, 50, generator=generator).to(dtype).requires_grad_()
    before = logits.detach().clone()
    targets = torch.randint(0, 50, (33,), generator=generator)
    results = []
    for chunk_tokens in (1, 8, 33, 100):
        logprobs, entropy = vocab_parallel_logprobs(
            logits, targets, chunk_tokens=chunk_tokens, with_entropy=True, temperature=0.9
        )
        assert logprobs.dtype == entropy.dtype == torch.float32
        (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
        assert gradient.dtype == dtype
        results.append((logprobs.detach(), entropy.detach(), gradient))
    assert torch.equal(logits, before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    expected = reference(logits.detach().double(), targets, 0.9, 50)
    torch.testing.assert_close(results[0][0].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_forbidden_tokens_have_no_part():
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.tensor([0]), with_entropy=True)
    (-100 * logprobs + 100 * entropy).sum().backward()
    assert logprobs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == 0


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, 1e4]])
    logprobs, _ = vocab_parallel_logprobs(logits, torch.tensor([2]), temperature=0.01)
    assert logprobs.item() == pytest.approx(-math.log(2))


def test_only_the_logits_and_rows_are_saved():
    logits, targets, _ = random_case(2, 64, 32, 0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        vocab_parallel_logprobs(logits, targets, with_entropy=True)
    assert [shape for shape in saved if len(shape) > 1] == [logits.shape]


def test_refusals():
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"targets in 0..3, got 0..4"):
        vocab_parallel_logprobs(logits, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="temperature > 0"):
        vocab_parallel_logprobs(logits, torch.tensor([0, 1]), temperature=0)
    with pytest.raises(ValueError, match="flatten batch"):
        vocab_parallel_logprobs(logits[None], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="chunk_tokens >= 1"):
        vocab_parallel_logprobs(logits, torch.tensor([0, 1]), chunk_tokens=0)


def compare_with_one_rank(seed: int, vocab_size: int, columns: int) -> float:
    """On every rank: largest difference of its values and gradients from those of one rank with all columns."""
    world, rank = dist.get_world_size(), dist.get_rank()
    logits, targets, weights = random_case(seed, 11, vocab_size, world * columns - vocab_size)

    def run(x, group, start):
        logprobs, entropy = vocab_parallel_logprobs(x, targets, group, start, 1.3, 4, vocab_size, with_entropy=True)
        (gradient,) = torch.autograd.grad((weights[0] * logprobs + weights[1] * entropy).sum(), x)
        return logprobs.detach(), entropy.detach(), gradient

    mine = slice(rank * columns, (rank + 1) * columns)
    shard = logits.detach()[:, mine].clone().requires_grad_()
    logprobs, entropy, gradient = run(shard, dist.group.WORLD, rank * columns)
    expected = run(logits, None, 0)
    pairs = [(logprobs, expected[0]), (entropy, expected[1]), (gradient, expected[2][:, mine])]
    return max((a - b).abs().max().item() for a, b in pairs)


# The last case: the second rank has padding columns only.
VOCABULARIES = [(16, 8), (13, 8), (8, 8)]


@pytest.mark.multiproc
@pytest.mark.parametrize(("vocab_size", "columns"), VOCABULARIES)
def test_two_ranks_equal_one(ranks, vocab_size, columns):
    assert max(ranks(2).run(compare_with_one_rank, 3, vocab_size, columns)) <= 1e-12
