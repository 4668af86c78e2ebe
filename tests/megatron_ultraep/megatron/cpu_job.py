"""Runs a `megatron.training` script where there is neither CUDA nor Python 3.12; the script itself stays as it is.

    python cpu_job.py SCRIPT ARGUMENTS
    python -m megatron_ultraep.launch [--ultraep-...] cpu_job.py SCRIPT ARGUMENTS

What Megatron-core needs on a CPU is in `megatron_ultraep.megatron.cpu`; what `megatron.training` needs on top is below,
each with its reason.
"""

import collections
import os
import runpy
import sys
import types
import typing
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jit_fuser compiles
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch


class _CudaSeemsThere(types.ModuleType):
    """`torch.cuda` as `megatron.training` sees it: one device, which is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.is_available = lambda: True
        self.device_count = lambda: 1
        self.set_device = self.set_stream = self.empty_cache = lambda *args: None
        self.memory_stats = lambda *args: collections.defaultdict(int)
        self.memory_allocated = self.max_memory_allocated = lambda *args: 0
        self.memory_reserved = self.max_memory_reserved = lambda *args: 0
        self.mem_get_info = lambda *args: (1 << 33, 1 << 34)
        self.get_device_properties = lambda *args: types.SimpleNamespace(major=9, minor=0, multi_processor_count=1)
        self.get_device_capability = lambda *args: (9, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


# Modules of Megatron-core that write `device="cuda"` and that only `megatron.training` uses.
_CORE_MODULES_OF_TRAINING = ("megatron.core.rerun_state_machine", "megatron.core.timers")


def python_312() -> None:
    """`megatron.training` imports `typing.override`, which Python 3.11 lacks."""
    if not hasattr(typing, "override"):
        typing.override = lambda function: function


def training_on_cpu() -> None:
    """The modules of `megatron.training` ask for CUDA, initialise a device, and write `device="cuda"`."""
    from megatron_ultraep.megatron import cpu

    cpu.install()
    proxy = cpu._TorchOnCpu()
    proxy.cuda = _CudaSeemsThere()
    import megatron.training.arguments
    import megatron.training.initialize
    import megatron.training.training

    names = ("megatron.training", *_CORE_MODULES_OF_TRAINING)
    for name, module in list(sys.modules.items()):
        if name.startswith(names) and getattr(module, "torch", None) is torch:
            module.torch = proxy
    # Building the index of real datasets is C++ compiled on the spot; fusions are warmed up with CUDA tensors.
    megatron.training.initialize._compile_dependencies = lambda: None
    megatron.training.training.set_jit_fusion_options = lambda *args, **kwargs: None


def main(arguments: list[str]) -> None:
    python_312()
    training_on_cpu()
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
