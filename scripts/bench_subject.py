"""What the speed benchmarks time: an MoE layer, a transformer layer, or a training step of a model.

All are stock Megatron modules, in DistributedDataParallel, expert-parallel over all ranks: Transformer Engine's with
grouped experts on GPUs, local ones on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.megatron import compat, cpu, microbatch
from megatron_ultraep.megatron.groups import ModelGroups, ParallelLayout, create_groups
from megatron_ultraep.megatron.router_replay import RoutingReplay

Keys = tuple[MicroBatchKey, ...]


@dataclass(frozen=True)
class Shape:
    """What is built and fed. Sizes are counts; ``tokens`` and ``sequence`` are of one micro-batch of one rank.

    Attributes:
        kind: ``"layer"`` (one MoE layer), ``"transformer-layer"`` or ``"model"``.
        ffn: columns of one expert's hidden layer: an expert is ``[2*ffn, hidden]`` and ``[hidden, ffn]``.
        draws: different micro-batches that iterations go through in turn.
        fusions: Megatron's fused kernels of activation, dropout and rotary embedding, as its jobs have them.
        overlap: gradients are reduced during backward, parameters gathered during forward (model only).
    """

    kind: str
    name: str
    experts: int
    topk: int
    hidden: int = 4096
    ffn: int = 1536
    tokens: int = 8192
    sequence: int = 4096
    heads: int = 32
    layers: int = 1
    vocabulary: int = 32768
    micro_batches: int = 1
    draws: int = 4
    dtype: str = "bfloat16"
    grad_dtype: str = "float32"
    shared_experts: bool = False
    fusions: bool = True
    permute_fusion: bool = False
    overlap: bool = False

    def __str__(self) -> str:
        what = {"layer": "MoE layer", "transformer-layer": "transformer layer", "model": f"{self.layers}-layer model"}
        return f"{what[self.kind]}, {self.experts} experts top-{self.topk}" + ", shared experts" * self.shared_experts

    @property
    def expert_mib(self) -> float:
        """Weights of one expert (MiB)."""
        element = int(getattr(torch, self.dtype).itemsize)
        return 3 * self.hidden * self.ffn * element / 2**20


def device() -> torch.device:
    """Of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def transformer_config(shape: Shape, ranks: int) -> Any:
    """Megatron's configuration; expert-parallel over all ranks."""
    te = compat.has_transformer_engine()
    dtype = getattr(torch, shape.dtype)
    return compat.transformer_config(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=max(1, shape.heads // 4),
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # see initialise()
        bias_activation_fusion=te and shape.fusions,
        bias_dropout_fusion=te and shape.fusions,
        apply_rope_fusion=te and shape.fusions,
        masked_softmax_fusion=False,
        # Unfused is Megatron's default; in 0.16 it asks for global process groups.
        cross_entropy_loss_fusion=not te,
        persist_layer_norm=te,
        gradient_accumulation_fusion=False,  # see compat.fuse_weight_gradients
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_ffn_hidden_size=shape.ffn,
        moe_shared_expert_intermediate_size=shape.ffn if shape.shared_experts else None,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=te,
        moe_permute_fusion=shape.permute_fusion,
        expert_model_parallel_size=ranks,
    )


def initialise(chunk: torch.nn.Module, seed: int) -> None:
    """Fill weights where they are: matrices with noise, norms with ones."""
    generator = torch.Generator(device()).manual_seed(seed)
    with torch.no_grad():
        for parameter in chunk.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)


