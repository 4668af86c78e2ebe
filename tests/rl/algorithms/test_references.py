"""Every preset's loss and gradient, as the loop computes them, against independent implementations on the same tensors:
the papers' formulas written out (``references``), and TRL where it is installed and has the algorithm."""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rl.algorithms.losses import Normaliser, PolicyTokens, policy_loss, sequence_token_counts
from rl.config import from_dict
from rl.config.algorithm import PRESETS
from rl.orchestration.experience import policy_loss_config, train_samples, with_advantages
from rl.types import Prompt, Sample
from tests.rl.algorithms import references
from tests.rl.test_config import changed

LONGEST, GROUPS, PER_GROUP, BETA = 12, 3, 4, 0.3
NEAR = {"rtol": 1e-6, "atol": 1e-6}


class Case:
    """A batch of 12 samples in 3 groups, 2 prompt tokens each, with everything an algorithm may ask for.

    Args:
        seed: of all numbers.
        spread: standard deviation of new - old log-probs: how far from the policy that sampled.
    """

    def __init__(self, seed: int, spread: float) -> None:
        random = np.random.Generator(np.random.PCG64(seed))
        lengths = random.integers(1, LONGEST + 1, GROUPS * PER_GROUP)
        lengths[0] = LONGEST
        self.samples = []
        self.old, self.reference, self.values, self.new = {}, {}, {}, {}
        for i, length in enumerate(map(int, lengths)):
            name = f"train/0/{i // PER_GROUP}/{i % PER_GROUP}"
            prompt = Prompt(name.rsplit("/", 1)[0], i // PER_GROUP, 0, "", np.array([1, 2], np.int32))
            reward = float(random.integers(0, 5)) / 4 + 0.01 * i  # no group is degenerate: references divide
            old = np.concatenate([np.zeros(2), -random.exponential(1.0, length)])
            self.samples.append(
                Sample(
                    sample_id=name,
                    prompt=prompt,
                    response_tokens=np.arange(length, dtype=np.int32),
                    rollout_logprobs=(old[2:] + 0.3 * random.standard_normal(length)).astype(np.float32),
                    weight_versions=((0, 1),),
                    finish_reason="length" if length == LONGEST else "stop",
                    routes=None,
                    histogram=None,
                    reward=reward,
                )
            )
            self.old[name] = old
            response = np.arange(2 + length) >= 2
            for target, scale in ((self.reference, 0.4), (self.new, spread)):
                target[name] = np.where(response, old + scale * random.standard_normal(2 + length), 0.0)
            self.values[name] = np.where(response, random.standard_normal(2 + length), 0.0)

    def loss(self, config) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        """The loss as the loop takes it, its gradient by sample ``[R]``, and sums of metrics."""
        given = train_samples(self.samples)
        values = self.values if config.critic is not None else None
        given, _ = with_advantages(self.samples, given, config, self.old, self.reference, values)
        new = [torch.tensor(self.new[s.sample_id], requires_grad=True) for s in given]

        def packed(name: str) -> torch.Tensor:
            return torch.cat([torch.tensor(getattr(s, name), dtype=torch.float64) for s in given])

        mask = torch.cat([torch.tensor(s.loss_mask) for s in given])
        index = torch.repeat_interleave(torch.arange(len(given)), torch.tensor([len(s.tokens) for s in given]))
        tokens = PolicyTokens(
            logprobs=torch.cat(new),
            advantages=packed("advantages"),
            mask=mask,
            sample_index=index,
            old_logprobs=packed("old_logprobs"),
            rollout_logprobs=packed("rollout_logprobs"),
            ref_logprobs=packed("ref_logprobs"),
        )
        counts = sequence_token_counts(mask, index, len(given))
        normaliser = Normaliser(float(mask.sum()), float((counts > 0).sum()), counts)
        loss, sums = policy_loss(tokens, policy_loss_config(config), normaliser)
        loss.backward()
        return loss.detach(), [row.grad[2:] for row in new], sums

    def written_out(self, beta: float) -> references.Batch:
        def rows(field: dict[str, np.ndarray]) -> list[list[float]]:
            return [field[s.sample_id][2:].tolist() for s in self.samples]

        new = [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in row] for row in rows(self.new)]
        return references.Batch(
            new=new,
            old=rows(self.old),
            reference=rows(self.reference),
            values=rows(self.values),
            rewards=[s.reward for s in self.samples],
            groups=[s.prompt.ordinal for s in self.samples],
            longest=LONGEST,
            beta=beta,
        )


def config_of(preset: str, **algorithm):
    changes = [("algorithm", {"preset": preset, **algorithm}), ("sampling.max_tokens", LONGEST)]
    if preset == "ppo":
        changes.append(("critic", {}))
    return from_dict(changed(*changes))


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_formulas_of_the_papers(preset, spread):
    for seed in range(3):
        case = Case(seed, spread)
        loss, gradients, _ = case.loss(config_of(preset, kl={"coef": BETA}))
        batch = case.written_out(BETA)
        expected = references.REFERENCES[preset](batch)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), **NEAR)
        for mine, theirs in zip(gradients, batch.new, strict=True):
            torch.testing.assert_close(mine, torch.stack([x.grad for x in theirs]), **NEAR)


