"""What a micro-batch of one model takes in one pipeline stage, before anything of a run was measured.

    expected = expected_memory(config, arch)
    held, passing = expected("actor", 0, 8192)      # bytes, in the first stage, of a micro-batch of 8,192 rows

Counted by ``activations``, with what the allocator holds beyond tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rl.config import RunConfig
from rl.models.architecture import Architecture
from rl.planning import constants
from rl.planning.activations import logits, logits_forward
from rl.planning.memory import ModelOnRanks, kept, passing_forward, passing_layer
from rl.planning.plan import models_on_ranks


def expected_memory(config: RunConfig, arch: Architecture) -> Callable[[str, int, int], tuple[float, float]]:
    """From a model's name, its stage and the rows of a micro-batch to the bytes that it holds until its backward, and
    those that come and go within its operations."""
    models = {model.name: model for model in models_on_ranks(config, arch)}

    def expected(name: str, stage: int, rows: int) -> tuple[float, float]:
        model = models[name]
        return of_micro_batch(replace(model, work=replace(model.work, tokens=rows)), stage)

    return expected


def of_micro_batch(model: ModelOnRanks, stage: int) -> tuple[float, float]:
    """(held, passing) bytes of a micro-batch of ``model.work.tokens`` rows; a model that is not trained holds none.

    Logits are held: in 1F1B the last stage's backward follows its forward at once, in a fused schedule it need not.
    Communicators of neighbouring stages come with the first step, so they are part of what passes.
    """
    if not model.trained:
        held, moving = 0, passing_forward(model, stage)
    else:
        held, moving = kept(model, stage, 1), passing_layer(model, stage)
        if stage == model.parallel.pp - 1:
            whole, forward = (f(model.arch, model.parallel, model.work) for f in (logits, logits_forward))
            held, moving = held + forward, max(moving, whole - forward)
    neighbours = (stage > 0) + (stage < model.parallel.pp - 1)
    beyond = 1 + constants.ALLOCATOR_SHARE
    return beyond * held, beyond * moving + neighbours * constants.PEER_BYTES
