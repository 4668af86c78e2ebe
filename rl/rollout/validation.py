"""Checks on samples as they leave an engine; what fails is refused with its id and a reason, never trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ultraep.replay import validation as replay


@dataclass(frozen=True)
class RefusedSample:
    """A sample that must not be trained on.

    Attributes:
        sample_id: as it would have been in ``Sample``.
        prompt_uid: of its prompt.
        reason: why, as a sentence; of the last attempt.
        attempts: how often it was generated.
    """

    sample_id: str
    prompt_uid: str
    reason: str
    attempts: int


def check_routes(
    routes: npt.NDArray[np.integer] | None, tokens: int, moe_layers: int, experts: int, topk: int
) -> str | None:
    """Why these routes must not be trained on, or None.

    Args:
        routes: int ``[tokens - 1, moe_layers, topk]``; None where the engine returned none.
        tokens: prompt and response tokens together; the last one met no router.
        moe_layers: MoE layers of the model, dense layers not counted.
        experts, topk: of the model.
    """
    if routes is None:
        return f"expected routes of {tokens - 1} rows, the engine returned none: is capture_routes on?"
    return replay.check_routes(routes, rows=tokens - 1, moe_layers=moe_layers, experts=experts, topk=topk)


def check_logprobs(logprobs: npt.NDArray[np.floating], tokens: int) -> str | None:
    """Why these log-probs of ``tokens`` response tokens must not be trained on, or None."""
    if logprobs.shape != (tokens,):
        return f"expected one log-prob for each of {tokens} response tokens, got shape {logprobs.shape}"
    bad = ~np.isfinite(logprobs) | (logprobs > 0)
    if bad.any():
        first = int(np.argmax(bad))
        return f"expected finite log-probs <= 0, got {logprobs[first]} at response token {first} ({int(bad.sum())} bad)"
    return None
