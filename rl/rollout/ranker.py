"""A small network that puts prompts in the order of their longest responses, trained online; see ``predictors``."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rl.rollout.predictors import _check_kind
from rl.types import Prompt

_MEMORY = 2048  # newest groups that pairs are drawn from
_PAIRS = 256  # of one update
_NEAR = 1.1  # lengths within this ratio are no order worth learning


class Ranker:
    """Scores from hashed tokens and pairs of neighbouring tokens; pairwise logistic loss.

    Every ``every`` groups, a few updates on pairs drawn from the newest groups. Scores become tokens by the
    distribution of the lengths seen: the share of them below is the share of remembered scores below. Deterministic for
    a seed and an order of observations, on CPU.

    Args:
        seed: of the first weights and of the pairs.
        buckets: of the hash.
        hidden: width of the layers.
        every: groups between updates.
        updates: optimizer steps of one update.
        lr: of Adam.

    Source:
        Pairwise logistic ranking loss: Burges et al. 2005, "Learning to Rank using Gradient Descent".
    """

    def __init__(
        self, seed: int = 0, buckets: int = 4096, hidden: int = 32, every: int = 16, updates: int = 8, lr: float = 1e-2
    ) -> None:
        for name, value in (("buckets", buckets), ("hidden", hidden), ("every", every), ("updates", updates)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        self.buckets, self.every, self.updates = buckets, every, updates
        self._shape = [seed, buckets, hidden, every, updates, lr]
        generator = torch.Generator().manual_seed(seed)
        self._embedding = torch.nn.EmbeddingBag(buckets, hidden, mode="mean")
        self._head = torch.nn.Sequential(
            torch.nn.Linear(hidden + 1, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)
        )
        with torch.no_grad():
            for parameter in self._parameters():
                parameter.normal_(0.0, 0.1, generator=generator)
        self._optimizer = torch.optim.Adam(self._parameters(), lr=lr)
        self._memory: list[tuple[np.ndarray, int, float]] = []  # buckets, prompt tokens, longest response
        self._rng = np.random.default_rng(seed)
        self._since = 0

    def predict(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if not self._memory or not prompts:
            return np.full(len(prompts), np.nan)
        remembered = np.sort(self._score([(ids, length) for ids, length, _ in self._memory]))
        scores = self._score([(self._hash(prompt.tokens), len(prompt.tokens)) for prompt in prompts])
        below = (np.searchsorted(remembered, scores, "left") + np.searchsorted(remembered, scores, "right")) / 2
        lengths = [longest for _, _, longest in self._memory]
        tokens = np.quantile(lengths, np.clip(below / len(remembered), 0, 1))
        # Among those beyond all that is remembered the order stays: a hair apart.
        return tokens * (1 + 1e-6 * (np.argsort(np.argsort(scores)) / max(1, len(scores))))

    def observe(self, prompt: Prompt, lengths: Sequence[int]) -> None:
        if not lengths:
            return
        self._memory.append((self._hash(prompt.tokens), len(prompt.tokens), float(max(1, *lengths))))
        del self._memory[: max(0, len(self._memory) - _MEMORY)]
        self._since += 1
        if self._since >= self.every and len(self._memory) >= 2:
            self._since = 0
            for _ in range(self.updates):
                self._update()

    def to_json(self) -> dict[str, Any]:
        buffer = io.BytesIO()
        torch.save(
            {
                "embedding": self._embedding.state_dict(),
                "head": self._head.state_dict(),
                "optimizer": self._optimizer.state_dict(),
            },
            buffer,
        )
        return {
            "kind": "ranker",
            "shape": self._shape,
            "weights": base64.b64encode(zlib.compress(buffer.getvalue())).decode(),
            "memory": [[ids.tolist(), length, longest] for ids, length, longest in self._memory],
            "random": self._rng.bit_generator.state,
            "since": self._since,
        }

    def restore(self, value: Mapping[str, Any]) -> None:
        _check_kind(value, "ranker")
        if list(value["shape"]) != self._shape:
            raise ValueError(
                f"expected the state of a ranker with (seed, buckets, hidden, every, updates, lr) = {self._shape}, got "
                f"{list(value['shape'])}; resume with the settings that the run began with"
            )
        data = io.BytesIO(zlib.decompress(base64.b64decode(value["weights"])))
        state = torch.load(data, weights_only=True)
        self._embedding.load_state_dict(state["embedding"])
        self._head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._memory = [(np.array(ids, dtype=np.int64), length, longest) for ids, length, longest in value["memory"]]
        self._rng.bit_generator.state = value["random"]
        self._since = int(value["since"])

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self._embedding.parameters(), *self._head.parameters()]

    def _hash(self, tokens: np.ndarray) -> np.ndarray:
        """int64 ``[<= 2P]``: buckets of tokens and of pairs of neighbours, each once."""
        ids = np.asarray(tokens, dtype=np.uint64)
        pairs = ids[:-1] * np.uint64(1_000_003) + ids[1:] + np.uint64(1 << 40)
        # Knuth's multiplicative hash; the high bits are the mixed ones.
        mixed = (np.concatenate([ids, pairs]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
        return np.unique((mixed % np.uint64(self.buckets)).astype(np.int64))

    def _forward(self, prompts: Sequence[tuple[np.ndarray, int]]) -> torch.Tensor:
        """float32 ``[N]``."""
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in prompts]))
        offsets = torch.from_numpy(np.cumsum([0] + [len(ids) for ids, _ in prompts[:-1]]))
        lengths = torch.log1p(torch.tensor([[float(length)] for _, length in prompts])) / 8
        return self._head(torch.cat([self._embedding(ids, offsets), lengths], dim=1)).squeeze(1)

    def _score(self, prompts: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        with torch.no_grad():
            return self._forward(prompts).numpy().astype(np.float64)

    def _update(self) -> None:
        chosen = self._rng.integers(len(self._memory), size=(_PAIRS, 2))
        lengths = np.array([self._memory[i][2] for i in range(len(self._memory))])
        first, second = lengths[chosen[:, 0]], lengths[chosen[:, 1]]
        chosen = chosen[np.maximum(first, second) > _NEAR * np.minimum(first, second)]
        if not len(chosen):
            return
        used, places = np.unique(chosen, return_inverse=True)
        scores = self._forward([self._memory[i][:2] for i in used.tolist()])[torch.from_numpy(places.reshape(-1, 2))]
        longer = torch.from_numpy(np.sign(lengths[chosen[:, 0]] - lengths[chosen[:, 1]])).float()
        loss = torch.nn.functional.softplus(-longer * (scores[:, 0] - scores[:, 1])).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
