"""Every name of Megatron-core that we use and that Megatron may rename, and every difference between its versions.

Nothing else in the project imports from ``megatron.core`` except ``megatron.cpu``, whose subject is Megatron's
internals on machines without CUDA. Tested versions: see :data:`TESTED_VERSIONS`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

# The newest release for Python 3.11, and the newest release.
TESTED_VERSIONS = ("0.16.1", "0.19.2")


def version() -> str:
    """Version of the Megatron-core that ``import megatron.core`` finds (PYTHONPATH wins over site-packages)."""
    from megatron.core.package_info import __version__

    # From 0.19 on it appends "+<commit>" of whatever git repository it lies in.
    return str(__version__).split("+")[0]


def has_transformer_engine() -> bool:
    """Whether Megatron's Transformer Engine modules can be built here: TE imports and there is a CUDA device."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def transformer_config(**kwargs: Any) -> Any:
    """A ``TransformerConfig`` from the fields that the installed version knows.

    Raises:
        TypeError: a field that this version does not have, by name.
    """
    from megatron.core.transformer import transformer_config as configs

    latent = kwargs.get("multi_latent_attention", False)
    config_class = configs.MLATransformerConfig if latent else configs.TransformerConfig
    known = set(inspect.signature(config_class).parameters)
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(
            f"Megatron-core {version()} has no TransformerConfig fields {unknown}; tested: {TESTED_VERSIONS}"
        )
    return config_class(**kwargs)


def layer_spec(
    *,
    moe: bool,
    experts: int | None,
    qk_layernorm: bool,
    transformer_engine: bool,
    multi_latent_attention: bool = False,
) -> Any:
    """Stock spec of one GPT layer: dense, or MoE with ``experts`` experts; with grouped-query or latent attention."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if transformer_engine:
        return specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts if moe else None,
            moe_grouped_gemm=moe,
            qk_layernorm=qk_layernorm,
            multi_latent_attention=multi_latent_attention,
        )
    if multi_latent_attention and not has_transformer_engine():
        from megatron.core.transformer import multi_latent_attention as module

        # Its import of Transformer Engine's layers succeeds with None for each; then it asks isinstance(..., None).
        module.HAVE_TE = False
    return specs.get_gpt_layer_local_spec(
        num_experts=experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=qk_layernorm,
        multi_latent_attention=multi_latent_attention,
        normalization="RMSNorm",
    )


def separate_norms(spec: Any, *, moe: bool) -> None:
    """Have the linear layers of a Transformer Engine layer's spec leave norms to the layer's own norm modules.

    Latent attention keeps its norms of what it compresses, which are not on the residual stream. In checkpoints norms
    keep the names that they have inside linear layers, so that one loads either way.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    names = {}
    attention = spec.submodules.self_attention.submodules
    if hasattr(attention, "linear_qkv"):
        attention.linear_qkv = TEColumnParallelLinear
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not moe:
        mlp = spec.submodules.mlp
        submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
        submodules.linear_fc1 = TEColumnParallelLinear
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    spec.submodules.sharded_state_dict_keys_map = spec.submodules.sharded_state_dict_keys_map | names


def moe_layer(config: Any, groups: Any, *, transformer_engine: bool, layer_number: int = 1) -> Any:
    """A stock MoE layer alone, as a transformer layer would build it."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    spec = get_moe_module_spec(
        use_te=transformer_engine, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if isinstance(spec, functools.partial):  # from 0.18 on
        layer = spec(config=config, pg_collection=groups)
    else:
        layer = build_module(spec, config=config, pg_collection=groups)
    layer.set_layer_number(layer_number)
    return layer


def block_spec(layer_specs: Sequence[Any], final_norm: Any) -> Any:
    """Spec of the layers of one model chunk and of the norm after the last layer of the model."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    return TransformerBlockSubmodules(layer_specs=list(layer_specs), layer_norm=final_norm)


def transformer_engine_norm() -> Any:
    """Megatron's wrapper of Transformer Engine's norm."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def gpt_model(**kwargs: Any) -> Any:
    """Build a ``GPTModel``."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = GPTModel(**kwargs)
    _tie_by_group(model)
    return model


def _tie_by_group(model: Any) -> None:
    """A checkpoint's copy of tied embeddings on the last stage is numbered by the group that Megatron is given for it,
    not by its global parallel state."""
    from megatron.core.models.common.language_module import language_module

    tie = model.tie_embeddings_and_output_weights_state_dict

    @functools.wraps(tie)
    def tie_by_group(state: Any, output_key: str, embedding_key: str, metadata: Any = None) -> None:
        group = (metadata or {}).get("dp_cp_group")
        if group is None:
            tie(state, output_key, embedding_key, metadata or {})
            return
        ranks = SimpleNamespace(get_data_parallel_rank=lambda **_: group.rank())
        with mock.patch.object(language_module, "parallel_state", ranks):
            tie(state, output_key, embedding_key, metadata)

    model.tie_embeddings_and_output_weights_state_dict = tie_by_group


def router_class() -> type[torch.nn.Module]:
    from megatron.core.transformer.moe.router import TopKRouter

    return TopKRouter