class Subject:
    """What is timed: called with the keys of an iteration's micro-batches, it runs that iteration.

    Attributes:
        chunks: for ``attach``, wrapped in DistributedDataParallel.
        replay: where routes are set.
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        cpu.install()
        self.shape = shape
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.groups = create_groups(ParallelLayout(world=ranks, ep=ranks), timeout_s=120)
        compat.ensure_scratch_buffer()
        compat.seed_rng(seed, tp_rank=0, ep_rank=rank, etp_rank=0)
        self.config = transformer_config(shape, ranks)
        chunk = self._build(self.groups)
        chunk.to(device())
        initialise(chunk, seed + rank)
        numbers = {number: number - 1 for number in range(1, shape.layers + 1)}
        self.replay = RoutingReplay([chunk], numbers, keep_output=False)
        self.inner: Any = chunk
        if shape.kind == "model" and shape.dtype == "bfloat16":
            chunk = compat.float16_module(self.config, chunk)
        self.chunks: list[Any] = compat.distributed_data_parallel(
            self.config,
            [chunk],
            self.groups.collection,
            distributed_optimizer=shape.kind == "model",
            grad_dtype_fp32=shape.grad_dtype == "float32",
            overlap=shape.overlap and shape.kind == "model",
        )
        compat.fuse_weight_gradients(self.chunks)
        self.generator = torch.Generator(device()).manual_seed(seed + 100 + rank)

    def _build(self, groups: ModelGroups) -> Any:
        te = compat.has_transformer_engine()
        if self.shape.kind == "layer":
            layer = compat.moe_layer(self.config, groups.collection, transformer_engine=te)
            return layer.to(getattr(torch, self.shape.dtype))
        spec = compat.layer_spec(moe=True, experts=self.shape.experts, qk_layernorm=False, transformer_engine=te)
        norm = compat.transformer_engine_norm() if te else spec.submodules.input_layernorm
        whole = self.shape.kind == "model"
        return compat.gpt_model(
            config=self.config,
            transformer_layer_spec=compat.block_spec([spec] * self.shape.layers, norm),
            vocab_size=self.shape.vocabulary,
            max_sequence_length=self.shape.sequence,
            pre_process=whole,
            post_process=whole,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            pg_collection=groups.collection,
        )

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def __call__(self, keys: Keys) -> None:
        raise NotImplementedError


class Layer(Subject):
    """Forward and backward of one MoE layer, or of one transformer layer; gradients add up in DDP's buffers."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        size = (shape.sequence, shape.tokens // shape.sequence, shape.hidden)
        dtype = getattr(torch, shape.dtype)
        self.hidden = torch.randn(size, generator=self.generator, device=device(), dtype=dtype).requires_grad_()
        self.gradient = torch.randn(size, generator=self.generator, device=device(), dtype=dtype)

    def __call__(self, keys: Keys) -> None:
        self.forward(keys).backward(self.gradient)

    def forward(self, keys: Keys) -> torch.Tensor:
        """The output, whose backward with ``gradient`` is the other half of an iteration."""
        self.hidden.grad = None
        with microbatch.micro_batch(keys[0]):
            if self.shape.kind == "layer":
                output, _ = self.chunks[0](self.hidden)
            else:  # a pipeline stage in the middle: attention and MoE, no embedding, no head
                self.inner.set_input_tensor(self.hidden)
                output = self.chunks[0](None, None, None)
        return output


class Model(Subject):
    """One training step: forward and backward of all micro-batches, then the optimizer."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self.optimizer = compat.optimizer(
            self.chunks,
            self.groups.collection,
            lr=1e-5,
            min_lr=1e-5,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=shape.dtype == "bfloat16",
            params_dtype=getattr(torch, shape.dtype),
            use_distributed_optimizer=True,
        )
        self.config.finalize_model_grads_func = compat.finalize_grads_summed(self.groups.collection)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = compat.forward_backward_function(1, None, self.config, self.groups.collection)
        size = (shape.micro_batches, shape.tokens // shape.sequence, shape.sequence + 1)
        self.text = torch.randint(shape.vocabulary, size, generator=self.generator, device=device())
        self.positions = torch.arange(shape.sequence, device=device()).expand(size[1], -1)

    def __call__(self, keys: Keys) -> None:
        self.zero_gradients()
        self.optimizer.zero_grad()
        self.schedule(
            forward_step_func=self._forward,
            data_iterator=zip(keys, self.text, strict=True),
            model=self.chunks[0],
            num_microbatches=len(keys),
            seq_length=self.shape.sequence,
            micro_batch_size=self.shape.tokens // self.shape.sequence,
            forward_only=False,
        )
        self.optimizer.step()

    @staticmethod
    def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        return loss, {"loss": loss.detach()}

    def _forward(self, batches: Iterator[tuple[MicroBatchKey, torch.Tensor]], chunk: Any) -> tuple[Any, Any]:
        key, text = next(batches)
        with microbatch.micro_batch(key):
            output = chunk(text[:, :-1], self.positions, None, labels=text[:, 1:].contiguous())
        return output, self._loss
