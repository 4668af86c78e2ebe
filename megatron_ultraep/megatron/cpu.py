"""Makes stock Megatron-core run on machines without CUDA, over gloo.

Each function below replaces one thing that Megatron-core takes from CUDA without asking, and says what breaks without
it. Tried on 0.16.1 and 0.19.2. :func:`install` does nothing where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import types
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_installed = False


class _NullStream:
    """Stands for a stream or an event: on a CPU everything has happened when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _NullStream:
        return self

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NullStream)

    def __hash__(self) -> int:
        return 0


def _current_device() -> None:
    """``torch.cuda.current_device()`` names a device in about 70 places: DDP buffers, router, mappings, p2p, rope."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]


def _streams() -> None:
    """Streams and events order copies in the all-to-all dispatcher."""
    stream = _NullStream()
    torch.cuda.Stream = _NullStream  # type: ignore[misc, assignment]
    torch.cuda.Event = _NullStream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda *a, **k: stream  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda *a, **k: stream  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda *a, **k: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.synchronize = lambda *a, **k: None


class _TorchOnCpu(types.ModuleType):
    """``torch`` as one Megatron module sees it: factories that are asked for ``device="cuda"`` answer on the CPU."""

    _FACTORIES = ("zeros", "ones", "tensor", "empty", "arange", "full", "rand", "randn")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self._FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    @staticmethod
    def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if isinstance(device, int) or str(device).startswith("cuda"):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return make

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_LITERAL_CUDA_MODULES = (
    "pipeline_parallel.schedules",
    "pipeline_parallel.utils",
    "pipeline_parallel.p2p_communication",
    "optimizer.clip_grads",
    "optimizer.optimizer",
    "optimizer.grad_scaler",
    "transformer.utils",
    "transformer.moe.moe_utils",
    "transformer.moe.moe_logging",
    "distributed.param_and_grad_buffer",
    "distributed.finalize_model_grads",
    "tensor_parallel.data",
    "utils",
)


def _literal_cuda() -> None:
    """These modules write ``device="cuda"``: schedules, optimizers, gradient clipping."""
    proxy = _TorchOnCpu()
    for name in _LITERAL_CUDA_MODULES:
        try:
            module = importlib.import_module(f"megatron.core.{name}")
        except ModuleNotFoundError:
            continue  # moe_logging exists from 0.17 on
        module.torch = proxy  # type: ignore[attr-defined]


def _random_state() -> None:
    """The random-number tracker saves and restores CUDA generator states (dropout, recomputation)."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment, return-value]
    # It warns that the CPU generator is not part of the tracker, which here it is.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _tensor_type() -> None:
    """Optimizers and gradient clipping sort parameters by ``tensor.type() == "torch.cuda.FloatTensor"``."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, dtype, *args, **kwargs)
        if dtype is None and isinstance(answer, str) and ".cuda." not in answer:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _tensor_cuda() -> None:
    """Tied embeddings across pipeline stages are moved with ``Tensor.cuda()``."""
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign, assignment]


def _all_to_all_splits() -> None:
    """The dispatcher moves its splits to the host as numpy arrays; from a CPU tensor it would hand over the tensor."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for module in (moe_utils, token_dispatcher):
        if not hasattr(module, "maybe_move_tensor_to_cpu"):
            raise RuntimeError(f"{module.__name__} has no maybe_move_tensor_to_cpu: this Megatron-core was not tried")
        module.maybe_move_tensor_to_cpu = to_host


def _names_of_transformer_engine() -> None:
    """0.16.1 names two Transformer Engine symbols that exist only when TE does: any MoE, and ``moe_act``."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None)
        random.activation_recompute_forward = lambda **k: contextlib.nullcontext()
        random.fp8_autocast = lambda **k: contextlib.nullcontext()


def _adam_step_in_checkpoints() -> None:
    """torch's Adam keeps a ``step`` per parameter, which the distributed optimizer's checkpoint lacks: KeyError."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state:
                tensors = dict(tensors, step=state["step"].clone())
        return original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def install() -> bool:
    """Install all of the above once per process; call it before models are built.

    Returns:
        True when this process now runs Megatron on the CPU, False where CUDA is available.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        for shim in (
            _current_device,
            _streams,
            _literal_cuda,
            _random_state,
            _tensor_type,
            _tensor_cuda,
            _all_to_all_splits,
            _names_of_transformer_engine,
            _adam_step_in_checkpoints,
        ):
            shim()
        _installed = True
    return True