def moe_layer_class() -> type[torch.nn.Module]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return MoELayer


def transformer_layer_class() -> type[torch.nn.Module]:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    return TransformerLayer


def sequential_mlp_class() -> type[torch.nn.Module]:
    from megatron.core.transformer.moe.experts import SequentialMLP

    return SequentialMLP


def grouped_mlp_class() -> type[torch.nn.Module] | None:
    """Experts in one grouped GEMM; None where Megatron does not define them (0.16 without Transformer Engine)."""
    from megatron.core.transformer.moe import experts

    return getattr(experts, "TEGroupedMLP", None)


def process_group_collection(**groups: Any) -> Any:
    """A ``ProcessGroupCollection`` from the groups that the installed version knows; it takes no others."""
    import dataclasses

    from megatron.core.process_groups_config import ProcessGroupCollection

    known = {f.name for f in dataclasses.fields(ProcessGroupCollection)}
    return ProcessGroupCollection(**{name: group for name, group in groups.items() if name in known})


def packed_seq_params(cu_seqlens: torch.Tensor, max_seqlen: int) -> Any:
    """``PackedSeqParams`` of a micro-batch whose sequences lie back to back.

    Args:
        cu_seqlens: int32 ``[sequences + 1]``, on the device of the model.
        max_seqlen: rows of the longest sequence.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def distributed_data_parallel(
    config: Any,
    chunks: Sequence[torch.nn.Module],
    groups: Any,
    *,
    distributed_optimizer: bool,
    grad_dtype_fp32: bool,
    overlap: bool = False,
) -> list[torch.nn.Module]:
    """Wrap model chunks in Megatron's DistributedDataParallel, weights broadcast from the first replica.

    With ``overlap``, gradients are reduced bucket by bucket while backward runs, and the distributed optimizer gathers
    parameters while forward runs; ``config`` is told how to hold reduction back until the last micro-batch.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
        grad_reduce_in_fp32=grad_dtype_fp32,
        average_in_collective=False,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups)
        for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    if overlap:
        held = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = held if len(held) > 1 else held[0]
    return wrapped


def gather_rows(rows: torch.Tensor, tp_group: Any) -> torch.Tensor:
    """From each tensor-parallel rank's part of the rows ``[rows/tp, ...]`` to all rows, on every rank.

    Backward gives each rank its part of the gradient: right when all ranks have the same loss of all rows.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=tp_group)


def fuse_weight_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Let Transformer Engine's linear layers add weight gradients to ``main_grad`` in their kernels.

    ``gradient_accumulation_fusion`` of the configuration would ask the same of the output layer, which is Megatron's
    own and needs Apex for it.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def synchronize_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Finish gathering parameters that forward would otherwise wait for layer by layer; before reading weights."""
    for chunk in chunks:
        if getattr(chunk, "use_forward_hook", False):
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()


def optimizer(chunks: Sequence[torch.nn.Module], groups: Any, **kwargs: Any) -> Any:
    """Megatron's Adam for these chunks; keyword arguments are fields of ``OptimizerConfig``."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(optimizer="adam", **kwargs)
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False, pg_collection=groups)


def parameter_scheduler(
    optimizer: Any,
    *,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    decay_steps: int,
    style: str,
    weight_decay: float,
) -> Any:
    """Learning-rate schedule counted in optimizer steps.

    A state that is loaded into it gives the number of steps and nothing else: a run that is resumed to go on longer
    decays until its new end.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=max_lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(decay_steps, warmup_steps + 1),
        lr_decay_style=style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def finalize_grads_summed(groups: Any) -> Callable[..., None]:
    """``finalize_model_grads`` that leaves gradients as sums.

    Our losses carry their global denominator already, so nothing may be divided by micro-batches, tokens or ranks.
    """
    from megatron.core.distributed import finalize_model_grads

    def finalize(model: Any, num_tokens: Any = None, pg_collection: Any = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, pg_collection=pg_collection or groups, **kwargs)

    return finalize


@contextlib.contextmanager
def gradients_not_finalized(config: Any) -> Iterator[None]:
    """Schedules run inside leave gradients in ``main_grad`` as this rank computed them: nothing is reduced.

    For DDP without overlapped reduction, which reduces in ``finalize_model_grads`` alone.
    """
    before = config.finalize_model_grads_func
    config.finalize_model_grads_func = None
    try:
        yield
    finally:
        config.finalize_model_grads_func = before


