"""What Megatron's stock pipeline schedules are made of, one micro-batch and one stage at a time.

The fused executor is built from these, so that loss functions, gradient scaling, DistributedDataParallel's hooks and
the reduction at the end behave as in a stock schedule. Tried on 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch


def forward_step(
    step: Callable[..., Any],
    data: Any,
    chunk: torch.nn.Module,
    received: torch.Tensor | None,
    kept: list[Any],
    config: Any,
    *,
    microbatch: int,
    microbatches: int,
    is_last_stage: bool,
    forward_only: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch through one stage: (output, on the last stage the loss; its tokens, int scalar).

    Args:
        step, data: Megatron's ``forward_step_func`` and its data iterator.
        received: hidden states of the stage before, None on the first.
        kept: gets what the loss function keeps, on the last stage.
    """
    from megatron.core.pipeline_parallel import schedules

    output, tokens = schedules.forward_step(
        step,
        data,
        chunk,
        microbatches,
        received,
        kept,
        config,
        cp_group_size=1,
        collect_non_loss_data=forward_only,
        is_first_microbatch=microbatch == 0,
        current_microbatch=microbatch,
        is_last_stage=is_last_stage,
    )
    return output, tokens


def backward_step(
    received: torch.Tensor | None, output: torch.Tensor, gradient: torch.Tensor | None, config: Any
) -> torch.Tensor | None:
    """The backward of :func:`forward_step`: the gradient for the stage before, None on the first."""
    from megatron.core.pipeline_parallel import schedules

    old = "model_type" in inspect.signature(schedules.backward_step).parameters  # 0.16, which does not read it
    found: torch.Tensor | None = schedules.backward_step(received, output, gradient, *([None] if old else []), config)
    return found


def free_output(output: torch.Tensor, config: Any) -> None:
    """Free the data of an output that was handed over, if the configuration says so; its graph stays."""
    from megatron.core.pipeline_parallel import schedules

    schedules.deallocate_output_tensor(output, config.deallocate_pipeline_outputs)


def _loss_scalers() -> list[Any]:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    return [MoEAuxLossAutoScaler, MTPLossAutoScaler]


def auxiliary_loss_scales() -> list[torch.Tensor | None]:
    """Scales of auxiliary losses: Megatron has one of each per process, set in forward and read in backward."""
    scales = [scaler.main_loss_backward_scale for scaler in _loss_scalers()]
    return [None if scale is None else scale.clone() for scale in scales]


def set_auxiliary_loss_scales(scales: Sequence[torch.Tensor | None]) -> None:
    """Before a backward that may follow another model's forward."""
    for scaler, scale in zip(_loss_scalers(), scales, strict=True):
        scaler.main_loss_backward_scale = None if scale is None else scale.clone()


def finalize_gradients(chunk: torch.nn.Module, tokens: torch.Tensor, groups: Any, config: Any) -> None:
    """What the stock schedules do last, if the configuration says so: reduce gradients, tied embeddings' too.

    Args:
        tokens: sum of what :func:`forward_step` gave, int scalar.
        groups: the model's ``ProcessGroupCollection``.
    """
    if config.finalize_model_grads_func is None:
        return
    config.finalize_model_grads_func([chunk], tokens if config.calculate_per_token_loss else None, pg_collection=groups)


def reasons_against_fusion(config: Any) -> list[str]:
    """What of a model's configuration only the stock schedules do; each with what to change."""
    wrong = []
    if config.virtual_pipeline_model_parallel_size:
        wrong.append("virtual pipeline stages (vpp) have no place in a fused schedule: unset vpp")
    for name in (
        "overlap_moe_expert_parallel_comm",
        "defer_embedding_wgrad_compute",
        "fine_grained_activation_offloading",
        "moe_paged_stash",
    ):
        if getattr(config, name, False):
            wrong.append(f"{name} is done by the stock schedules only: turn it off")
    if getattr(config, "num_microbatches_with_partial_activation_checkpoints", None) is not None:
        wrong.append("num_microbatches_with_partial_activation_checkpoints follows the order of 1F1B: unset it")
    if getattr(config, "cuda_graph_impl", "none") == "local":
        wrong.append("CUDA graphs are captured by the stock schedules only: set cuda_graph_impl to 'none'")
    if config.context_parallel_size != 1:
        wrong.append(f"context parallelism is not supported, got {config.context_parallel_size}: set it to 1")
    return wrong
