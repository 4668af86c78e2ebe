"""Whether actor and partner train in one pipeline schedule, and if not, why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rl.config.sections import RunConfig


@dataclass(frozen=True)
class Partner:
    """Who fills the bubbles of the actor's pipeline.

    Attributes:
        name: None where nobody does.
        reason: why nobody does, with what to change; empty where somebody does.
        fields: of the configuration, that the reason is about.
    """

    name: Literal["critic", "reference"] | None
    reason: str = ""
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"off: {self.reason}" if self.name is None else f"on, the {self.name} in the actor's pipeline bubbles"


def fused_partner(config: RunConfig) -> Partner:
    """The actor's partner in fused training, by what a configuration says."""
    if config.fuse.training.mode == "off":
        return Partner(None, "fuse.training.mode says so", ("fuse.training.mode",))
    parallel, algorithm = config.trainer.parallel, config.algorithm
    if parallel.pp == 1:
        return Partner(
            None, "a pipeline of one stage (trainer.parallel.pp = 1) has no bubbles", ("trainer.parallel.pp",)
        )
    if parallel.vpp > 1:
        return Partner(
            None, "virtual pipeline stages have a schedule of their own; set trainer.parallel.vpp to 1",
            ("trainer.parallel.vpp",),
        )  # fmt: skip
    if config.stream.pipelining:
        return Partner(
            None, "with stream.pipelining groups train as they arrive, in chunks too small to fuse",
            ("stream.pipelining",),
        )  # fmt: skip
    if config.critic is not None:
        return _fits(config, "critic", "critic.parallel")
    if not config.keeps_reference:
        return Partner(
            None, f"{algorithm.advantage} without a critic and without a reference (algorithm.kl.coef = 0) trains one "
            "model, and there is no second one to fill its bubbles", ("algorithm.advantage", "algorithm.kl.coef"),
        )  # fmt: skip
    if algorithm.kl.apply_in == "reward":
        return Partner(
            None, "rewards need the reference's log-probs before anything trains; set algorithm.kl.in to loss",
            ("algorithm.kl.in",),
        )  # fmt: skip
    if algorithm.mini_batches == 1:
        return Partner(
            None, "a loss needs the reference's log-probs before it, and there is no earlier mini-batch beside which "
            "they could be taken; raise algorithm.mini_batches", ("algorithm.mini_batches",),
        )  # fmt: skip
    if config.fuse.tail.enabled:
        return Partner(
            None, "the reference's log-probs are taken in the tail of generation", ("fuse.tail.enabled",)
        )  # fmt: skip
    return _fits(config, "reference", "reference.parallel")


def _fits(config: RunConfig, name: Literal["critic", "reference"], field: str) -> Partner:
    """The partner, if its layout can be laid over the nodes of the actor's pipeline."""
    nodes = config.trainer.parallel.pp
    node = config.trainer.ranks // nodes
    own = config.layouts.get(field, config.trainer.parallel)
    if own.vpp > 1:
        return Partner(None, f"virtual pipeline stages have a schedule of their own; set {field}.vpp to 1", (field,))
    if nodes % own.pp:
        return Partner(
            None, f"the {name}'s {own.pp} stages do not divide the actor's {nodes}; change {field}.pp", (field,)
        )
    block = math.lcm(own.tp, own.etp * own.ep)
    if node % block:
        return Partner(
            None,
            f"a stage of the {name} takes lcm(tp, etp*ep) = {block} ranks, which do not divide the {node} of a stage "
            f"of the actor; change {field}",
            (field, "trainer.ranks"),
        )
    return Partner(name)