def gradient_buffers(chunks: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """The flat tensors that ``main_grad`` of all parameters are views of; chunks are wrapped in DDP."""
    return [buffer.grad_data for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]


def forward_backward_function(pp: int, vpp: int | None, config: Any, groups: Any) -> Callable[..., Any]:
    """The stock schedule for this pipeline, bound to its process groups."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    if pp == 1:
        run = schedules.forward_backward_no_pipelining
        return functools.partial(run, **_schedule_groups(run, groups))
    run = (
        schedules.forward_backward_pipelining_with_interleaving
        if vpp
        else schedules.forward_backward_pipelining_without_interleaving
    )
    communicator = P2PCommunicator(pp_group=groups.pp, config=config)
    return functools.partial(run, p2p_communicator=communicator, **_schedule_groups(run, groups))


def _schedule_groups(run: Callable[..., Any], groups: Any) -> dict[str, Any]:
    names = inspect.signature(run).parameters
    name = next((n for n in ("pg_collection", "schedule_pg_collection") if n in names), None)
    if name is None:
        raise RuntimeError(
            f"{run.__name__} of Megatron-core {version()} takes no process groups; tested: {TESTED_VERSIONS}"
        )
    return {name: groups}


def seed_rng(seed: int, *, tp_rank: int, ep_rank: int, etp_rank: int) -> None:
    """Seed Megatron's random-number tracker; ranks explicit, so no global parallel state is asked."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=ep_rank, etp_rank=etp_rank)


def ensure_scratch_buffer() -> None:
    """The one global that layers need: scratch memory for gathered activations, shared by all models of a process."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def rotary_module() -> Any:
    """Where Megatron's attention looks its rotary embeddings up."""
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(module, "module"):
        module = module.module
    return module


def float16_module(config: Any, chunk: torch.nn.Module) -> torch.nn.Module:
    """Megatron's wrapper of 16-bit models; routers' expert biases stay float32, bit for bit.

    Megatron casts them back to float32 at the first forward pass, when what the 16 bits do not hold is lost.
    """
    from megatron.core.transformer.module import Float16Module

    biases = {
        module: module.expert_bias for module in chunk.modules() if getattr(module, "expert_bias", None) is not None
    }
    wrapped = Float16Module(config, chunk)
    for module, bias in biases.items():
        module.expert_bias = bias
    return wrapped


def modules_with_te_checkpoint() -> list[Any]:
    """Megatron modules that imported Transformer Engine's checkpoint by name; none without Transformer Engine."""
    import importlib

    found = []
    for name in (
        "recompute",
        "transformer.transformer_block",
        "transformer.transformer_layer",
        "transformer.moe.moe_layer",
    ):
        try:
            module = importlib.import_module(f"megatron.core.{name}")
        except ModuleNotFoundError:
            continue  # recompute exists from 0.19 on
        if callable(getattr(module, "te_checkpoint", None)):
            found.append(module)
    return found


def sharded_object(
    key: str, data: Any, global_shape: tuple[int, ...], offset: tuple[int, ...], replica: Any = 0
) -> Any:
    """A ``ShardedObject`` for Megatron's distributed checkpoints."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject(key, data, global_shape, offset, replica_id=replica)


def checkpoint_metadata(groups: Any, *, distributed_optimizer: bool) -> dict[str, Any]:
    """What ``sharded_state_dict`` wants to know; chosen so that a checkpoint loads under another layout."""
    metadata: dict[str, Any] = {
        "dp_cp_group": groups.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    if distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def save_checkpoint(state: dict[str, Any], directory: str) -> None:
    """Write a distributed checkpoint; returns when it is on disk."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron would start a server process for this queue, which only asynchronous saving needs, and which stays
    # behind when the rank is killed.
    if getattr(filesystem_async, "_results_queue", None) is None:
        filesystem_async._results_queue = queue.Queue()
    _write_in_threads(filesystem_async.FileSystemWriterAsync)
    dist_checkpointing.save(state, directory)


def _write_in_threads(writer: Any) -> None:
    """Before 0.19 forks of the rank write its files; let threads do it, as from 0.19 on.

    A fork holds the rank's sockets. When the rank is killed meanwhile, and its fork hangs (it was made of a process of
    many threads), neither its peers nor Ray see a connection close: they wait for their time limits.
    """
    if not hasattr(writer, "write_preloaded_data_multiproc"):
        return

    def write(transforms: Any, use_msc: bool, rank: int, buckets: Sequence[Any], into: Any) -> None:
        written: queue.Queue[tuple[int, Any]] = queue.Queue()
        begun: queue.Queue[int] = queue.Queue()
        more = {"use_msc": True} if use_msc else {}
        with ThreadPoolExecutor(max(1, len(buckets)), "checkpoint") as threads:
            for i, bucket in enumerate(buckets):
                begun.put(i)
                threads.submit(writer.write_preloaded_data, transforms, i, bucket, written, begun, True, **more)
        by_bucket = dict(written.get_nowait() for _ in buckets)
        failed = next((result for result in by_bucket.values() if isinstance(result, Exception)), None)
        into.put(by_bucket if failed is None else failed)

    writer.write_preloaded_data_multiproc = staticmethod(write)


def load_checkpoint(state: dict[str, Any], directory: str) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    return dict(dist_checkpointing.load(state, directory))


def load_checkpoint_common(directory: str) -> dict[str, Any]:
    """The unsharded part of a distributed checkpoint."""
    from megatron.core import dist_checkpointing

    return dict(dist_checkpointing.load_common_state_dict(directory))


def random_tracker_states() -> dict[str, Any]:
    from megatron.core import tensor_parallel

    return dict(tensor_parallel.get_cuda_rng_tracker().get_states())


def set_random_tracker_states(states: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    tensor_parallel.get_cuda_rng_tracker().set_states(states)