def test_reinforce_plus_plus_with_a_baseline():
    case = Case(5, 0.3)
    config = config_of(
        "reinforce++", advantage="reinforce++_baseline", kl={"coef": BETA, "in": "loss", "estimator": "k3"}
    )
    loss, gradients, _ = case.loss(config)
    batch = case.written_out(BETA)
    expected = references.reinforce_plus_plus_baseline(batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **NEAR)
    for mine, theirs in zip(gradients, batch.new, strict=True):
        torch.testing.assert_close(mine, torch.stack([x.grad for x in theirs]), **NEAR)


# ------------------------------------------------------------------ TRL

# Preset, what is added to it, and the same for TRL's GRPOTrainer._compute_loss.
TRL_CASES = {
    "grpo": ("grpo", {}, {"loss_type": "grpo"}),
    "grpo with dual clip": ("grpo", {"dual_clip": 1.5}, {"loss_type": "grpo", "delta": 1.5}),
    "grpo with unbiased KL": (
        "grpo",
        {"kl": {"coef": BETA, "weighted": True}},
        {"loss_type": "grpo", "unbiased": True},
    ),
    "dr_grpo": ("dr_grpo", {}, {"loss_type": "dr_grpo"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, truncated": (
        "dapo",
        {"importance": {"truncation": 1.2}},
        {"loss_type": "dapo", "epsilon_high": 0.28, "cap": 1.2},
    ),
    "gspo": (
        "gspo",
        {},
        {"loss_type": "grpo", "level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
}


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def as_trl(case: Case, config, new: list[torch.Tensor], advantages: torch.Tensor) -> tuple[SimpleNamespace, dict]:
    """What TRL's loss methods read of a trainer and of its inputs, filled with the case."""
    names = [s.sample_id for s in case.samples]
    mask = padded([torch.ones(len(s.response_tokens), dtype=torch.float64) for s in case.samples])
    logprobs = padded(new)

    def field(values: dict[str, np.ndarray]) -> torch.Tensor:
        return padded([torch.tensor(values[name][2:]) for name in names])

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
    )
    inputs = {
        "prompt_ids": torch.ones(len(names), 2, dtype=torch.int64),
        "prompt_mask": torch.ones(len(names), 2, dtype=torch.int64),
        "completion_ids": mask.long(),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": field(case.old),
        "ref_per_token_logps": field(case.reference),
        "num_items_in_batch": mask.sum(),
        "old_logps": (field(case.old) * mask).sum(1),
    }
    return trainer, inputs


def trl(name: str):
    pytest.importorskip("trl", reason="pip install trl: an extra that no other test needs")
    return importlib.import_module(f"trl.trainer.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL_CASES)
def test_trl(name):
    trainer_class = trl("grpo_trainer").GRPOTrainer
    preset, added, wanted = TRL_CASES[name]
    case, config = Case(7, 0.5), config_of(preset, **{"kl": {"coef": BETA}, **added})
    loss, gradients, _ = case.loss(config)
    given, _ = with_advantages(case.samples, train_samples(case.samples), config, case.old, case.reference)
    advantages = torch.tensor([float(s.advantages[-1]) for s in given], dtype=torch.float64)
    new = [torch.tensor(case.new[s.sample_id][2:], requires_grad=True) for s in case.samples]
    trainer, inputs = as_trl(case, config, new, advantages)
    trainer.loss_type, trainer.beta = wanted["loss_type"], BETA
    trainer.epsilon_low, trainer.epsilon_high = wanted.get("epsilon_low", 0.2), wanted.get("epsilon_high", 0.2)
    trainer.importance_sampling_level = wanted.get("level", "token")
    trainer.args.delta, trainer.args.use_bias_correction_kl = wanted.get("delta"), wanted.get("unbiased", False)
    if "cap" in wanted:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        rollout = padded([torch.tensor(s.rollout_logprobs, dtype=torch.float64) for s in case.samples])
        inputs["importance_sampling_ratio"] = torch.exp(inputs["old_per_token_logps"] - rollout).clamp(
            max=wanted["cap"]
        )
    theirs = trainer_class._compute_loss(trainer, None, inputs)
    theirs.backward()
    torch.testing.assert_close(loss, theirs.detach(), **NEAR)
    for mine, row in zip(gradients, new, strict=True):
        torch.testing.assert_close(mine, row.grad, **NEAR)


@pytest.mark.slow
def test_trl_rloo():
    trainer_class = trl("rloo_trainer").RLOOTrainer
    case, config = Case(8, 0.1), config_of("rloo", kl={"coef": BETA})
    loss, gradients, _ = case.loss(config)
    given, _ = with_advantages(case.samples, train_samples(case.samples), config, case.old, case.reference)
    new = [torch.tensor(case.new[s.sample_id][2:], requires_grad=True) for s in case.samples]
    advantages = torch.tensor([float(s.advantages[-1]) for s in given], dtype=torch.float64)
    trainer, inputs = as_trl(case, config, new, advantages)
    theirs = trainer_class._compute_loss(trainer, None, inputs)
    theirs.backward()
    torch.testing.assert_close(loss, theirs.detach(), **NEAR)
    for mine, row in zip(gradients, new, strict=True):
        torch.testing.assert_close(mine, row.grad, **NEAR)
    assert math.isfinite(loss)
