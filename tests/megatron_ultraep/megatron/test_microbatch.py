"""The key of a micro-batch is the same in forward and in recomputation, whatever runs between."""

import threading

import pytest
import torch

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.megatron import microbatch
from megatron_ultraep.megatron.microbatch import (
    NoMicroBatch,
    carrying_key,
    current_key,
    current_key_or_none,
    micro_batch,
)

KEYS = [MicroBatchKey("actor", "train", 0, i) for i in range(4)]


def test_there_is_no_key_outside():
    assert current_key_or_none() is None
    with pytest.raises(NoMicroBatch, match=r"a layer runs outside any micro-batch: enter .*micro_batch"):
        current_key()


def test_nesting_restores_also_after_an_exception():
    with micro_batch(KEYS[0]):
        with pytest.raises(ZeroDivisionError), micro_batch(KEYS[1]):
            _ = 1 / (current_key().microbatch - 1)
        assert current_key() == KEYS[0]
        with micro_batch(None):
            assert current_key_or_none() is None
        assert current_key() == KEYS[0]
    assert current_key_or_none() is None


def test_threads_have_keys_of_their_own():
    seen = []
    with micro_batch(KEYS[0]):
        thread = threading.Thread(target=lambda: seen.append(current_key_or_none()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_function_carries_the_key_it_was_given_or_none():
    with micro_batch(KEYS[0]):
        carrying = carrying_key(current_key_or_none)
    nowhere = carrying_key(current_key_or_none)
    with micro_batch(KEYS[1]):
        assert carrying() == KEYS[0]
        assert nowhere() is None
        assert current_key() == KEYS[1]
    assert carrying() == KEYS[0]


def full(function, x):
    """Megatron's full recomputation: the output stays, what is inside is computed again."""
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(function, False, x)


def without_output(function, x):
    """Megatron's selective recomputation: the output is freed too."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    checkpoint = CheckpointWithoutOutput()
    output = checkpoint.checkpoint(function, x)
    hook_tensor = output * 3.0
    checkpoint.discard_output_and_register_recompute(hook_tensor)
    return hook_tensor


WAYS = {"full": full, "without_output": without_output}


class Layer:
    """``x -> x*x`` that notes the micro-batch it runs for."""

    def __init__(self):
        self.seen = []

    def __call__(self, x):
        self.seen.append(current_key_or_none())
        return x * x


def forward(way, key, layer):
    x = torch.arange(4.0, requires_grad=True)
    with micro_batch(key):
        return x, WAYS[way](layer, x)


def interleave(way):
    """Four forwards, their backwards in another order, inside and outside other micro-batches."""
    microbatch.install()
    layer = Layer()
    runs = [forward(way, key, layer) for key in KEYS]
    assert layer.seen == KEYS
    layer.seen.clear()
    after = []
    for i in (2, 0):
        runs[i][1].sum().backward()
        after.append(current_key_or_none())
    with micro_batch(KEYS[0]):
        for i in (3, 1):
            runs[i][1].sum().backward()
            after.append(current_key_or_none())
    gradients = [x.grad.tolist() for x, _ in runs]
    return layer.seen, after, gradients


@pytest.mark.parametrize("way", WAYS)
def test_recomputation_gets_the_key_of_its_forward(ranks, way):
    ((seen, after, gradients),) = ranks(1).run(interleave, way)
    assert seen == [KEYS[2], KEYS[0], KEYS[3], KEYS[1]]
    assert after == [None, None, KEYS[0], KEYS[0]]
    factor = {"full": 2.0, "without_output": 6.0}[way]
    assert gradients == [[factor * i for i in range(4)]] * 4


def on_another_thread(way):
    microbatch.install()
    layer = Layer()
    _, output = forward(way, KEYS[1], layer)
    left = []

    def backward():
        output.sum().backward()
        left.append(current_key_or_none())

    with micro_batch(KEYS[2]):
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        left.append(current_key())
    return layer.seen, left


@pytest.mark.parametrize("way", WAYS)
def test_recomputation_on_another_thread(ranks, way):
    assert ranks(1).run(on_another_thread, way) == [([KEYS[1], KEYS[1]], [None, KEYS[2]])]


def no_key_stays_no_key(way):
    microbatch.install()
    layer = Layer()
    _, output = forward(way, None, layer)
    with micro_batch(KEYS[0]):
        output.sum().backward()
    return layer.seen


@pytest.mark.parametrize("way", WAYS)
def test_what_ran_outside_is_recomputed_outside(ranks, way):
    assert ranks(1).run(no_key_stays_no_key, way) == [[None, None]]


def install_twice():
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    microbatch.install()
    before = tensor_parallel.checkpoint, CheckpointWithoutOutput.checkpoint
    microbatch.install()
    return before == (tensor_parallel.checkpoint, CheckpointWithoutOutput.checkpoint)


def test_install_is_idempotent(ranks):
    assert ranks(1).run(install_twice) == [True]


def install_on_another_megatron(which):
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    owner = {"function": tensor_parallel, "method": CheckpointWithoutOutput}[which]
    original = owner.checkpoint
    owner.checkpoint = lambda tensors, function: function(*tensors)
    try:
        microbatch.install()
    except RuntimeError as error:
        return str(error)
    finally:
        owner.checkpoint = original
    return None


@pytest.mark.parametrize(
    ("which", "expected"), [("function", r"\['function'\]"), ("method", r"\['self', 'run_function'\]")]
)
def test_a_changed_signature_is_refused(ranks, which, expected):
    (message,) = ranks(1).run(install_on_another_megatron, which)
    pattern = rf"checkpoint of Megatron-core .* takes \['tensors', 'function'\], expected it to begin with {expected}"
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(message)
