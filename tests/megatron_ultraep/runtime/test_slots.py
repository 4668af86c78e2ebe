"""Slot buffers: separate, aligned, made once; writes do not disturb what autograd saved."""

import itertools

import pytest
import torch

from megatron_ultraep.runtime.slots import Buffers, ExpertShape, SlotPool

SHAPE = ExpertShape(("fc1", "fc2"), ((3, 5), (5, 7)), torch.float32, torch.device("cpu"))


def test_views_do_not_overlap_and_are_aligned():
    buffers = Buffers(SHAPE, 3, torch.float64)
    spans = sorted((view.data_ptr(), view.data_ptr() + view.numel() * 8) for i in range(3) for view in buffers[i])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    base = buffers.flat.data_ptr()
    assert all((start - base) % 256 == 0 for start, _ in spans)
    assert [tuple(v.shape) for v in buffers[0]] == [(3, 5), (5, 7)]


def test_a_slot_may_be_filled_again_between_forward_and_backward():
    buffers = Buffers(SHAPE, 1, torch.float32)
    buffers[0][0].fill_(2.0)
    weight = buffers.aliases(0)[0].requires_grad_()
    x = torch.ones(4, 5, requires_grad=True)
    loss = (x @ weight.t()).sum()
    buffers[0][0].fill_(9.0)  # another layer
    buffers[0][0].fill_(2.0)  # placed again
    loss.backward()
    assert torch.equal(x.grad, torch.full((4, 5), 6.0))


def test_a_pool_allocates_once():
    pool = SlotPool(SHAPE, 2, staging=2)
    assert pool.bytes == pool.weights.bytes
    gradients, received = pool.gradients(torch.float32), pool.received(torch.float32)
    assert pool.gradients(torch.float32) is gradients
    assert pool.received(torch.float32) is received
    assert pool.bytes == pool.weights.bytes + gradients.bytes + received.bytes


def test_gradients_of_another_dtype_do_not_replace_the_first():
    pool = SlotPool(SHAPE, 2, staging=2)
    first = pool.gradients(torch.float32)
    pool.gradients(torch.bfloat16)  # a layer of the same shape whose experts are frozen
    assert pool.gradients(torch.float32) is first


def test_parameters_of_several_dtypes_are_refused():
    with pytest.raises(ValueError, match="share dtype and device"):
        ExpertShape.of(["a", "b"], [torch.zeros(2), torch.zeros(2, dtype=torch.float64)])
