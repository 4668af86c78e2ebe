"""The sections of models on the trainer's ranks: how each is cut over them, and how those that learn do so."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rl.config.base import ConfigPath, Section, Texts


class ParallelSection(Section):
    """Megatron layout. Data parallelism is what remains: ranks / (tp*pp*cp); experts': ranks / (etp*ep*pp)."""

    tp: int = Field(1, ge=1, description="Tensor-model-parallel size.")
    pp: int = Field(1, ge=1, description="Pipeline-model-parallel size.")
    vpp: int = Field(1, ge=1, description="Virtual pipeline stages per rank; 1: none.")
    ep: int = Field(1, ge=1, description="Expert-model-parallel size.")
    etp: int = Field(1, ge=1, description="Tensor-parallel size inside experts.")
    cp: int = Field(1, ge=1, description="Context-parallel size; only 1 is supported.")


class OptimizerSection(Section):
    """Adam and its schedule; steps are optimizer steps."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the schedule.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up from 0 to `lr`.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    decay_steps: int | None = Field(
        None, ge=1, description="Optimizer step at which `min_lr` is reached; null: the last one of the run."
    )
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field((0.9, 0.95), description="Adam's betas.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm to clip to; 0: no clipping.")


class TrainerSection(Section):
    """The Megatron ranks."""

    ranks: int = Field(1, ge=1, description="Trainer ranks, each a Ray actor.")
    ranks_per_node: int | None = Field(
        None, ge=1, description="Neighbouring ranks on each node of a cluster, as a rule one for each GPU; null: on as "
        "few nodes as have room, neighbours together.",
    )  # fmt: skip
    backend: Literal["gloo", "nccl"] = Field("gloo", description="gloo trains on CPU, nccl on GPU.")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="Megatron layout.")
    sequence_parallel: bool = Field(False, description="Megatron's sequence parallelism; must be true when tp > 1.")
    distributed_optimizer: bool = Field(True, description="Shard optimizer states over data-parallel ranks.")
    overlap: bool = Field(
        False,
        description="Reduce gradients while backward runs, and gather the distributed optimizer's parameters while "
        "forward runs.",
    )
    fuse_gradients: bool = Field(
        False,
        description="Transformer Engine's kernels add weight gradients to the float32 buffers themselves (GPUs only).",
    )
    permute_fusion: bool = Field(
        False, description="Transformer Engine's kernels permute tokens to experts and back (GPUs only)."
    )
    recompute: Literal["none", "full", "selective"] = Field("none", description="Activation recomputation.")
    recompute_modules: Texts = Field((), description="Modules recomputed when `recompute: selective`.")
    tokens_per_micro_batch: int = Field(8192, ge=1, description="Token budget of a packed micro-batch on one rank.")
    logprob_chunk_tokens: int = Field(1024, ge=1, description="Tokens whose logits are turned to log-probs at once.")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="Adam and its schedule.")


class CriticSection(Section):
    """The critic of PPO: the actor's trunk with a value head, trained beside it on the trainer's ranks. It sees the
    same mini-batches, and routes by itself."""

    model_path: ConfigPath | None = Field(
        None, description="Hugging Face directory of its first weights, with a head (`score.weight`) or without; null: "
        "the actor's, after the warm-up, and a head of zeros.",
    )  # fmt: skip
    parallel: ParallelSection | None = Field(
        None, description="Its own Megatron layout on the same ranks; null: the actor's."
    )
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="Adam and its schedule.")
    recompute: Literal["none", "full", "selective"] = Field("none", description="Activation recomputation.")
    recompute_modules: Texts = Field((), description="Modules recomputed when `recompute: selective`.")
    clip: Annotated[float, Field(gt=0)] | None = Field(
        0.2, description="How far a value may move from its old one before its gradient is cut, in units of return; "
        "null: no clipping.",
    )  # fmt: skip
    warmup_steps: int = Field(
        0, ge=0, description="Iterations at the beginning in which the critic learns and the actor does not."
    )


class ReferenceSection(Section):
    """The reference model, which is there when `algorithm.kl.coef` is not 0."""

    parallel: ParallelSection | None = Field(
        None, description="Its own Megatron layout on the trainer's ranks; null: the actor's."
    )


class RewardModelSection(Section):
    """A reward model on the trainer's ranks; its score is added to the reward function's."""

    path: ConfigPath = Field(
        description="Hugging Face directory of sequence classification with one label and the actor's tokenizer."
    )
    parallel: ParallelSection | None = Field(
        None, description="Its own Megatron layout on the trainer's ranks; null: the actor's."
    )
    weight: float = Field(1.0, description="What the score at a sample's last token is multiplied by.")
