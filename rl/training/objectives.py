"""What a mini-batch is trained on: from one micro-batch's logits to its share of a loss.

Shares add up over micro-batches, ranks and chunks of a set, because their denominators are those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_ultraep.layout import MicroBatch
from rl.algorithms.losses import Normaliser, PolicyLossConfig, PolicyTokens, policy_loss
from rl.algorithms.values import ValueTokens, value_loss
from rl.training.batch import MiniBatch, PackedTensors, pack_field
from rl.training.passes import PassRunner, PassSettings, RouteMode, row_values


class Objective(Protocol):
    """From one micro-batch's output to its additive share of the mini-batch loss and sums of metrics.

    The output is logits ``[rows, vocab/tp]``, of a model with a scalar head ``[rows, 1]``.
    """

    routes: RouteMode

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class PolicyObjective:
    """The policy loss of ``rl.algorithms.losses``."""

    loss: PolicyLossConfig
    settings: PassSettings
    routes: RouteMode = "replay"

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, entropy = runner.token_logprobs(logits, packed, self.settings)

        def given(name: str) -> torch.Tensor | None:
            return pack_field(micro_batch, batch.samples, name, logprobs.device, logprobs.dtype)

        advantages = given("advantages")
        if advantages is None:
            raise ValueError("expected advantages of every sample of a policy mini-batch, got none")
        # A rank may have no sample of a small chunk: then what the loss needs is there, of padding.
        any_sample = next(iter(batch.samples.values()), None)
        has_old = any_sample is None or any_sample.old_logprobs is not None
        has_ref = any_sample.ref_logprobs is not None if any_sample else self.loss.kl_coef != 0
        tokens = PolicyTokens(
            logprobs=logprobs,
            advantages=advantages,
            mask=packed.mask,
            sample_index=packed.sample_index,
            old_logprobs=given("old_logprobs") if has_old else None,
            rollout_logprobs=given("rollout_logprobs"),
            ref_logprobs=given("ref_logprobs") if has_ref else None,
            entropy=entropy if self.loss.entropy_coef or entropy is None else entropy.detach(),
        )
        normaliser = Normaliser(
            total_tokens=float(max(1, batch.total_tokens)),
            total_sequences=float(max(1, batch.total_sequences)),
            sequence_tokens=packed.segment_tokens,
        )
        return policy_loss(tokens, self.loss, normaliser)


@dataclass(frozen=True)
class SupervisedObjective:
    """Mean negative log-likelihood of the learnt tokens; routers choose by themselves.

    The sum ``exact`` counts samples whose learnt tokens are what greedy decoding would write.
    """

    settings: PassSettings = field(default_factory=PassSettings)
    routes: RouteMode = "own"

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, _ = runner.token_logprobs(logits, packed, self.settings)
        total = -(torch.where(packed.mask, logprobs, torch.zeros_like(logprobs))).sum()
        wrong = packed.mask & ~runner.most_likely(logits, packed)
        errors = torch.zeros_like(packed.segment_tokens).index_add_(0, packed.sample_index, wrong.to(torch.int64))
        exact = ((errors == 0) & (packed.segment_tokens > 0)).sum()
        return total / max(1, batch.total_tokens), {"nll": total.detach(), "exact": exact}


@dataclass(frozen=True)
class ValueObjective:
    """The critic's loss of ``rl.algorithms.values``; its routers choose, for rollout's routes are the actor's.

    Attributes:
        clip: see ``value_loss``.
    """

    clip: float | None = None
    routes: RouteMode = "own"

    def __call__(
        self, runner: PassRunner, batch: MiniBatch, logits: torch.Tensor, packed: PackedTensors, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = row_values(logits)

        def given(name: str) -> torch.Tensor:
            field = pack_field(micro_batch, batch.samples, name, values.device, values.dtype)
            if field is None:
                raise ValueError(f"expected {name} of every sample of a critic's mini-batch, got none")
            return field

        tokens = ValueTokens(values, given("values"), given("returns"), packed.mask)
        normaliser = Normaliser(
            total_tokens=float(max(1, batch.total_tokens)), total_sequences=float(max(1, batch.total_sequences))
        )
        return value_loss(tokens, self.clip, normaliser)
