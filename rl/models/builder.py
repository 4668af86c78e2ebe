"""From an architecture to Megatron ``GPTModel`` chunks, under any TP/PP/VPP/EP/DP layout.

The layers of every chunk are stock Megatron modules: Transformer Engine's on GPUs; on CPUs the local ones, with our
packed attention and norm in their two slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ultraep.megatron import compat, cpu, rotary
from megatron_ultraep.megatron.groups import ModelGroups
from rl.models import float32_residual as residual
from rl.models.architecture import Architecture, UnsupportedModel
from rl.models.attention import PackedAttention, RMSNorm, WholeKeyNorm, WholeQueryNorm
from rl.models.float32_head import install as install_float32_head
from rl.models.stages import stage_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Recompute:
    """Which activations are recomputed in backward: ``"none"``, ``"full"`` (layer by layer) or ``"selective"`` modules.

    ``modules`` are Megatron's names, e.g. ``("moe",)``, ``("moe_act", "layernorm")``.
    """

    granularity: str = "none"
    modules: tuple[str, ...] = ()


@dataclass
class BuiltModel:
    """One model on this rank.

    Attributes:
        name: what :class:`~megatron_ultraep.layout.MicroBatchKey` calls it.
        arch: what was built.
        groups: its process groups.
        config: Megatron's ``TransformerConfig``.
        chunks: bare ``GPTModel`` chunks, one per virtual stage.
        dtype: of the parameters.
    """

    name: str
    arch: Architecture
    groups: ModelGroups
    config: Any
    chunks: list[torch.nn.Module]
    dtype: torch.dtype
    wrapped: list[torch.nn.Module] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device

    def run_chunks(self) -> list[torch.nn.Module]:
        """The chunks to call: wrapped in DDP when they are trained."""
        return self.wrapped or self.chunks


def check_layout(arch: Architecture, groups: ModelGroups) -> None:
    """Refuse layouts that this architecture cannot be cut into.

    Raises:
        ValueError: with what to change.
    """
    layout = groups.layout
    wrong = []
    if arch.heads % layout.tp or arch.kv_heads % layout.tp:
        wrong.append(f"tp={layout.tp} must divide {arch.heads} attention heads and {arch.kv_heads} key/value heads")
    if arch.is_moe and arch.experts % layout.ep:
        wrong.append(f"ep={layout.ep} must divide {arch.experts} experts")
    if not arch.is_moe and (layout.ep != 1 or layout.etp != 1):
        wrong.append(f"a dense model has no experts, got ep={layout.ep}, etp={layout.etp}: set them to 1")
    if arch.is_moe and layout.etp not in (1, layout.tp):
        wrong.append(f"etp={layout.etp} is not tested with tp={layout.tp}: use 1 or {layout.tp}")
    if arch.is_moe and layout.tp > 1 and layout.etp == 1 and layout.ep == 1:
        # Megatron-core 0.16 reduces such experts over the dense data-parallel group: their gradients are wrong.
        wrong.append(f"tp={layout.tp} with ep=1 needs etp={layout.tp} (or ep > 1)")
    if layout.tp > 1 and not arch.tensor_parallel:
        wrong.append(f"tp={layout.tp} is not tested with {arch.family}'s attention: set it to 1")
    try:
        stage_layers(arch.layers, layout.pp, layout.vpp)
    except ValueError as error:
        wrong.append(str(error))
    if arch.is_moe and (arch.moe_ffn % layout.etp):
        wrong.append(f"etp={layout.etp} must divide the expert size {arch.moe_ffn}")
    if wrong:
        raise ValueError(f"{arch.family} does not fit {layout}: " + "; ".join(wrong))


def padded_vocabulary(arch: Architecture, tp: int) -> int:
    """Vocabulary rows in the model: padded so that the tensor-parallel ranks divide them."""
    return -(-arch.vocab // tp) * tp


def _transformer_config(
    arch: Architecture,
    groups: ModelGroups,
    dtype: torch.dtype,
    recompute: Recompute,
    te: bool,
    permute_fusion: bool,
    float32_residual: bool,
) -> Any:
    layout = groups.layout
    gpu = torch.cuda.is_available()
    kwargs: dict[str, Any] = {
        "num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "qk_layernorm": arch.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.attention_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "autocast_dtype": dtype,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "use_cpu_initialization": not gpu,
        "perform_initialization": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": te,
        "cross_entropy_loss_fusion": False,
        # Losses carry their global denominator; see megatron.compat.finalize_grads_summed.
        "calculate_per_token_loss": True,
        # Micro-batches of one step differ in length.
        "variable_seq_lengths": layout.pp > 1,
        # Dense models too: the default dispatcher refuses variable lengths.
        "moe_token_dispatcher_type": "alltoall",
        "batch_p2p_comm": not layout.vpp,
        "overlap_p2p_comm": bool(layout.vpp),
        # The interleaved schedule frees a send buffer that gloo still reads.
        "deallocate_pipeline_outputs": gpu or not layout.vpp,
    }
    if float32_residual:
        kwargs |= residual.configured(dtype)
    if layout.vpp:
        kwargs["microbatch_group_size_per_vp_stage"] = layout.pp
    stages = stage_layers(arch.layers, layout.pp, layout.vpp)
    if len(set(stages)) > 1:
        kwargs |= {
            "num_layers_in_first_pipeline_stage": stages[0],
            "num_layers_in_last_pipeline_stage": stages[-1],
        }
    if arch.is_moe:
        kwargs |= {
            "num_moe_experts": arch.experts,
            "moe_ffn_hidden_size": arch.moe_ffn,
            "moe_router_topk": arch.topk,
            "moe_layer_freq": [int(i in arch.moe_layers) for i in range(arch.layers)],
            "moe_router_pre_softmax": not arch.normalize_topk,
            "moe_router_score_function": arch.routing.scores,
            "moe_router_enable_expert_bias": arch.routing.scores == "sigmoid",
            "moe_router_bias_update_rate": 0.0,
            "moe_router_num_groups": arch.routing.groups if arch.routing.groups > 1 else None,
            "moe_router_group_topk": arch.routing.chosen_groups if arch.routing.groups > 1 else None,
            "moe_router_topk_scaling_factor": arch.routing.scale if arch.routing.scale != 1.0 else None,
            "moe_shared_expert_intermediate_size": arch.shared_ffn or None,
            "moe_shared_expert_gate": arch.shared_gate,
            "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": te,
            "moe_permute_fusion": permute_fusion,
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
        }
    if arch.latent:
        kwargs |= {
            "multi_latent_attention": True,
            "q_lora_rank": arch.latent.q_rank,
            "kv_lora_rank": arch.latent.kv_rank,
            "qk_head_dim": arch.latent.plain_dim,
            "qk_pos_emb_head_dim": arch.latent.rotary_dim,
            "v_head_dim": arch.latent.value_dim,
            "rope_type": "yarn" if arch.yarn else "rope",
            "rotary_base": arch.rope_theta,
        }
        if arch.yarn:
            kwargs |= {
                "rotary_scaling_factor": arch.yarn.factor,
                "original_max_position_embeddings": arch.yarn.original_positions,
                "beta_fast": arch.yarn.beta_fast,
                "beta_slow": arch.yarn.beta_slow,
                "mscale": arch.yarn.scale,
                "mscale_all_dim": arch.yarn.scale_all,
            }
    if recompute.granularity == "full":
        kwargs |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute.granularity == "selective":
        kwargs |= {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules or ("core_attn",))}
    elif recompute.granularity != "none":
        raise ValueError(f"expected recompute 'none', 'full' or 'selective', got {recompute.granularity!r}")
    return compat.transformer_config(**kwargs)


def _layer_specs(
    arch: Architecture, layer_indices: Sequence[int], te: bool, dtype: torch.dtype, float32_residual: bool
) -> list[Any]:
    specs = []
    for index in layer_indices:
        spec = compat.layer_spec(
            moe=index in arch.moe_layers,
            experts=arch.experts,
            qk_layernorm=arch.qk_norm,
            transformer_engine=te,
            multi_latent_attention=arch.latent is not None,
        )
        attention = spec.submodules.self_attention.submodules
        if not te:
            spec.submodules.input_layernorm = RMSNorm
            spec.submodules.pre_mlp_layernorm = RMSNorm
            attention.core_attention = PackedAttention
            if arch.qk_norm:
                attention.q_layernorm = RMSNorm
                setattr(attention, "kv_layernorm" if arch.latent else "k_layernorm", RMSNorm)
        elif dtype == torch.float32:  # Transformer Engine's attention kernels take 16-bit packed sequences only
            attention.core_attention = PackedAttention
        if arch.qk_norm_whole:
            attention.q_layernorm = WholeQueryNorm
            attention.k_layernorm = WholeKeyNorm
        if float32_residual:
            residual.use_in_layer(spec, moe=index in arch.moe_layers, transformer_engine=te)
        specs.append(spec)
    return specs


def chunk_layers(arch: Architecture, groups: ModelGroups, vp_stage: int | None) -> range:
    """0-based layers of one chunk; chunk ``v`` of stage ``p`` is part ``v*pp + p`` of ``stage_layers``."""
    sizes = stage_layers(arch.layers, groups.layout.pp, groups.layout.vpp)
    part = (vp_stage or 0) * groups.layout.pp + groups.coordinates["pp"]
    start = sum(sizes[:part])
    return range(start, start + sizes[part])


def build_model(
    arch: Architecture,
    groups: ModelGroups,
    *,
    name: str = "actor",
    dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
    seed: int = 0,
    permute_fusion: bool = False,
    float32_head: bool = False,
    float32_residual: bool = False,
) -> BuiltModel:
    """Build this rank's chunks with uninitialised weights; load weights before using them.

    Args:
        arch: what to build.
        groups: process groups of the model.
        name: of the model in micro-batch keys.
        dtype: of the parameters: float32, bfloat16 or float64 (CPU only).
        recompute: activation recomputation.
        seed: of Megatron's random-number tracker.
        permute_fusion: Transformer Engine's kernels permute tokens; needs Transformer Engine.
        float32_head: logits in float32 where ``dtype`` is 16-bit; see ``rl.models.float32_head``.
        float32_residual: the residual stream in float32 where ``dtype`` is 16-bit; see ``rl.models.float32_residual``.

    Raises:
        ValueError: a layout that does not fit, with what to change.
        UnsupportedModel: a combination that no test covers.
    """
    check_layout(arch, groups)
    cpu.install()
    te = compat.has_transformer_engine()
    if torch.cuda.is_available() and not te:
        raise UnsupportedModel(
            "on GPUs the model is built from Transformer Engine's modules: install transformer-engine"
        )
    if te and dtype == torch.float64:
        raise UnsupportedModel("Transformer Engine has no float64: set model.dtype to bfloat16 or float32")
    compat.ensure_scratch_buffer()
    rotary.install()
    where = groups.coordinates
    compat.seed_rng(seed, tp_rank=where["tp"], ep_rank=where["ep"], etp_rank=where["etp"])
    wide = float32_residual and bool(residual.configured(dtype))
    config = _transformer_config(arch, groups, dtype, recompute or Recompute(), te, permute_fusion, wide)
    final_norm = compat.transformer_engine_norm() if te else RMSNorm
    if wide:
        final_norm = residual.Float32InputNorm
    stages = list(range(groups.layout.vpp)) if groups.layout.vpp else [None]
    chunks = []
    for stage in stages:
        layers = chunk_layers(arch, groups, stage)
        chunk = compat.gpt_model(
            config=config,
            transformer_layer_spec=compat.block_spec(_layer_specs(arch, layers, te, dtype, wide), final_norm),
            vocab_size=padded_vocabulary(arch, groups.layout.tp),
            max_sequence_length=arch.max_positions,
            pre_process=layers.start == 0,
            post_process=layers.stop == arch.layers,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            rotary_percent=arch.rotary_fraction,
            rotary_base=arch.rope_theta,
            pg_collection=groups.collection,
            vp_stage=stage,
        )
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        if float32_head:
            install_float32_head(chunk, dtype)
        chunk.vp_stage = stage
        chunks.append(chunk)
    _freeze_router_biases(config, chunks)
    return BuiltModel(name, arch, groups, config, chunks, dtype)


def _freeze_router_biases(config: Any, chunks: list[torch.nn.Module]) -> None:
    """Routers keep their biases, and nobody counts tokens or updates biases after a step."""
    config.moe_router_enable_expert_bias = False  # the gradients' finalisation asks the config
    for chunk in chunks:
        for module in chunk.modules():
            if getattr(module, "enable_expert_bias", False):
                module.enable_expert_bias = False  # type: ignore[assignment]
