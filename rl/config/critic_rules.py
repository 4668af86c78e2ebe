"""What a critic, the reference and a reward model demand of other sections; see ``rules``."""

from __future__ import annotations

from collections.abc import Iterator

from rl.config.sections import RunConfig
from rl.config.violations import Violation


def critic(config: RunConfig) -> Iterator[Violation]:
    section, algorithm = config.critic, config.algorithm
    if algorithm.advantage == "gae" and section is None:
        yield Violation(
            "algorithm.advantage",
            "gae needs a critic's values, and there is no section `critic`; add it (`critic: {}` for its defaults), or "
            "set advantage: grpo.",
            ("critic",),
        )
    if section is not None and algorithm.advantage != "gae":
        yield Violation(
            "critic",
            f"nothing asks a critic with algorithm.advantage: {algorithm.advantage}; remove the section, or set "
            "advantage: gae.",
            ("algorithm.advantage",),
        )
    if algorithm.advantage == "gae" and algorithm.gae.whiten and config.stream.pipelining:
        yield Violation(
            "algorithm.gae.whiten",
            "advantages are whitened over all tokens of an iteration, and with stream.pipelining it trains before they "
            "have come; set whiten: false, or pipelining: false.",
            ("stream.pipelining", "algorithm.advantage"),
        )
    steps = config.run.steps
    if section is not None and steps is not None and section.warmup_steps >= steps:
        yield Violation(
            "critic.warmup_steps",
            f"expected fewer than run.steps = {steps}, came {section.warmup_steps}: the actor would never learn; lower "
            "it or raise run.steps.",
            ("run.steps",),
        )
    field = "critic.parallel" if section is not None and section.parallel is not None else "trainer.parallel"
    if section is not None and config.layouts[field].vpp > 1:
        yield Violation(
            f"{field}.vpp",
            "a critic's gradients are not tested with virtual pipeline stages; set it to 1, or give critic.parallel "
            "sizes of its own.",
            ("critic",),
        )
    if config.reference.parallel is not None and not config.keeps_reference:
        yield Violation(
            "reference.parallel",
            "there is no reference model, because algorithm.kl.coef is 0; remove it or set the coefficient.",
            ("algorithm.kl.coef",),
        )
