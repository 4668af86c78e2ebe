"""Learning-rate schedules over a resume."""

import pytest
import torch

from megatron_ultraep.megatron import compat


def schedule_of(decay_steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "max_lr": 1.0, "min_lr": 0.0, "lr": 1.0, "wd_mult": 1.0}])
    return optimizer, compat.parameter_scheduler(
        optimizer, max_lr=1.0, min_lr=0.0, warmup_steps=0, decay_steps=decay_steps, style="linear", weight_decay=0.0
    )


def test_a_run_that_goes_on_longer_decays_until_its_new_end():
    _, first = schedule_of(10)
    first.step(increment=10)
    optimizer, longer = schedule_of(20)
    longer.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    longer.step(increment=5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
