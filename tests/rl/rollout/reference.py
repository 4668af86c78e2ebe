"""What transformers computes for a sample's tokens: the truth that engines are compared with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.types import Sample


@cache
def _model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def teacher_forced(path: Path, tokens: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Log-prob of every next token, float32 ``[T-1]``, and routes ``[T-1, L, K]``, sorted within a token."""
    model = _model(Path(path))
    moe = hasattr(model.config, "num_experts_per_tok")
    with torch.no_grad():
        out = model(torch.tensor(tokens[None].astype(np.int64)), **({"output_router_logits": True} if moe else {}))
    logprobs = torch.log_softmax(out.logits[0, :-1].double() / (temperature or 1.0), -1)
    chosen = logprobs.gather(-1, torch.tensor(tokens[1:, None].astype(np.int64)))[:, 0].numpy()
    if not moe:
        return chosen, None
    topk = [logits.topk(model.config.num_experts_per_tok, -1).indices.numpy() for logits in out.router_logits]
    return chosen, np.sort(np.stack(topk, 1)[:-1], -1)


def assert_equals_transformers(
    sample: Sample, path: Path, temperature: float, tolerance: float = 1e-4, routes: np.ndarray | None = None
) -> None:
    """Log-probs of the response within ``tolerance``; routes, as sets per token, 100% equal."""
    logprobs, expected = teacher_forced(path, sample.tokens, temperature)
    np.testing.assert_allclose(sample.rollout_logprobs, logprobs[sample.prompt_length - 1 :], atol=tolerance, rtol=0)
    if expected is None:
        assert sample.routes is None
        return
    assert sample.routes is not None
    assert sample.routes.shape == expected.shape
    captured = sample.routes.handle if routes is None else routes
    np.testing.assert_array_equal(np.sort(captured, -1), expected)
