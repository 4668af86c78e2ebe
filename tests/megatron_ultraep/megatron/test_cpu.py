"""The CPU shims go in once, and not at all beside CUDA."""

import torch

from megatron_ultraep.megatron import cpu


def what_is_patched():
    from megatron.core.dist_checkpointing import mapping
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    return [
        torch.cuda.current_device,
        torch.cuda.Stream,
        torch.cuda.synchronize,
        torch.Tensor.type,
        torch.Tensor.cuda,
        schedules.torch,
        random._get_cuda_rng_state,
        moe_utils.maybe_move_tensor_to_cpu,
        token_dispatcher.maybe_move_tensor_to_cpu,
        DistributedOptimizer._set_main_param_and_optimizer_states,
        mapping.ShardedTensor,  # never patched
    ]


def install_again():
    first = cpu.install()
    before = what_is_patched()
    again = cpu.install()
    return first, again, all(a is b for a, b in zip(before, what_is_patched(), strict=True))


def test_install_is_idempotent(ranks):
    assert ranks(1).run(install_again) == [(True, True, True)]


def behaviour():
    from megatron.core.pipeline_parallel import schedules

    cpu.install()
    x = torch.ones(2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = schedules.torch.zeros(2, device="cuda"), schedules.torch.full((1,), 2.0, device=0)
    return (
        str(torch.cuda.current_device()),
        x.type(),
        str(x.type(torch.float64).dtype),
        x.cuda() is x,
        [str(t.device) for t in made],
        torch.zeros is schedules.torch.zeros,
        stream.query(),
    )


def test_what_asks_for_cuda_gets_the_cpu(ranks):
    (answer,) = ranks(1).run(behaviour)
    assert answer == ("cpu", "torch.cuda.FloatTensor", "torch.float64", True, ["cpu", "cpu"], False, True)


def test_nothing_happens_beside_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_installed", False)
    before = torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.type, torch.Tensor.cuda
    assert cpu.install() is False
    assert before == (torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.type, torch.Tensor.cuda)
    assert cpu._installed is False
