"""What balancing is tested with, and what it refuses: one table, read by ``attach`` and by ``docs/support.md``.

A combination that no test covers is refused with a sentence that says what to change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultraep.megatron import compat


class Unsupported(ValueError):
    """This model, or this Megatron-core, cannot be balanced; the message says why and what to change."""


@dataclass(frozen=True)
class Tested:
    """A feature that balancing works with.

    Attributes:
        feature: as users call it.
        test: pytest id, or the script, that shows it.
    """

    feature: str
    test: str


@dataclass(frozen=True)
class Refusal:
    """A feature that balancing refuses.

    Attributes:
        feature: as users call it.
        found: whether a layer has it.
        sentence: why, and what to change.
    """

    feature: str
    found: Callable[[Any], bool]
    sentence: str


def _set(*fields: str) -> Callable[[Any], bool]:
    """Whether one of these fields of the layer's configuration is set; fields a version lacks are not."""
    return lambda layer: any(bool(getattr(layer.config, name, None)) for name in fields)


def _is(field: str, *plain: Any) -> Callable[[Any], bool]:
    """Whether a field has a value other than the plain ones; a field that a version lacks has not."""
    return lambda layer: getattr(layer.config, field, plain[0]) not in plain


def _recomputes_or_offloads_inside(layer: Any) -> bool:
    config = layer.config
    return bool(
        getattr(config, "fine_grained_activation_offloading", False) or getattr(config, "cpu_offloading", False)
    )


def _unknown_experts(layer: Any) -> bool:
    known = tuple(c for c in (compat.sequential_mlp_class(), compat.grouped_mlp_class()) if c is not None)
    return not isinstance(layer.experts, known)


def _of_transformer_engine(layer: Any) -> bool:
    """Whether the experts' linear layers are Transformer Engine's."""
    return any(hasattr(module, "fuse_wgrad_accumulation") for module in layer.experts.modules())


def _local_fusion(layer: Any) -> bool:
    return bool(layer.config.gradient_accumulation_fusion) and not _of_transformer_engine(layer)


def _fused_with_bias(layer: Any) -> bool:
    fused = any(getattr(module, "fuse_wgrad_accumulation", False) for module in layer.experts.modules())
    return fused and bool(layer.config.add_bias_linear)


def _frozen_in_part(layer: Any) -> bool:
    return len({parameter.requires_grad for parameter in layer.experts.parameters()}) > 1


def _sequential_of_transformer_engine(layer: Any) -> bool:
    return isinstance(layer.experts, compat.sequential_mlp_class()) and _of_transformer_engine(layer)


def _overridden(layer: Any) -> bool:
    stock = compat.moe_layer_class()
    return any(
        getattr(type(layer), name) is not getattr(stock, name)
        for name in ("preprocess", "routed_experts_compute", "postprocess")
    )


_LAYER = "tests/megatron_ultraep/megatron/test_attach.py::test_layer_equals_stock"
_ATTACH = "tests/megatron_ultraep/megatron/test_attach.py"
_TRAINING = "tests/rl/training/test_balancing.py::test_training_equals_stock"
_GPU = "scripts/check_balance.py"

