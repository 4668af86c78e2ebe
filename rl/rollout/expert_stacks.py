"""Experts of a layer as one tensor on their way into an engine.

vLLM loads tensor by tensor, a fraction of a millisecond of host time each; a model with 128 experts in 48 layers has
18,000 of them. Its loaders of experts take a matrix of all just as well, under the name of the first: three tensors a
layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_EXPERT = re.compile(r"^(?P<before>.+\.experts\.)(?P<expert>\d+)(?P<after>\..+)$")
Key = tuple[str, str]


class ExpertStacks:
    """Holds the experts' tensors of an update until those of all experts are there.

    Args:
        manifest: name -> shape of every tensor of the update. Experts whose numbers are not 0 to E - 1, or whose shapes
            differ, are passed on one by one.
    """

    def __init__(self, manifest: Mapping[str, Sequence[int]]) -> None:
        numbers: dict[Key, Counter[int]] = {}
        shapes: dict[Key, set[tuple[int, ...]]] = {}
        for name, shape in manifest.items():
            if (found := _key(name)) is not None:
                key, expert = found
                numbers.setdefault(key, Counter())[expert] += 1
                shapes.setdefault(key, set()).add(tuple(shape))
        self._experts = {
            key: len(seen)
            for key, seen in numbers.items()
            if seen == Counter(range(len(seen))) and len(shapes[key]) == 1 and len(seen) > 1
        }
        self._held: dict[Key, dict[int, Any]] = {}

    def feed(self, pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Pairs of ``(name, tensor)`` as they come; experts' as ``[E, ...]`` under the first one's name, when all came.

        A layer's experts are held until its last one has come, also from one call to the next.
        """
        import torch

        for name, tensor in pairs:
            found = _key(name)
            if found is None or found[0] not in self._experts:
                yield name, tensor
                continue
            key, expert = found
            held = self._held.setdefault(key, {})
            held[expert] = tensor
            if len(held) == self._experts[key]:
                del self._held[key]
                stacked = torch.stack([held[i] for i in range(len(held))])
                held.clear()
                yield f"{key[0]}0{key[1]}", stacked

    @property
    def waiting(self) -> int:
        """Tensors that are held."""
        return sum(map(len, self._held.values()))


def _key(name: str) -> tuple[Key, int] | None:
    match = _EXPERT.match(name)
    return None if match is None else ((match["before"], match["after"]), int(match["expert"]))
