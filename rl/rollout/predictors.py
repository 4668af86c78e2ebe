"""How long will the responses to a prompt be? Dispatch isolates the longest, so only the order matters.

    predictor = get_predictor("history")
    tokens = predictor.predict(prompts)             # [N], of each prompt's longest response
    predictor.observe(prompt, lengths)              # once its group is complete

- ``features``: ridge regression of the logarithm of the longest response on a few numbers of the prompt, updated
  exactly after every group (it keeps sums, not samples).
- ``history``: the mean of what the same prompt gave in earlier epochs; ``features`` for prompts never seen.
- ``ranker``: a small network on hashed tokens and pairs of tokens, trained online to put pairs of prompts in order.
- ``oracle``: the truth, from a table; for benchmarks and tests.

State goes through ``to_json`` and ``restore``, so that a run goes on after a resume as if it had not stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rl.types import Prompt


class LengthPredictor(Protocol):
    """Predicts the longest response of a prompt's group, in tokens."""

    def predict(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 ``[N]``, tokens; NaN where there is nothing to go by."""
        ...

    def observe(self, prompt: Prompt, lengths: Sequence[int]) -> None:
        """Response tokens of all samples of a prompt."""
        ...

    def to_json(self) -> dict[str, Any]:
        """State as JSON values."""
        ...

    def restore(self, value: Mapping[str, Any]) -> None:
        """Take up a state from ``to_json``; ValueError: it is another predictor's."""
        ...


def recall_of_longest(predicted: np.ndarray, actual: np.ndarray, fraction: float = 0.2) -> float:
    """Share of the truly longest ``fraction`` that is among the longest predicted; ties break by position.

    Args:
        predicted, actual: float ``[N]``; only their order matters.

    Raises:
        ValueError: shapes differ, there is nothing, or ``fraction`` is not in (0, 1].
    """
    predicted, actual = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if predicted.shape != actual.shape or predicted.ndim != 1 or not len(actual) or not 0 < fraction <= 1:
        raise ValueError(
            f"expected predictions and lengths of the same prompts, [N] each, and a fraction in (0, 1], got "
            f"{predicted.shape}, {actual.shape} and {fraction}"
        )
    count = max(1, round(fraction * len(actual)))
    found = set(np.argsort(-predicted, kind="stable")[:count].tolist())
    return len(found & set(np.argsort(-actual, kind="stable")[:count].tolist())) / count


def prompt_key(prompt: Prompt) -> str:
    """What a prompt is recognised by in another epoch: a digest of its tokens (``uid`` names the epoch too)."""
    return hashlib.blake2b(np.ascontiguousarray(prompt.tokens, dtype=np.int32).tobytes(), digest_size=12).hexdigest()


def prompt_features(prompt: Prompt) -> np.ndarray:
    """float64 ``[7]``: one, length, its logarithm, shares of digits, line breaks and capitals, difficulty.

    ``metadata["difficulty"]`` is read when it is a number.
    """
    text, length = prompt.text, len(prompt.tokens)
    size = max(len(text), 1)
    difficulty = prompt.metadata.get("difficulty")
    return np.array(
        [
            1.0,
            length / 1000.0,
            math.log1p(length),
            sum(letter.isdigit() for letter in text) / size,
            text.count("\n") / size,
            sum(letter.isupper() for letter in text) / size,
            float(difficulty) if isinstance(difficulty, (int, float)) else 0.0,
        ]
    )


class Features:
    """Ridge regression on :func:`prompt_features`.

    Args:
        ridge: strength of the pull towards 0 (of all but the constant).
    """

    def __init__(self, ridge: float = 1.0) -> None:
        if not ridge > 0:
            raise ValueError(f"expected ridge > 0, got {ridge}")
        self.ridge = ridge
        size = len(prompt_features(Prompt("", 0, 0, "", np.zeros(0, np.int32))))
        self.products, self.targets, self.count = np.zeros((size, size)), np.zeros(size), 0

    def predict(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if not self.count:
            return np.full(len(prompts), np.nan)
        # The constant is hardly pulled: with nothing else to go by, the mean is predicted.
        pull = np.diag([1e-6 * self.ridge] + [self.ridge] * (len(self.targets) - 1))
        weights = np.linalg.solve(self.products + pull, self.targets)
        features = np.array([prompt_features(prompt) for prompt in prompts]).reshape(len(prompts), len(weights))
        return np.exp(np.clip(features @ weights, 0.0, 20.0))

    def observe(self, prompt: Prompt, lengths: Sequence[int]) -> None:
        if not lengths:
            return
        features = prompt_features(prompt)
        self.products += np.outer(features, features)
        self.targets += features * math.log(max(1, *lengths))
        self.count += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "features",
            "products": self.products.tolist(),
            "targets": self.targets.tolist(),
            "count": self.count,
        }

    def restore(self, value: Mapping[str, Any]) -> None:
        _check_kind(value, "features")
        self.products, self.targets = np.array(value["products"]), np.array(value["targets"])
        self.count = int(value["count"])


class History:
    """Mean over earlier groups of the same prompt; other prompts by :class:`Features`.

    Args:
        decay: weight of what was known against the newest group's longest response; 0 keeps only the newest.
        ridge: of the features.
    """

    def __init__(self, decay: float = 0.5, ridge: float = 1.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay from 0 up to 1, got {decay}")
        self.decay = decay
        self.features = Features(ridge)
        self.known: dict[str, float] = {}

    def predict(self, prompts: Sequence[Prompt]) -> np.ndarray:
        tokens = self.features.predict(prompts)
        for i, prompt in enumerate(prompts):
            tokens[i] = self.known.get(prompt_key(prompt), tokens[i])
        return tokens

    def observe(self, prompt: Prompt, lengths: Sequence[int]) -> None:
        if not lengths:
            return
        self.features.observe(prompt, lengths)
        key, longest = prompt_key(prompt), float(max(lengths))
        before = self.known.get(key, longest)
        self.known[key] = self.decay * before + (1 - self.decay) * longest

    def to_json(self) -> dict[str, Any]:
        return {"kind": "history", "known": dict(self.known), "features": self.features.to_json()}

    def restore(self, value: Mapping[str, Any]) -> None:
        _check_kind(value, "history")
        self.known = {key: float(tokens) for key, tokens in value["known"].items()}
        self.features.restore(value["features"])


class Oracle:
    """The truth.

    Args:
        table: tokens of the longest response, by prompt uid.
    """

    def __init__(self, table: Mapping[str, float]) -> None:
        self.table = dict(table)

    def predict(self, prompts: Sequence[Prompt]) -> np.ndarray:
        missing = [prompt.uid for prompt in prompts if prompt.uid not in self.table]
        if missing:
            raise ValueError(f"the oracle's table lacks {len(missing)} prompts, the first is {missing[0]}")
        return np.array([float(self.table[prompt.uid]) for prompt in prompts])

    def observe(self, prompt: Prompt, lengths: Sequence[int]) -> None:
        """It knows."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "oracle"}

    def restore(self, value: Mapping[str, Any]) -> None:
        _check_kind(value, "oracle")


def get_predictor(name: str, **settings: Any) -> LengthPredictor:
    """The predictor of that name: "features", "history", "ranker" or "oracle"; settings are its arguments.

    Raises:
        ValueError: no such predictor, or a setting that it does not have, lacks or cannot use.
    """
    from rl.rollout.ranker import Ranker  # imports torch; the others do without

    known: dict[str, Callable[..., LengthPredictor]] = {
        "features": Features,
        "history": History,
        "ranker": Ranker,
        "oracle": Oracle,
    }
    if name not in known:
        raise ValueError(f"expected a length predictor, one of {', '.join(known)}; got {name!r}")
    try:
        return known[name](**settings)
    except TypeError as error:
        raise ValueError(f"settings {', '.join(settings)} do not suit length predictor {name!r}: {error}") from error


def _check_kind(value: Mapping[str, Any], kind: str) -> None:
    if value.get("kind") != kind:
        raise ValueError(
            f"expected the state of a {kind!r} predictor, got that of {value.get('kind')!r}; resume with the predictor "
            "that the run began with"
        )
