"""What every rank of the trainer builds."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models.builder import Recompute

MODELS = ("actor", "reference", "critic", "scorer")
"""What may live on the trainer's ranks; names in micro-batch keys."""


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
class CriticSpec:
    """The critic of PPO, on the same ranks as the actor.

    Attributes:
        model_path: Hugging Face directory of its first weights; with a head (``score.weight``) or without.
        layout: its own parallel sizes.
        optimizer: its settings.
        recompute: activation recomputation.
    """

    model_path: str
    layout: ParallelLayout
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    recompute: Recompute = field(default_factory=Recompute)


@dataclass(frozen=True)
class ScorerSpec:
    """A reward model: a language model's trunk with a head of one output, never trained.

    Attributes:
        model_path: Hugging Face directory of sequence classification with one label.
        layout: its parallel sizes.
    """

    model_path: str
    layout: ParallelLayout


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
        critic: build and train a critic too; None: there is none.
        reference_layout: parallel sizes of the reference; None: the actor's, on the actor's process groups.
        scorer: build a reward model too.
        float32_head: actor and reference give logits in float32 where ``dtype`` is 16-bit.
        float32_residual: actor and reference have their residual stream in float32 where ``dtype`` is 16-bit.

    Raises:
        ValueError: a model whose layout is for another number of ranks.
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
    critic: CriticSpec | None = None
    reference_layout: ParallelLayout | None = None
    scorer: ScorerSpec | None = None
    float32_head: bool = True
    float32_residual: bool = False

    def __post_init__(self) -> None:
        for model in ("critic", "reference", "scorer"):
            world = self.layout_of(model).world
            if world != self.layout.world:
                raise ValueError(
                    f"{model}: expected a layout of all {self.layout.world} trainer ranks, got one of {world}"
                )

    def layout_of(self, model: str) -> ParallelLayout:
        """Parallel sizes of one of ``MODELS``; the actor's where a model has none of its own.

        Raises:
            ValueError: no such model.
        """
        if model not in MODELS:
            raise ValueError(f"expected one of {', '.join(MODELS)}, got {model!r}")
        own = {
            "critic": self.critic and self.critic.layout,
            "reference": self.reference_layout,
            "scorer": self.scorer and self.scorer.layout,
        }.get(model)
        return own or self.layout
