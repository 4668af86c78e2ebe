"""Settings of rollout engines and of sampling; free of vLLM, Ray and torch, so that drivers can build them."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EngineConfig:
    """One vLLM engine.

    Attributes:
        model_path: Hugging Face directory (config, safetensors, tokenizer) that the engine starts from.
        dtype: type of weights and activations, "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        max_model_len: most tokens of one sample, prompt and response together.
        max_num_seqs: samples computed at the same time.
        max_num_batched_tokens: most tokens of one engine step; None: vLLM's choice.
        kv_cache_memory_bytes: size of the key-value cache, of each rank.
        block_size: tokens per key-value block; the CPU backend wants a multiple of 32.
        tensor_parallel: tensor-parallel ranks of the engine, on one machine; above 1, each is a process of its own.
        cuda_graphs: decoding steps are replayed as CUDA graphs, nothing is compiled; GPUs only.
        float32_head: a 16-bit model's logits are computed in float32, as the trainer's; see ``rl.models.float32_head``.
        float32_residual: a 16-bit model's residual stream is in float32, as the trainer's; see ``rl.rollout.residual``.
        seed: of whatever has no seed of its own; requests always have one.
        sleep_mode: the engine can free its device memory in between (colocated with a trainer); CUDA only, vLLM
            refuses it on CPU.
        capture_routes: return the experts of every token (ignored for dense models).
        max_regenerations: how often a refused sample is generated again before it is handed back as refused.
        initial_version: weight version of what is in ``model_path``.
        start_timeout_s, generate_timeout_s, update_timeout_s, stop_timeout_s: limits of the waits, in seconds.
            ``generate_timeout_s`` is for one group of samples.
        allow_untested: accept vLLM versions that nothing here was tried with.
    """

    model_path: str
    dtype: str = "float32"
    device: Device = "cpu"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int = 256 << 20
    block_size: int = 32
    tensor_parallel: int = 1
    cuda_graphs: bool = False
    float32_head: bool = False
    float32_residual: bool = False
    seed: int = 0
    sleep_mode: bool = False
    capture_routes: bool = True
    max_regenerations: int = 2
    initial_version: int = 0
    start_timeout_s: float = 300.0
    generate_timeout_s: float = 900.0
    update_timeout_s: float = 300.0
    stop_timeout_s: float = 30.0
    allow_untested: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.device not in ("cpu", "cuda"):
            problems.append(f'device must be "cpu" or "cuda", got {self.device!r}')
        if self.device == "cpu" and self.block_size % 32:
            problems.append(f"block_size must be a multiple of 32 on the CPU backend, got {self.block_size}")
        if self.cuda_graphs and self.device != "cuda":
            problems.append("cuda_graphs must be false on CPU")
        for name in ("float32_head", "float32_residual"):
            if getattr(self, name) and self.dtype == "float32":
                problems.append(f"{name} is for 16-bit models, got dtype float32: set it to false")
        if self.sleep_mode and self.device != "cuda":
            problems.append("sleep_mode must be false on CPU, where vLLM has none")
        if self.tensor_parallel < 1:
            problems.append(f"tensor_parallel must be >= 1, got {self.tensor_parallel}")
        if self.sleep_mode and self.tensor_parallel > 1:
            problems.append(
                f"sleep_mode must be false for an engine of several ranks, which was not tried, got tensor_parallel "
                f"{self.tensor_parallel}"
            )
        if not (Path(self.model_path) / "config.json").is_file():
            problems.append(f"model_path must be a Hugging Face directory with a config.json, got {self.model_path}")
        for name in ("start_timeout_s", "generate_timeout_s", "update_timeout_s", "stop_timeout_s"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} must be > 0 seconds, got {getattr(self, name)}")
        for name in ("max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "block_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.max_regenerations < 0:
            problems.append(f"max_regenerations must be >= 0, got {self.max_regenerations}")
        if problems:
            raise ValueError("engine configuration: " + "; ".join(problems))


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_tokens: most response tokens; the response also ends where ``max_model_len`` is reached.
        temperature: logits are divided by it; the returned log-probs include it. 0 is greedy, for evaluation.
        top_p, top_k: must stay 1 and 0, see ``__post_init__``.
        stop_token_ids: response ends with one of these, besides the model's own end tokens.
        ignore_eos: do not end at the model's end tokens (benchmarks and tests).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_p != 1.0 or self.top_k > 0:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k} truncate the distribution that samples are drawn from, while "
                "training computes log-probs over the whole vocabulary, so the two would differ. Set top_p=1 and "
                "top_k=0; to allow truncation, training must first renormalise over the tokens that were kept."
            )


def engine_environment(device: Device = "cpu") -> dict[str, str]:
    """Environment of a process that runs an engine; set it before vLLM and torch are imported.

    On CPU: one process per engine instead of three, no pinning of every worker to core 0, and no compiler in the
    first request (vLLM compiles a sampler function even in eager mode).
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Its warnings are about choices made here on purpose.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # Of ranks that are processes: they inherit no threads, and one that does not end is ended soon.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Prefix-cache keys hash with Python's seed; engines that share keys must share it.
        "PYTHONHASHSEED": "0",
    }
    if device == "cpu":
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            # vLLM's CPU kernels of latent attention hold one size (512 + 64) and no prefix cache, which routes need:
            # keys and values of every head are cached instead.
            "VLLM_MLA_DISABLE": "1",
        }
    return environment


def decodes_with_graphs(cuda_graphs: bool, *, device: Device, latent_attention: bool) -> bool:
    """Whether an engine replays its decoding steps as CUDA graphs.

    Latent attention absorbs matrices into new ones after every load of weights, which graphs would not see.

    Args:
        cuda_graphs: whether they are wanted.
        device: that the engine runs on.
        latent_attention: of its model (DeepSeek's MLA).
    """
    return cuda_graphs and device == "cuda" and not latent_attention


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of running samples that decoding steps are captured for; a step is padded to the next.

    Powers of two up to 32, then steps of at most a third, so that padding costs little and capturing takes seconds.
    """
    sizes = {size for power in range(5, 14) for size in (2**power, 3 * 2 ** (power - 1))} | {1, 2, 4, 8, 16}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def derive_seed(seed: int, sample_id: str, attempt: int = 0) -> int:
    """A request's own seed in ``[0, 2**31)``, the same on every machine for the same (seed, sample, attempt)."""
    digest = hashlib.blake2b(f"{seed}|{sample_id}|{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
