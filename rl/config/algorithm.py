"""The section of the algorithm: advantages, loss, and what corrects them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rl.config.base import Section

RouteSource = Literal["replay", "own"]


class KLSection(Section):
    """KL to the reference model (the weights before the first step)."""

    coef: float = Field(0.0, ge=0, description="Weight of the KL; 0: no reference model is kept.")
    estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the KL from one sample.")
    apply_in: Literal["loss", "reward"] = Field(
        "loss", alias="in", description="Where the KL is added; with gae in the reward of every token."
    )


class ImportanceSection(Section):
    """Correction of the mismatch between the rollout's and the trainer's log-probs."""

    truncation: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="Cap of exp(recomputed old - rollout log-prob) as a weight; null: no correction; auto: 2 where "
        "samples may be stale (`stream.staleness` > 0) and old log-probs are recomputed, else none.",
    )


class RoutesSection(Section):
    """Which routes each pass uses: rollout's (`replay`) or those of its own router (`own`)."""

    old_logprob: RouteSource = Field("replay", description="Pass that recomputes old log-probs.")
    train: RouteSource = Field("replay", description="Forward and backward of the loss.")
    reference: RouteSource = Field("own", description="Pass of the reference model.")
    compare_own_every: int = Field(
        0, ge=0, description="Every so many steps measure log-probs with own routes too, for the report; 0: never."
    )


class GAESection(Section):
    """Generalised advantage estimation; a token is a step. A response cut off at its longest length ends like any
    other: no value is bootstrapped for what would have followed."""

    gamma: float = Field(1.0, ge=0, le=1, description="Discount per token.")
    lam: float = Field(1.0, ge=0, le=1, description="Lambda: 0 trusts the critic (one step), 1 the rewards.")
    whiten: bool = Field(
        True, description="Shift and scale advantages to mean 0 and standard deviation 1 over an iteration's tokens."
    )


class AlgorithmSection(Section):
    """Advantages and loss."""

    advantage: Literal["grpo", "gae"] = Field(
        "grpo", description="How rewards become advantages: compared in groups, or by a critic (PPO; see `critic`)."
    )
    gae: GAESection = Field(default_factory=GAESection, description=GAESection.__doc__)
    normalize_std: bool = Field(True, description="Divide by the group's standard deviation (false: Dr. GRPO).")
    clip_low: float = Field(0.2, ge=0, lt=1, description="PPO clip: the ratio's lower bound is 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="PPO clip: the ratio's upper bound is 1 + clip_high.")
    kl: KLSection = Field(default_factory=KLSection, description="KL to the reference model.")
    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over all tokens of the mini-batch, or mean over sequences of token means."
    )
    importance: ImportanceSection = Field(
        default_factory=ImportanceSection, description="Correction of the train-rollout mismatch."
    )
    entropy_coef: float = Field(0.0, description="Weight of the entropy bonus.")
    epochs_per_batch: int = Field(1, ge=1, description="Passes over one iteration's samples.")
    mini_batches: int = Field(1, ge=1, description="Optimizer steps per pass; must divide the number of samples.")
    old_logprobs: Literal["rollout", "recompute"] = Field(
        "recompute", description="Denominator of the ratio: the engine's log-probs, or the trainer's before the step."
    )
    routes: RoutesSection = Field(default_factory=RoutesSection, description="Which routes each pass uses.")
    zero_advantages: bool = Field(False, description="Set all advantages to 0: the control experiment.")
