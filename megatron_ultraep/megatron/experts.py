"""Stock expert modules, computing with home experts and slots as one.

A twin of the stock module is made: the same class and configuration, ``L + R`` experts, no parameter of its own. Before
each forward it is given the weights to compute with: aliases of the home parameters and of the slots. So one grouped
GEMM covers home experts and filled slots, and Megatron's own forward decides how experts are computed.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

import torch

from megatron_ultraep.megatron import compat
from megatron_ultraep.runtime.slots import ExpertShape
from megatron_ultraep.runtime.transport import Parameters

_GROUPED = re.compile(r"^(weight|bias)(\d+)$")


class PhysicalExperts:
    """``L`` home experts and ``R`` slots of one layer on this rank.

    Args:
        experts: the stock module (``SequentialMLP`` or ``TEGroupedMLP``), which stays as it is.
        slots: R.

    Attributes:
        home_parameters: ``[L][parameters of an expert]``, in the order of ``shape.names``.
        shape: of one expert.
        fused_gradients: kernels add weight gradients to ``main_grad`` themselves.

    Raises:
        ValueError: an expert module that is none of the two.
    """

    def __init__(self, experts: torch.nn.Module, slots: int) -> None:
        self._stock = experts
        self.fused_gradients = any(getattr(m, "fuse_wgrad_accumulation", False) for m in experts.modules())
        if isinstance(experts, compat.sequential_mlp_class()):
            self._twin, self._places, names = _sequential(experts, slots)
        elif compat.grouped_mlp_class() is not None and isinstance(experts, compat.grouped_mlp_class()):
            self._twin, self._places, names = _grouped(experts, slots)
        else:
            raise ValueError(f"expected SequentialMLP or TEGroupedMLP experts, got {type(experts).__name__}")
        self._linears = [m for m in self._twin.children() if hasattr(m, "num_gemms")]
        self._owners = [module for module in experts.modules() if module._parameters]
        owned = dict(experts.named_parameters())
        self.home_parameters: list[Parameters] = [[owned[name] for name in expert] for expert in names]
        self.shape = ExpertShape.of([_inside(name) for name in names[0]], self.home_parameters[0])

    @property
    def awaits_parameters(self) -> bool:
        """Whether :meth:`before_reading` may wait for gathered parameters."""
        return any(module._forward_pre_hooks for module in self._owners)

    def before_reading(self) -> None:
        """Fire DDP's forward pre-hooks of the modules that own home parameters: they wait for gathered parameters.

        The stock forward of those modules does not run, so nobody else would.
        """
        for module in self._owners:
            if module._forward_pre_hooks:
                for hook in list(module._forward_pre_hooks.values()):
                    hook(module, ())

    def __call__(self, weights: Sequence[Parameters], *inputs: torch.Tensor) -> torch.Tensor:
        """Megatron's forward of the experts.

        Args:
            weights: ``[n][parameters of an expert]``, ``L <= n <= L + R``: of homes and of the first slots. What there
                are no weights of has no tokens.
            inputs: what the stock module takes: tokens, tokens per expert ``[L + R]``, probs.

        Raises:
            RuntimeError: experts that return a bias, which the dispatcher could not combine.
        """
        hidden, tokens, probs = inputs
        count = len(weights)
        self._twin.train(self._stock.training)
        self._twin.num_local_experts = count
        for linear in self._linears:
            linear.num_gemms = count
        for places, parameters in zip(self._places, weights, strict=False):
            for (module, name), tensor in zip(places, parameters, strict=True):
                module.__dict__[name] = tensor
        try:
            output, bias = self._twin(hidden, tokens[:count], probs)
        finally:
            # The graph keeps what backward needs; anything kept here would keep the graph.
            for places in self._places:
                for module, name in places:
                    module.__dict__[name] = None
        if bias is not None:
            raise RuntimeError("experts returned a bias that is not added yet; no tested Megatron-core does this")
        return output

    def try_tokens(self, tokens: int) -> None:
        """Forward and backward of the first home expert over made-up tokens, to time it; leaves no gradient anywhere.

        Args:
            tokens: how many.
        """
        device, dtype = self.shape.device, self.shape.dtype
        weights = [[p.detach().requires_grad_() for p in self.home_parameters[0]]]
        weights += [[p.detach() for p in self.home_parameters[0]] for _ in self._places[1:]]
        # Random, as multiplying zeros is faster; from a generator of its own, as the job's must not notice.
        generator = torch.Generator(device).manual_seed(0)
        size = (tokens, int(self._stock.config.hidden_size))
        hidden = torch.randn(size, dtype=dtype, device=device, generator=generator).requires_grad_()
        counts = torch.tensor([tokens] + [0] * (len(self._places) - 1), dtype=torch.int64)
        # Kernels that accumulate weight gradients themselves would add to main gradients.
        fusing = [m for m in self._twin.modules() if getattr(m, "fuse_wgrad_accumulation", False)]
        for module in fusing:
            module.fuse_wgrad_accumulation = False
        try:
            with torch.enable_grad():
                output = self(weights, hidden, counts, torch.ones(tokens, dtype=dtype, device=device))
                torch.autograd.grad(output, [hidden, *weights[0]], torch.ones_like(output))
        finally:
            for module in fusing:
                module.fuse_wgrad_accumulation = True


Places = list[list[tuple[torch.nn.Module, str]]]


def _sequential(experts: torch.nn.Module, slots: int) -> tuple[torch.nn.Module, Places, list[list[str]]]:
    stock = list(experts.local_experts)
    names = [[f"local_experts.{i}.{name}" for name, _ in expert.named_parameters()] for i, expert in enumerate(stock)]
    twins = [_twin(expert) for expert in stock] + [_twin(stock[0]) for _ in range(slots)]
    twin = _twin(experts)
    twin._modules["local_experts"] = torch.nn.ModuleList(twins)
    twin.num_local_experts = len(twins)
    inner = [name.split(".", 2)[2] for name in names[0]]
    places: Places = []
    for expert in twins:
        found = []
        for name in inner:
            path, _, last = name.rpartition(".")
            found.append((expert.get_submodule(path), last))
        places.append(found)
    return twin, places, names


def _grouped(experts: torch.nn.Module, slots: int) -> tuple[torch.nn.Module, Places, list[list[str]]]:
    count = int(experts.num_local_experts)
    twin = _twin(experts)
    twin.num_local_experts = count + slots
    kinds: list[tuple[str, str]] = []
    for path, linear in experts.named_children():
        found = sorted({m[1] for name in linear._parameters if (m := _GROUPED.match(name))}, reverse=True)
        if not found:
            continue
        kinds += [(path, kind) for kind in found]
        copy = twin.get_submodule(path)
        copy.num_gemms = count + slots
        # Never "the first micro-batch": that would overwrite main gradients instead of adding to them.
        copy.disable_parameter_transpose_cache = True
        if "bias" not in found:  # placeholders that are no parameters
            for i in range(count, count + slots):
                if "bias0" in linear.__dict__:
                    copy.__dict__[f"bias{i}"] = linear.__dict__["bias0"]
    names = [[f"{path}.{kind}{i}" for path, kind in kinds] for i in range(count)]
    places: Places = [[(twin.get_submodule(path), f"{kind}{i}") for path, kind in kinds] for i in range(count + slots)]
    return twin, places, names


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """The same module without parameters and hooks, submodules likewise; other attributes are shared."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {name: None for name, p in module._parameters.items() if p is None}
    twin.__dict__["_buffers"] = dict(module._buffers)
    for name in module.__dict__:
        if "hook" in name and isinstance(module.__dict__[name], dict):
            twin.__dict__[name] = OrderedDict()
    twin.__dict__["_modules"] = {name: None if m is None else _twin(m) for name, m in module._modules.items()}
    return twin


def _inside(name: str) -> str:
    """The name of a parameter inside its expert, without the expert's index."""
    name = re.sub(r"^local_experts\.\d+\.", "", name)
    return re.sub(r"(weight|bias)\d+$", r"\1", name)
