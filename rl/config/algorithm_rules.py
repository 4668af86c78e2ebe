"""What the fields of ``algorithm`` demand of each other and of other sections; see ``rules``."""

from __future__ import annotations

from collections.abc import Iterator

from rl.config.algorithm import COMPARED, WHITENED
from rl.config.sections import RunConfig
from rl.config.violations import Violation


def algorithm(config: RunConfig) -> Iterator[Violation]:
    for rule in (_advantage, _loss, _importance, _dynamic_sampling, _overlong, _pipelining):
        yield from rule(config)


def _advantage(config: RunConfig) -> Iterator[Violation]:
    section, per_prompt = config.algorithm, config.data.samples_per_prompt
    if per_prompt < 2 and section.advantage in COMPARED and not section.zero_advantages:
        yield Violation(
            "data.samples_per_prompt",
            f"{section.advantage} compares samples of one prompt: expected at least 2, came {per_prompt} (every "
            "advantage would be 0); raise it.",
            ("algorithm.advantage", "algorithm.zero_advantages"),
        )
    if section.advantage in WHITENED and config.stream.pipelining:
        yield Violation(
            "algorithm.advantage",
            f"{section.advantage} is whitened over all tokens of an iteration, and with stream.pipelining it trains "
            "before they have come; choose another, or pipelining: false.",
            ("stream.pipelining",),
        )


def _loss(config: RunConfig) -> Iterator[Violation]:
    section, kl = config.algorithm, config.algorithm.kl
    if section.loss == "ppo_sequence" and section.aggregation != "sequence_mean":
        yield Violation(
            "algorithm.aggregation",
            "ppo_sequence gives every token the loss of its whole response, so adding tokens up would count lengths "
            f"twice: expected sequence_mean, came {section.aggregation}; set it.",
            ("algorithm.loss",),
        )
    if section.loss == "ppo_sequence" and section.advantage in ("gae", "reinforce++"):
        yield Violation(
            "algorithm.loss",
            f"ppo_sequence takes a response as one action, and {section.advantage} gives each token an advantage of "
            "its own; choose ppo_clip, or another advantage.",
            ("algorithm.advantage",),
        )
    if section.dual_clip is not None and section.loss != "ppo_clip":
        yield Violation(
            "algorithm.dual_clip",
            f"only ppo_clip has it: expected null with loss: {section.loss}, came {section.dual_clip}; remove it.",
            ("algorithm.loss",),
        )
    if kl.weighted and (kl.apply_in != "loss" or kl.estimator not in ("k1", "k3")):
        yield Violation(
            "algorithm.kl.weighted",
            f"the ratio makes k1 and k3 in the loss unbiased; expected false with {kl.estimator} in the "
            f"{kl.apply_in}, came true; remove it.",
            ("algorithm.kl.estimator", "algorithm.kl.in"),
        )


def _importance(config: RunConfig) -> Iterator[Violation]:
    section, importance = config.algorithm, config.algorithm.importance
    for name, given in (
        ("truncation", None if importance.truncation == "auto" else importance.truncation),
        ("band", importance.band),
    ):
        if given is not None and section.old_logprobs == "rollout":
            came = list(given) if isinstance(given, tuple) else given
            yield Violation(
                f"algorithm.importance.{name}",
                "it weighs recomputed old log-probs against rollout's, and algorithm.old_logprobs is rollout; expected "
                f"null, came {came}; set `old_logprobs: recompute` or {name} to null.",
                ("algorithm.old_logprobs",),
            )
    if importance.band is not None and not 0 <= importance.band[0] < importance.band[1]:
        yield Violation(
            "algorithm.importance.band",
            f"expected two ratios 0 <= low < high, came {list(importance.band)}; [0.5, 5.0] is usual.",
        )
    if importance.level != "token" and config.importance_cap is None and importance.band is None:
        yield Violation(
            "algorithm.importance.level",
            f"nothing is weighed or left out, so there is nothing to take at the level {importance.level}; set "
            "truncation or band, or remove it.",
            ("algorithm.importance.truncation", "algorithm.importance.band"),
        )


def _dynamic_sampling(config: RunConfig) -> Iterator[Violation]:
    if not config.algorithm.dynamic_sampling.enabled:
        return
    path = "algorithm.dynamic_sampling.enabled"
    if config.run.steps is None:
        yield Violation(
            path,
            "how many prompts an iteration takes is not known before, so epochs do not say how many iterations there "
            "are; set run.steps (epochs follow one another), or enabled: false.",
            ("run.steps",),
        )
    if config.stream.overlapped:
        yield Violation(
            path,
            "with stream.pipelining groups train before it is known which are left out, and with stream.staleness the "
            "next prompts are under way by then; set it to false, or pipelining: false and staleness: 0.",
            ("stream.pipelining", "stream.staleness"),
        )
    if config.fuse.tail.enabled:
        yield Violation(
            path,
            "passes beside the tail run on samples before it is known which are left out; set it to false, or "
            "fuse.tail.enabled to false.",
            ("fuse.tail.enabled",),
        )
    if config.reward.model is not None:
        yield Violation(
            path,
            "it compares the rewards of the reward function, and the reward model's scores come after generation; set "
            "it to false, or remove reward.model.",
            ("reward.model",),
        )
    if config.data.samples_per_prompt < 2:
        yield Violation(
            path,
            "one sample of a prompt has nothing to differ from, so every group would be left out; raise "
            "data.samples_per_prompt to 2 or more, or set it to false.",
            ("data.samples_per_prompt",),
        )


def _overlong(config: RunConfig) -> Iterator[Violation]:
    overlong, longest = config.algorithm.overlong, config.sampling.max_tokens
    if overlong.buffer != "auto" and overlong.buffer > longest:
        yield Violation(
            "algorithm.overlong.buffer",
            f"expected at most sampling.max_tokens = {longest}, came {overlong.buffer}; lower it.",
            ("sampling.max_tokens",),
        )
    if overlong.filter and config.sampling.forced_lengths is not None:
        yield Violation(
            "algorithm.overlong.filter",
            "sampling.forced_lengths cuts off every response, so nothing would be learnt from; set it to false.",
            ("sampling.forced_lengths",),
        )


def _pipelining(config: RunConfig) -> Iterator[Violation]:
    if not config.stream.pipelining:
        return
    section = config.algorithm
    for name, untested, instead in (
        ("loss", section.loss != "ppo_clip", "ppo_clip"),
        ("dual_clip", section.dual_clip is not None, "null"),
        ("aggregation", section.aggregation == "sequence_sum", "token_mean or sequence_mean"),
        ("kl.weighted", section.kl.weighted, "false"),
        ("importance.band", section.importance.band is not None, "null"),
        ("importance.level", section.importance.level != "token", "token"),
    ):
        if untested:
            yield Violation(
                f"algorithm.{name}",
                f"it has not been tested on groups that arrive one by one; with stream.pipelining set it to {instead}, "
                "or pipelining to false.",
                ("stream.pipelining",),
            )
