"""A balanced layer without Megatron: linear experts whose weight gradients are known in closed form."""

import contextlib

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan import PlanSettings, solve
from megatron_ultraep.plan.foresight import solve_step
from megatron_ultraep.runtime import choose
from megatron_ultraep.runtime.foresight import Foresight
from megatron_ultraep.runtime.layer import LayerBalancer
from megatron_ultraep.runtime.planning import DevicePlanner, HostPlanner
from megatron_ultraep.runtime.slots import ExpertShape
from megatron_ultraep.runtime.stopwatch import Stopwatch

HIDDEN, OUT, TOKENS = 6, 5, 40
SETTINGS = PlanSettings(min_tokens=1, tolerance_ppm=0)
DTYPE = torch.float64


class Accumulating(torch.autograd.Function):
    """``x @ w.T`` whose backward adds to ``w.main_grad`` and hands a dummy on, as Transformer Engine's kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.weight.main_grad += gradient.t() @ x
        if hasattr(ctx.weight, "grad_added_to_main_grad"):
            ctx.weight.grad_added_to_main_grad = True
        return gradient @ weight, torch.full_like(weight, float("nan"))  # whoever adds the dummy is caught


class Linears:
    """Experts of one matrix each, with what DistributedDataParallel does to their parameters."""

    def __init__(self, home, *, fused, main_grad):
        self.home_parameters = [[torch.nn.Parameter(w.clone())] for w in home]
        self.fused_gradients = fused
        for (parameter,) in self.home_parameters:
            if main_grad:
                parameter.main_grad = torch.zeros_like(parameter)
                parameter.grad_added_to_main_grad = False
                parameter.register_post_accumulate_grad_hook(self.collect)
        self.when_ready = {}

    def collect(self, parameter):
        """As DDP's hook: the gradient is ready now."""
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad += parameter.grad
        parameter.grad = None
        parameter.grad_added_to_main_grad = False
        self.when_ready[parameter] = parameter.main_grad.clone()

    awaits_parameters = False

    def before_reading(self):
        pass

    def __call__(self, weights, *pieces):
        multiply = Accumulating.apply if self.fused_gradients else lambda x, w: x @ w.t()
        assert not any(len(x) for x in pieces[len(weights) :]), "tokens of a slot that is not computed"
        return torch.cat([multiply(x, w) for x, (w,) in zip(pieces, weights, strict=False)])


@contextlib.contextmanager
def no_waiting(wanted):
    """On a GPU, an error where the host waits for the device."""
    if not wanted or not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gathered(tensor):
    out = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(out, tensor.contiguous())
    return torch.cat(out)


def routing_map_of(layout, ranks, number):
    """Of the tokens of all ranks in one micro-batch; hot experts first."""
    generator = torch.Generator().manual_seed(1000 + number)
    bias = torch.linspace(2.0, 0.0, layout.experts)
    choice = (torch.rand(ranks * TOKENS, layout.experts, generator=generator) + bias).topk(2, dim=1).indices
    return torch.zeros(ranks * TOKENS, layout.experts, dtype=torch.bool).scatter_(1, choice, True)


def train(transport, *, fused, main_grad, early, foresight=False, micro_batches=3):
    """Largest error of this rank's home gradients after some micro-batches, of outputs, and how many replicas.

    Args:
        foresight: plans are made before the micro-batches, weights placed when a layer begins.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = ExpertLayout(experts=3 * ranks, ranks=ranks, slots=2, home_slot=tuple(reversed(range(3 * ranks))))
    made = choose.make_transport(
        [tuple(range(ranks))], tuple(range(ranks)), 0, symmetric=transport == "symmetric", timeout_s=60
    )
    device = choose.device_of_rank()
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(layout.experts, OUT, HIDDEN, dtype=DTYPE, generator=generator).to(device)
    experts = Linears([every[e] for e in layout.experts_of(rank)], fused=fused, main_grad=main_grad)
    pool = made.make_pool(ExpertShape(("w",), ((OUT, HIDDEN),), DTYPE, device), layout.slots)
    watch = Stopwatch(device)
    if transport == "symmetric":
        planner = DevicePlanner(layout, SETTINGS, rank, device, watch)
    else:
        planner = HostPlanner(layout, 2, lambda loads, where: solve(loads, where, SETTINGS), rank, watch)
    seen = []
    ahead = Foresight(rank, device)
    running = []
    layer = LayerBalancer(
        layout, experts, pool, made, planner, seen.append, watch, early=early,
        foresee=lambda: ahead.take(running[-1], 1) if running else None,
    )  # fmt: skip
    if foresight:
        maps = [routing_map_of(layout, ranks, number) for number in range(micro_batches)]
        loads = np.stack([m.reshape(ranks, TOKENS, -1).sum(1).numpy() for m in maps])
        step = solve_step(loads[:, None], [layout], SETTINGS)
        keys = [MicroBatchKey("model", "train", 0, number) for number in range(micro_batches)]
        ahead.set(step, keys, {1: layout}, {1: 0})
    width = layout.experts_per_rank + layout.slots
    expected = torch.zeros_like(every)
    wrong = 0.0
    for number in range(micro_batches):
        generator.manual_seed(100 + number)
        x = torch.randn(ranks * TOKENS, HIDDEN, dtype=DTYPE, generator=generator).to(device)
        g = torch.randn(ranks * TOKENS, OUT, dtype=DTYPE, generator=generator).to(device)
        routing_map = routing_map_of(layout, ranks, number).to(device)
        if foresight:
            running.append(keys[number])
            layer.begin()
        probs = routing_map.to(DTYPE) * 0.5
        mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
        with no_waiting(number and transport == "symmetric"):
            _, physical_map = layer.route(probs[mine], routing_map[mine])
        where = gathered(physical_map.to(torch.uint8)).bool()[:, rank * width : (rank + 1) * width]
        rows = [where[:, place].nonzero()[:, 0] for place in range(width)]
        inputs = x.clone().requires_grad_()
        pieces = [inputs[some] for some in rows]
        factors = torch.cat([g[some] for some in rows])
        with no_waiting(number and transport == "symmetric"):
            output = layer.combined(layer.compute(*pieces))
            (output * factors).sum().backward()
        for expert in range(layout.experts):
            tokens = routing_map[:, expert]
            expected[expert] += g[tokens].t() @ x[tokens]
        held = [*layout.experts_of(rank), *(int(e) for e in seen[-1].plan.replica_expert[rank])]
        correct = torch.cat([x[some] @ every[e].t() for some, e in zip(rows, held, strict=True) if e >= 0])
        wrong = max(wrong, float((output.detach() - correct).abs().max()))
    for (parameter,), expert in zip(experts.home_parameters, layout.experts_of(rank), strict=True):
        found = parameter.main_grad if main_grad else parameter.grad
        wrong = max(wrong, float((found - expected[expert]).abs().max()))
    replicas = sum(len(each.plan.replicas) for each in seen)
    if foresight:
        ahead.check()
    made.close()
    # With overlapped reduction whoever looks when a gradient is ready must find it complete.
    complete = [
        float((experts.when_ready[parameter] - expected[expert]).abs().max())
        for (parameter,), expert in zip(experts.home_parameters, layout.experts_of(rank), strict=True)
        if main_grad
    ]
    return wrong, replicas, complete
