"""The values that pass between the parts of the loop: prompts, samples and references to routes.

Everything here is immutable, picklable and free of Ray, vLLM and Megatron imports, so that algorithms, data and
tests can use it alone.

Shapes: P prompt tokens, R response tokens, T = P + R tokens, L MoE layers, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One problem of the data set, stamped with its place in the epoch.

    Attributes:
        uid: unique in the run, ``"<split>/<epoch>/<ordinal>"``.
        ordinal: position in the (shuffled) epoch; what the ledger and resume count.
        epoch: which pass over the data this is, from 0.
        text: the prompt after the chat template, exactly what was tokenised.
        tokens: int32 ``[P]``.
        label: what the reward compares with; any JSON value.
        metadata: anything else the data set carried, JSON values. ``max_tokens`` limits the response's tokens.
    """

    uid: str
    ordinal: int
    epoch: int
    text: str
    tokens: np.ndarray
    label: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RouteRef:
    """Where the routes of one sample are; the rows themselves are not in here.

    Attributes:
        handle: a Ray ``ObjectRef`` of a uint8/uint16 array ``[rows, L, K]``, or the array itself outside Ray. Samples
            that came in one answer share one, since fetching an object for each takes longer than its bytes.
        engine: index of the engine that produced (and slices) it.
        shape: ``(T-1, L, K)``.
        dtype: ``"uint8"`` or ``"uint16"``: the smallest unsigned type that holds every expert id.
        sample_id: whose they are, for errors.
        first: row of the array where this sample's begin.
    """

    handle: Any
    engine: int
    shape: tuple[int, int, int]
    dtype: str
    sample_id: str = ""
    first: int = 0

    def of(self, array: np.ndarray) -> np.ndarray:
        """This sample's rows ``[T-1, L, K]`` of the handle's array, a view."""
        return array[self.first : self.first + self.shape[0]]


@dataclass(frozen=True)
class Sample:
    """One generated response with everything that training needs of it.

    Attributes:
        sample_id: ``"<prompt uid>/<k>"``, k-th sample of its prompt.
        prompt: the prompt it answers.
        response_tokens: int32 ``[R]``; ends with the stop token when ``finish_reason == "stop"``.
        rollout_logprobs: float32 ``[R]``, natural log, under the policy that sampled (temperature applied).
        weight_versions: spans ``(first response token, version)`` in order; the first starts at 0.
        finish_reason: ``"stop"``, ``"length"`` or ``"abort"``.
        routes: reference to ``[T-1, L, K]`` expert ids, row i being what token i met; None for dense models.
        histogram: int32 ``[L, E]``, how often each expert occurs in those rows; None for dense models.
        route_digests: uint64 ``[L]``, see ``megatron_ultraep.replay.layer_digests``; None for dense models.
        response_text: the response decoded without special tokens.
        learnt_tokens: how many of the first response tokens are learnt from; None: all. Fewer where a benchmark made
            the response go on past its end.
        reward: set by the reward step, None before.
        reward_error: why the reward could not be computed, None if it could.
    """

    sample_id: str
    prompt: Prompt
    response_tokens: np.ndarray
    rollout_logprobs: np.ndarray
    weight_versions: tuple[tuple[int, int], ...]
    finish_reason: FinishReason
    routes: RouteRef | None
    histogram: np.ndarray | None
    route_digests: np.ndarray | None = None
    response_text: str = ""
    learnt_tokens: int | None = None
    reward: float | None = None
    reward_error: str | None = None

    @property
    def tokens(self) -> np.ndarray:
        """int32 ``[T]``: prompt then response."""
        return np.concatenate([self.prompt.tokens, self.response_tokens])

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.tokens)

    @property
    def length(self) -> int:
        """T, prompt and response together."""
        return len(self.prompt.tokens) + len(self.response_tokens)
