"""The section of the algorithm: advantages, loss, what corrects them, and presets of the usual names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config.base import Section

RouteSource = Literal["replay", "own"]

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo", "loss": "ppo_clip", "aggregation": "sequence_mean"},
    "dr_grpo": {"advantage": "dr_grpo", "loss": "ppo_clip", "aggregation": "sequence_sum"},
    "dapo": {
        "advantage": "grpo",
        "loss": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "dynamic_sampling": {"enabled": True},
        "overlong": {"buffer": "auto"},
    },
    "gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    "cispo": {
        "advantage": "grpo",
        "loss": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "aggregation": "token_mean",
    },
    "rloo": {
        "advantage": "rloo",
        "loss": "ppo_sequence",
        "aggregation": "sequence_mean",
        "kl": {"estimator": "k1", "in": "reward"},
    },
    "reinforce++": {
        "advantage": "reinforce++",
        "loss": "ppo_clip",
        "aggregation": "token_mean",
        "kl": {"estimator": "k1", "in": "reward"},
    },
    "ppo": {
        "advantage": "gae",
        "loss": "ppo_clip",
        "aggregation": "token_mean",
        "gae": {"gamma": 1.0, "lam": 0.95, "whiten": True},
        "kl": {"estimator": "k1", "in": "reward"},
    },
}
"""What each preset sets; fields of the file and of the command line win over it. See docs/algorithms.md."""


COMPARED = frozenset({"dr_grpo", "grpo", "reinforce++_baseline", "rloo"})
"""Advantages that compare samples of one prompt: with one sample each, all are 0."""

WHITENED = frozenset({"reinforce++", "reinforce++_baseline"})
"""Advantages that are always whitened over an iteration's tokens; those of gae are where `gae.whiten` says so."""


class KLSection(Section):
    """KL to the reference model (the weights before the first step)."""

    coef: float = Field(0.0, ge=0, description="Weight of the KL; 0: no reference model is kept.")
    estimator: Literal["k1", "k2", "k3", "k1+", "k3+"] = Field(
        "k3", description="Estimator of the KL from one sample; with + its gradient as a loss is that of k2, unbiased."
    )
    weighted: bool = Field(
        False, description="In the loss, multiply k1 or k3 by the ratio new / old: unbiased off-policy, gradient too."
    )
    apply_in: Literal["loss", "reward"] = Field(
        "loss", alias="in", description="Where the KL is added; with gae and reinforce++ in the reward of every token."
    )


class ImportanceSection(Section):
    """Correction of the mismatch between the rollout's and the trainer's log-probs, by weights
    w = exp(recomputed old - rollout log-prob)."""

    truncation: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="Cap of w as a weight; null: no correction; auto: 2 where samples may be stale (`stream.staleness` "
        "> 0), old log-probs are recomputed and there is no `band`, else none.",
    )
    band: Annotated[tuple[float, float], Field(strict=False)] | None = Field(
        None,
        description="[low, high]: tokens (or whole samples, see `level`) with w outside are not learnt from, the "
        "others are weighed with w; null: none are left out.",
    )
    level: Literal["token", "sequence", "sequence_mean"] = Field(
        "token", description="w of each token; of its whole response (product over tokens); or their geometric mean."
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

    gamma: float = Field(1.0, ge=0, le=1, description="Discount per token; of reinforce++ too.")
    lam: float = Field(1.0, ge=0, le=1, description="Lambda: 0 trusts the critic (one step), 1 the rewards.")
    whiten: bool = Field(
        True, description="Shift and scale advantages to mean 0 and standard deviation 1 over an iteration's tokens."
    )


class DynamicSamplingSection(Section):
    """Groups whose rewards are all equal are left out, and further prompts are generated in their place (DAPO)."""

    enabled: bool = Field(False, description="Fill each iteration with groups whose rewards differ.")
    max_rounds: int = Field(
        10, ge=1, description="Rounds of generation of one iteration, the first included; after the last it trains on "
        "the groups that there are.",
    )  # fmt: skip


class OverlongSection(Section):
    """What happens to responses near or at the longest length, `sampling.max_tokens`."""

    buffer: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0, description="Tokens before the longest length over which a penalty grows from 0; 0: no penalty; auto: a "
        "fifth of sampling.max_tokens.",
    )  # fmt: skip
    penalty: float = Field(1.0, ge=0, description="What a response of the longest length loses of its reward.")
    filter: bool = Field(
        False, description="Do not learn from responses that were cut off; their rewards still count in their groups."
    )

    def buffer_tokens(self, longest: int) -> int:
        """Tokens of the buffer where the longest response has so many; 0: no penalty."""
        return max(1, longest // 5) if self.buffer == "auto" else self.buffer


class AlgorithmSection(Section):
    """Advantages and loss."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"] | None = Field(
        None, description="Defaults of an algorithm for the fields below; fields that are set win. docs/algorithms.md."
    )
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gae"] = Field(
        "grpo",
        description="How rewards become advantages: compared in groups, whitened over the batch (reinforce++), or by "
        "a critic (PPO; see `critic`).",
    )
    gae: GAESection = Field(default_factory=GAESection, description=GAESection.__doc__)
    normalize_std: bool = Field(True, description="Of grpo: divide by the group's standard deviation.")
    loss: Literal["ppo_clip", "ppo_sequence", "gspo", "cispo"] = Field(
        "ppo_clip",
        description="PPO's clipped loss, with the ratio of a token, of a whole response, or their geometric mean over "
        "a response (gspo); or cispo, which clips weights, not gradients.",
    )
    clip_low: float = Field(0.2, ge=0, le=1, description="Clip: the ratio's lower bound is 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="Clip: the ratio's upper bound is 1 + clip_high.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Of ppo_clip: most that a negative advantage is multiplied by; 3 is usual; null: no limit."
    )
    kl: KLSection = Field(default_factory=KLSection, description="KL to the reference model.")
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = Field(
        "token_mean",
        description="Mean over all tokens of the mini-batch; mean over sequences of token means; or sum over tokens "
        "divided by sequences * sampling.max_tokens (Dr. GRPO).",
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
    dynamic_sampling: DynamicSamplingSection = Field(
        default_factory=DynamicSamplingSection, description=DynamicSamplingSection.__doc__
    )
    overlong: OverlongSection = Field(default_factory=OverlongSection, description=OverlongSection.__doc__)
    routes: RoutesSection = Field(default_factory=RoutesSection, description="Which routes each pass uses.")
    zero_advantages: bool = Field(False, description="Set all advantages to 0: the control experiment.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_preset(cls, raw: Any) -> Any:
        """Fields that are not set take the preset's values; an unknown preset is reported by its field."""
        preset = raw.get("preset") if isinstance(raw, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return raw
        return _under(PRESETS[preset], raw)


def _under(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, with what it does not say taken from ``defaults``, section by section."""
    merged = dict(given)
    for name, value in defaults.items():
        if isinstance(value, Mapping):
            inner = given.get(name, {})
            if isinstance(inner, Section):
                inner = inner.model_dump(by_alias=True, exclude_unset=True)
            if isinstance(inner, Mapping):  # else it is reported as no section
                merged[name] = _under(value, inner)
        elif name not in given and not (name == "in" and "apply_in" in given):
            merged[name] = value
    return merged
