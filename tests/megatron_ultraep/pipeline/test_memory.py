"""What operations hold and what passes, from readings that are made up here."""

import pytest

from megatron_ultraep.pipeline.memory import MemoryReading, OperationMemory, OperationsMemory
from megatron_ultraep.pipeline.problem import Operation


class Device:
    """Memory whose tensors a test makes and drops."""

    def __init__(self, allocated=0):
        self.allocated = self.peak = allocated

    def take(self, size):
        """Make tensors, or drop some with a negative size."""
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def spike(self, size):
        self.take(size)
        self.take(-size)

    def read(self):
        reading = MemoryReading(self.allocated, self.peak)
        self.peak = self.allocated
        return reading


def run(device, counted, operation, *, holds=0, spikes=0, received=0, kept=True):
    counted.begin()
    device.take(holds)
    device.spike(spikes)
    counted.end(operation, received=received, kept=kept)


def forward(microbatch, model=0):
    return Operation(model, 0, 0, microbatch, False)


def backward(microbatch, model=0):
    return Operation(model, 0, 0, microbatch, True)


def test_a_forward_holds_what_it_leaves_and_its_input():
    device = Device(1000)
    counted = OperationsMemory(device.read)
    device.take(7)  # its input
    run(device, counted, forward(0), holds=100, spikes=30, received=7)
    # 1000 before the run, 107 held: the spike alone passes.
    assert counted.found == [OperationMemory(107, 30)]
    assert counted.peak == 137


def test_what_passes_is_above_what_all_micro_batches_hold():
    device = Device(50)
    counted = OperationsMemory(device.read)
    run(device, counted, forward(0), holds=100)
    run(device, counted, forward(0, model=1), holds=40)
    run(device, counted, forward(1), holds=100, spikes=5)
    device.take(8)  # the gradient that a backward is given
    run(device, counted, backward(0), holds=-100, spikes=0, received=8)
    device.take(-8)
    run(device, counted, backward(0, model=1), holds=-40, spikes=60)
    run(device, counted, backward(1), holds=-100)
    assert [m.held for m in counted.found] == [100, 40, 100, 0, 0, 0]
    assert [m.passing for m in counted.found] == [0, 0, 5, 8, 20, 0]
    assert counted.peak == 248


def test_a_model_that_only_runs_forward_holds_nothing_afterwards():
    device = Device()
    counted = OperationsMemory(device.read)
    for microbatch in range(3):
        run(device, counted, forward(microbatch), holds=10, kept=False)
        device.take(-10)  # sent
    run(device, counted, forward(0, model=1), holds=30)
    assert [m.held for m in counted.found] == [10, 10, 10, 30]
    assert [m.passing for m in counted.found] == [0, 0, 0, 0]


def test_what_was_made_ready_before_the_run_passes():
    device = Device(100)
    before = device.allocated
    device.take(25)  # routes of the mini-batch
    counted = OperationsMemory(device.read, before)
    run(device, counted, forward(0), holds=10)
    assert counted.found == [OperationMemory(10, 25)]
    assert counted.peak == 35


def test_a_forward_that_frees_more_than_it_makes_holds_nothing():
    device = Device(100)
    counted = OperationsMemory(device.read)
    run(device, counted, forward(0), holds=-20)
    assert counted.found == [OperationMemory(0, 0)]
    with pytest.raises(KeyError):
        counted.end(backward(5), received=0, kept=True)
