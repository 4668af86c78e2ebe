"""What the fields of ``fuse`` demand of each other and of other sections; see ``rules``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rl.config.fused_training import fused_partner
from rl.config.sections import RunConfig
from rl.config.violations import Violation


def fuse(config: RunConfig) -> Iterator[Violation]:
    partner = fused_partner(config)
    if config.fuse.training.mode == "on" and partner.name is None:
        yield Violation("fuse.training.mode", f"{partner.reason}; or set it to auto or off.", partner.fields)
    yield from _tail(config)


def _tail(config: RunConfig) -> Iterator[Violation]:
    tail, stream, trainer = config.fuse.tail, config.stream, config.trainer
    if not tail.enabled:
        return
    if stream.overlapped:
        yield Violation(
            "fuse.tail.enabled",
            "with stream.pipelining passes run on samples as they arrive, and with stream.staleness engines go on with "
            "the next batch, so there is no tail to fill; set it to false, or pipelining: false and staleness: 0.",
            ("stream.pipelining", "stream.staleness"),
        )
    if not config.infers:
        yield Violation(
            "fuse.tail.enabled",
            "there is no pass to run on finished samples: old log-probs are rollout's, and there is no reference, "
            "critic or reward model; set it to false, or algorithm.old_logprobs: recompute.",
            ("algorithm.old_logprobs", "algorithm.kl.coef"),
        )
    if not stream.colocated:
        return
    if config.rollout.engines < 2:
        yield Violation(
            "rollout.engines",
            "a single engine is never freed before generation ends: expected at least 2 with fuse.tail.enabled and "
            f"stream.colocated, came {config.rollout.engines}; raise it or set fuse.tail.enabled to false.",
            ("fuse.tail.enabled",),
        )
    if tail.threshold == "auto" and stream.latency_profile is None:
        yield Violation(
            "stream.latency_profile",
            "fuse.tail.threshold: auto is chosen by simulation with measured latencies; make the file with "
            "scripts/measure_latency.py, or give threshold a number of samples.",
            ("fuse.tail.threshold",),
        )
    if config.rollout.device != "cuda":
        return
    if config.balance.enabled:
        yield Violation(
            "fuse.tail.enabled",
            "on GPUs that engines share, only some trainer ranks run passes in the tail, which balancing does not "
            "know; set it to false, or balance.enabled to false.",
            ("balance.enabled",),
        )
    parallel = trainer.parallel
    block, stage = math.lcm(parallel.tp, parallel.etp * parallel.ep), max(1, trainer.ranks // parallel.pp)
    if block >= stage:
        yield Violation(
            "fuse.tail.enabled",
            f"a pass needs whole copies of the model, and the {trainer.ranks} ranks hold one: no GPUs that are freed "
            f"while others generate could run it. Lower trainer.parallel (a copy takes lcm(tp, etp*ep) * pp = "
            f"{block * parallel.pp} ranks), raise trainer.ranks, or set it to false.",
            ("trainer.parallel", "trainer.ranks"),
        )
