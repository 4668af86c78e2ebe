"""How one vLLM engine is made: its arguments, and what is done to it before the first request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl.rollout import compat, model_files, residual
from rl.rollout.config import EngineConfig, decodes_with_graphs, graph_sizes
from rl.rollout.ranks import call_ranks, forget_shared_memory, shared_memory_names, unlink_once


def engine_arguments(config: EngineConfig) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs``."""
    latent = model_files.has_latent_attention(Path(config.model_path))
    graphs = decodes_with_graphs(config.cuda_graphs, device=config.device, latent_attention=latent)
    arguments: dict[str, Any] = {
        "model": config.model_path,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "block_size": config.block_size,
        "tensor_parallel_size": config.tensor_parallel,
        "enforce_eager": not graphs,
        "seed": config.seed,
        "enable_prefix_caching": True,
        # Steps must be settled when weights change between them.
        "async_scheduling": False,
        # Log-probs of the policy that sampled, not of the untempered one.
        "logprobs_mode": "processed_logprobs",
        # A checkpoint's generation_config.json would bring its own top-k and temperature.
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "worker_extension_cls": "rl.rollout.weights.WeightUpdateExtension",
    }
    if config.float32_residual:
        arguments["additional_config"] = {residual.SETTING: True}
    if config.sleep_mode:
        arguments["enable_sleep_mode"] = True
    if graphs:
        # Without the compiler, whose minute a change of the model's code costs again.
        arguments["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": graph_sizes(config.max_num_seqs),
        }
    if config.max_num_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = config.max_num_batched_tokens
    if config.capture_routes and model_files.is_moe(Path(config.model_path)):
        arguments["enable_return_routed_experts"] = True
    if config.tensor_parallel > 1:
        # Children of this process, on its GPUs; inside a Ray actor vLLM might choose Ray.
        arguments["distributed_executor_backend"] = "mp"
    if config.device == "cuda":
        # Only demanded free at the start: the key-value cache has a size of its own, and a trainer may be there.
        arguments["gpu_memory_utilization"] = 0.01
    if config.device == "cpu":
        arguments["worker_cls"] = "rl.rollout.cpu_worker.RolloutCPUWorker"
    return arguments


def build(config: EngineConfig) -> Any:
    """Make the engine, on the thread that will step it."""
    from rl.rollout.vllm_plugin import register

    register()
    if config.tensor_parallel > 1:
        unlink_once()
    vllm = compat.engine_api()
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**engine_arguments(config)))
    if config.tensor_parallel > 1:
        for names in (shared_memory_names(), *call_ranks(engine, "ultraep_settle_in")):
            forget_shared_memory(names)
    if config.float32_residual:
        call_ranks(engine, residual.check)
    if config.float32_head:
        from rl.rollout import head

        call_ranks(engine, head.install)
    return engine
