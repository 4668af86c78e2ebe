"""What every rank of the trainer builds."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models.builder import Recompute


@dataclass(frozen=True)
class OptimizerSpec:
    """Adam and its schedule, counted in optimizer steps; see ``rl.config.OptimizerSection`` for the fields."""

    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class TrainerSpec:
    """What every rank builds.

    Attributes:
        model_path: Hugging Face directory of architecture and first weights.
        layout: parallel sizes.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float64"``.
        recompute: activation recomputation.
        distributed_optimizer: shard optimizer state over data-parallel ranks.
        optimizer: its settings.
        reference: build the frozen reference model too.
        seed: of Megatron's random-number tracker.
        collective_s: limit of every collective, in seconds.
        balance: how experts are balanced; None, or not enabled: not at all.
        fuse_gradients: Transformer Engine's kernels add weight gradients to ``main_grad`` themselves.
        permute_fusion: Transformer Engine's kernels permute tokens; needs Transformer Engine.
        overlap: reduce gradients while backward runs, gather the distributed optimizer's parameters while forward runs.
        reorder: experts will change their homes; whether they can is asked at start.
    """

    model_path: str
    layout: ParallelLayout
    dtype: str = "float32"
    recompute: Recompute = field(default_factory=Recompute)
    distributed_optimizer: bool = True
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    reference: bool = False
    seed: int = 0
    collective_s: float = 300.0
    balance: BalanceConfig | None = None
    overlap: bool = False
    fuse_gradients: bool = False
    permute_fusion: bool = False
    reorder: bool = False
