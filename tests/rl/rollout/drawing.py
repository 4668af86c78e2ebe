"""Figures about the kernel that draws tokens, from a process of its own: ``python -m tests.rl.rollout.drawing cpu``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
DRAWS = 60_000


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic of drawn ids against their probabilities; its mean is ``len(expected) - 1``."""
    counts = np.bincount(tokens, minlength=len(expected))
    wanted = expected * len(tokens)
    return float(((counts - wanted) ** 2 / wanted).sum())


def figures(device: torch.device) -> dict[str, Any]:
    """Of :func:`rl.rollout.compat.gumbel_argmax` on a device:

    - ``positions``, ``seeds``: chi-square of draws of one seed at many positions, and of many seeds at one.
    - ``pairs``: the same of pairs of neighbours, which are independent or not.
    - ``alone``, ``shuffled``: rows, of 64, that draw otherwise alone or in another order. Logits are equal over a
      large vocabulary, so that noise decides.
    - ``distinct``: different tokens among the 64.
    - ``last``: largest token drawn from a vocabulary whose last token alone is possible.
    """
    from rl.rollout import compat

    if device.type == "cpu":
        import vllm.v1.worker.cpu_worker  # noqa: F401  (loads the CPU extension)

    kernel = compat.gumbel_argmax(device)

    def draw(logits: np.ndarray, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        tensor = torch.tensor(np.broadcast_to(logits, (len(seeds), logits.shape[-1])), dtype=torch.float32)
        drawn = kernel(tensor.to(device), seeds.astype(np.int64), positions.astype(np.int64))
        assert drawn.dtype == torch.int64
        return drawn.cpu().numpy()

    many, fixed = np.arange(DRAWS), np.full(DRAWS, 1234)
    logits = np.log(PROBABILITIES) + 3
    by_position, by_seed = draw(logits, fixed, many), draw(logits, many, fixed)
    return {
        "positions": chi_square(by_position, PROBABILITIES),
        "seeds": chi_square(by_seed, PROBABILITIES),
        "pairs": [pairs(by_position), pairs(by_seed)],
    } | composition(draw)


def pairs(tokens: np.ndarray) -> float:
    both = tokens[::2] * len(PROBABILITIES) + tokens[1::2]
    return chi_square(both, np.outer(PROBABILITIES, PROBABILITIES).ravel())


def composition(draw: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> dict[str, int]:
    random = np.random.default_rng(0)
    seeds, positions, flat = random.integers(0, 2**31, 64), random.integers(0, 4096, 64), np.zeros(20_000)
    together, order = draw(flat, seeds, positions), random.permutation(64)
    alone = np.array([draw(flat, seeds[i : i + 1], positions[i : i + 1])[0] for i in range(64)])
    only_last = np.full(20_000, -np.inf)
    only_last[-1] = 0
    return {
        "alone": int((alone != together).sum()),
        "shuffled": int((draw(flat, seeds[order], positions[order]) != together[order]).sum()),
        "distinct": len(set(together.tolist())),
        "last": int(draw(only_last, seeds, positions).min()),
    }


if __name__ == "__main__":
    print(json.dumps(figures(torch.device(sys.argv[1]))))