TESTED: tuple[Tested, ...] = (
    Tested(
        "Megatron-core 0.16.1 and 0.19.2, all-to-all dispatcher, SequentialMLP experts", f"{_LAYER}[top-2-collective]"
    ),
    Tested("TEGroupedMLP experts: one grouped GEMM over home experts and slots (2 GPUs, 0.19.2)", _GPU),
    Tested("2 and 4 expert-parallel ranks", f"{_LAYER}[4 ranks-collective]"),
    Tested("top-k 1", f"{_LAYER}[top-1-collective]"),
    Tested("top-k up to 8", f"{_LAYER}[top-8 of 16-collective]"),
    Tested("float64, in training too", f"{_TRAINING}[ep2]"),
    Tested("float32", f"{_LAYER}[float32-collective]"),
    Tested("bfloat16", f"{_LAYER}[bfloat16-collective]"),
    Tested("ranks with different numbers of tokens", f"{_LAYER}[uneven tokens-collective]"),
    Tested("ranks without tokens", f"{_LAYER}[no tokens on three ranks-collective]"),
    Tested("experts without tokens", f"{_LAYER}[experts without tokens-collective]"),
    Tested("shared experts", f"{_LAYER}[shared experts-collective]"),
    Tested("gated shared experts", f"{_LAYER}[gated shared experts-collective]"),
    Tested("experts with bias", f"{_LAYER}[experts with bias-collective]"),
    Tested("experts without gated linear unit", f"{_LAYER}[no gated linear unit-collective]"),
    Tested(
        "group-limited routing, sigmoid scores, expert bias",
        f"{_LAYER}[group-limited, sigmoid, expert bias-collective]",
    ),
    Tested("auxiliary loss", f"{_LAYER}[auxiliary loss-collective]"),
    Tested("sequence auxiliary loss", f"{_LAYER}[sequence auxiliary loss-collective]"),
    Tested("global auxiliary loss", f"{_LAYER}[global auxiliary loss-collective]"),
    Tested("z-loss", f"{_LAYER}[z-loss-collective]"),
    Tested("frozen experts", f"{_ATTACH}::test_frozen_experts"),
    Tested("experts that live elsewhere than Megatron puts them", f"{_ATTACH}::test_permuted_homes"),
    Tested("tensor parallelism with sequence parallelism", f"{_TRAINING}[tp2xep2]"),
    Tested("pipeline parallelism, 1F1B", f"{_TRAINING}[pp2xep2]"),
    Tested("interleaved pipeline (VPP), overlapped gradient reduction", f"{_TRAINING}[pp2xvpp2xep2 overlapped]"),
    Tested("expert data parallelism, no_sync, overlapped gradient reduction", f"{_TRAINING}[ep2xdp2 overlapped]"),
    Tested("full recomputation", f"{_TRAINING}[recompute full]"),
    Tested("selective recomputation: moe", f"{_TRAINING}[recompute moe]"),
    Tested("selective recomputation: layernorm; moe_act (GPU)", _GPU),
    Tested(
        "distributed optimizer, overlapped parameter gather, clipping",
        f"{_TRAINING}[ep2xdp2, distributed optimizer, overlapped]",
    ),
    Tested("fused weight-gradient accumulation (Transformer Engine, 2 GPUs)", _GPU),
    Tested(
        "fused accumulation where home parameters enter the experts themselves (CPUs, with made-up kernels)",
        "tests/megatron_ultraep/runtime/test_layer.py::test_gradients[fused, home parameters themselves]",
    ),
    Tested("fused permutation (Transformer Engine, 2 GPUs)", _GPU),
    Tested(
        "symmetric memory and planning on the device: all layers above (one node on 2 GPUs; several on CPUs alone)",
        f"{_LAYER}[top-2-symmetric]",
    ),
    Tested("routing replay", f"{_TRAINING}[distributed optimizer, overlapped]"),
    Tested(
        "two sets of slots, weights placed a layer ahead (CPUs)",
        "tests/rl/training/test_foresight.py::test_training_equals_stock[ep2, two sets of slots, symmetric]",
    ),
    Tested("plans made ahead from routes", "tests/rl/training/test_foresight.py::test_training_equals_stock"),
    Tested(
        "experts that change their homes between steps, plain and distributed optimizer",
        "tests/rl/training/test_reorder.py::test_training_and_resuming_equal_stock",
    ),
    Tested(
        "checkpoints written with and without balancing load either way",
        "tests/rl/training/test_balancing.py::test_replicas_are_nobodys_parameters",
    ),
    Tested("jobs on megatron.training 0.19.2", "tests/megatron_ultraep/megatron/test_launch.py"),
)

REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "expert tensor parallelism",
        lambda layer: layer.token_dispatcher.tp_size > 1,
        "experts are cut over tensor-parallel ranks: set expert_tensor_parallel_size to 1",
    ),
    Refusal(
        "allgather and flex dispatchers",
        _is("moe_token_dispatcher_type", "alltoall"),
        "tokens must be dispatched by all-to-all: set moe_token_dispatcher_type to 'alltoall'",
    ),
    Refusal(
        "capacity factor, token drop, padding to capacity",
        lambda layer: (
            layer.config.moe_expert_capacity_factor is not None
            or layer.config.moe_pad_expert_input_to_capacity
            or bool(getattr(layer.config, "moe_expert_rank_capacity_factor", None))
        ),
        "dropping or padding tokens is the other way to balance: unset the capacity factor",
    ),
    Refusal(
        "fp8 and fp4",
        lambda layer: (
            bool(layer.config.fp8 or layer.config.fp4 or getattr(layer.config, "fp8_param", False))
            or bool(
                getattr(layer.config, "moe_router_padding_for_quantization", False)
                or getattr(layer.config, "moe_router_padding_for_fp8", False)
            )
        ),
        "replicas carry weights without scales: train experts in bf16",
    ),
    Refusal(
        "CUDA graphs",
        lambda layer: (
            layer.config.cuda_graph_impl != "none"
            or bool(
                getattr(layer.config, "enable_cuda_graph", False) or getattr(layer.config, "external_cuda_graph", False)
            )
        ),
        "a plan changes with every micro-batch, a graph does not: set cuda_graph_impl to 'none'",
    ),
    Refusal(
        "delayed weight gradients and overlapped expert-parallel communication",
        _set("delay_wgrad_compute", "overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
        "weight gradients must exist when the experts' backward ends: turn off delay_wgrad_compute, "
        "overlap_moe_expert_parallel_comm and overlap_dispatch_backward_with_experts_wgrad",
    ),
    Refusal(
        "shared experts overlapped with dispatch",
        _set("moe_shared_expert_overlap"),
        "moe_shared_expert_overlap was not tested: turn it off",
    ),
    Refusal("latent experts", _set("moe_latent_size"), "moe_latent_size was not tested: unset it"),
    Refusal(
        "router scores applied to the experts' input",
        _set("moe_apply_probs_on_input"),
        "moe_apply_probs_on_input was not tested: turn it off",
    ),
    Refusal(
        "one grouped weight tensor, fused expert operators, paged stash",
        _set(
            "moe_single_grouped_weight",
            "moe_single_grouped_bias",
            "use_transformer_engine_op_fuser",
            "moe_paged_stash",
        ),
        "each expert must have weights of its own: turn off moe_single_grouped_weight, moe_single_grouped_bias, "
        "use_transformer_engine_op_fuser and moe_paged_stash",
    ),
    Refusal(
        "activation offloading", _recomputes_or_offloads_inside, "activation offloading was not tested: turn it off"
    ),
    Refusal(
        "inference-optimized layers",
        _is("transformer_impl", "transformer_engine", "local"),
        "the inference dispatcher has no backward: set transformer_impl to 'transformer_engine'",
    ),
    Refusal(
        "expert modules other than SequentialMLP and TEGroupedMLP",
        _unknown_experts,
        "use SequentialMLP or TEGroupedMLP experts (moe_grouped_gemm with Transformer Engine, no legacy grouped GEMM)",
    ),
    Refusal(
        "SequentialMLP of Transformer Engine's linear layers",
        _sequential_of_transformer_engine,
        "with Transformer Engine experts are tested in one grouped GEMM: set moe_grouped_gemm",
    ),
    Refusal(
        "gradient accumulation fusion in local linear layers",
        _local_fusion,
        "gradient_accumulation_fusion is tested with Transformer Engine alone: turn it off",
    ),
    Refusal(
        "fused weight gradients of experts with bias",
        _fused_with_bias,
        "kernels that accumulate weight gradients leave those of biases to others: turn off "
        "gradient_accumulation_fusion or add_bias_linear",
    ),
    Refusal(
        "experts frozen in part",
        _frozen_in_part,
        "some parameters of the experts are frozen and some are not: train all or none",
    ),
    Refusal(
        "multi-token prediction layers",
        lambda layer: bool(getattr(layer, "is_mtp_layer", False)),
        "MoE layers of multi-token prediction were not tested: set mtp_num_layers to 0",
    ),
    Refusal(
        "Megatron-FSDP",
        lambda layer: any(hasattr(p, "__fsdp_param__") for p in layer.experts.parameters()),
        "expert weights must lie whole on their rank: use DistributedDataParallel with the distributed optimizer",
    ),
    Refusal(
        "subclasses of MoELayer with stages of their own",
        _overridden,
        "preprocess, routed_experts_compute or postprocess is overridden in a subclass, which balancing would override",
    ),
    Refusal(
        "one expert-parallel rank",
        lambda layer: layer.token_dispatcher.ep_size < 2,
        "there is nothing to balance: set expert_model_parallel_size to 2 or more",
    ),
)


def refusals(layer: Any) -> list[str]:
    """Why this MoE layer cannot be balanced; empty when it can."""
    return [refusal.sentence for refusal in REFUSED if refusal.found(layer)]


def check_version(*, allow_untested: bool) -> str | None:
    """A warning for an untested Megatron-core that was allowed.

    Raises:
        Unsupported: an untested version that was not.
    """
    version = compat.version()
    if version in compat.TESTED_VERSIONS:
        return None
    found = f"Megatron-core {version} was not tested with balancing, {' and '.join(compat.TESTED_VERSIONS)} were"
    if allow_untested:
        return found
    raise Unsupported(found + ": install one of them, or set allow_untested (--ultraep-allow-untested)")


def table() -> str:
    """The table of ``docs/support.md``, in Markdown."""
    lines = ["| balancing works with | shown by |", "|---|---|"]
    lines += [f"| {tested.feature} | `{tested.test}` |" for tested in TESTED]
    lines += ["", "| balancing refuses | because |", "|---|---|"]
    lines += [f"| {refusal.feature} | {refusal.sentence} |" for refusal in REFUSED]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- balancing: begin -->\n", "<!-- balancing: end -->\n"


def write_table(page: Path) -> None:
    """Put the table between the two marks of a page."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_table(Path(name))
    if not sys.argv[1:]:
        print(table(), end="")
