"""Plans of a step that were made before it started: taken by key, and checked against what routers did.

A plan is taken where its key says so, in whatever order micro-batches run, and again in recomputation. Whether a
(micro-batch, layer) has a foreseen plan is decided for the whole group by :meth:`Foresight.set`, which all ranks call
alike; one that has none is planned on its exact loads.

The host knows these plans, so it waits for nothing: it knows what to send where and which slots are filled.

What routers really did is counted on the device and compared in :meth:`Foresight.check`, before the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan.foresight import StepPlan
from megatron_ultraep.runtime.planning import Foreseen

_MOST_NAMED = 3


class ForesightMismatch(RuntimeError):
    """Plans were made for other routes or homes than there are; names micro-batches, layers and samples."""


class Foresight:
    """The foreseen plans of one model on this rank.

    Args:
        rank: in the expert-parallel group.
        device: of the tokens.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._entries: dict[tuple[MicroBatchKey, int], Foreseen] = {}
        self._checks: list[_Check] = []

    def __len__(self) -> int:
        return len(self._entries)

    def set(
        self,
        step: StepPlan,
        keys: Sequence[MicroBatchKey],
        layers: Mapping[int, ExpertLayout],
        index: Mapping[int, int],
        samples: Mapping[MicroBatchKey, Sequence[str]] | None = None,
    ) -> None:
        """Take plans over; returns before they are on the device.

        Args:
            step: plans of these micro-batches.
            keys: of the micro-batches, in the step's order.
            layers: layout of each of this rank's layers, by Megatron's layer number.
            index: of each of them, by number, in the step's order of layers.
            samples: of each micro-batch on this rank, for errors.

        Raises:
            ForesightMismatch: plans for other homes, or a key that has plans already.
        """
        for number, layout in layers.items():
            if step.layouts[index[number]] != layout:
                raise ForesightMismatch(
                    f"MoE layer {number} was planned for {step.layouts[index[number]]}, and has {layout}: plan again "
                    "after experts have moved"
                )
        known = next(((key, n) for key in keys for n in layers if (key, n) in self._entries), None)
        if known is not None:
            raise ForesightMismatch(f"{known[0]}, MoE layer {known[1]} has a plan already: clear() ends a step")
        mine = step.for_rank(self._rank)
        counts = np.concatenate([mine.splits, mine.replicas[..., None]], axis=-1, dtype=np.int64)
        host = torch.from_numpy(counts)
        replica_expert = self._upload(torch.tensor(mine.replica_expert, dtype=torch.int64))
        table = self._upload(torch.tensor(mine.table, dtype=torch.int32))
        on_device = self._upload(host)
        expected = self._upload(torch.tensor(mine.loads, dtype=torch.int64))
        seen = torch.zeros_like(expected)
        entries = {}
        for m, key in enumerate(keys):
            for number in layers:
                n = index[number]
                entries[key, number] = Foreseen(
                    key, step, m, n, replica_expert[m, n], table[m, n], on_device[m, n], host[m, n], seen[m, n]
                )
        self._entries |= entries
        self._checks.append(_Check(expected, seen, tuple(keys), dict(index), entries, dict(samples or {})))

    def take(self, key: MicroBatchKey | None, layer: int) -> Foreseen | None:
        """The plan of a micro-batch of a layer, by Megatron's layer number; None where it is to be planned now."""
        return self._entries.get((key, layer)) if key is not None else None

    def check(self) -> None:
        """Compare what routers did with what was foreseen, for all plans that were used; the host waits.

        Raises:
            ForesightMismatch: routes differ. Nothing that was computed with these plans may be used.
        """
        for check in self._checks:
            check()

    def clear(self) -> None:
        """End a step: forget its plans."""
        self._entries.clear()
        self._checks.clear()

    def _upload(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


class _Check:
    """What was foreseen, beside what came."""

    def __init__(
        self,
        expected: torch.Tensor,
        seen: torch.Tensor,
        keys: tuple[MicroBatchKey, ...],
        index: dict[int, int],
        entries: dict[tuple[MicroBatchKey, int], Foreseen],
        samples: dict[MicroBatchKey, Sequence[str]],
    ) -> None:
        self._expected, self._seen, self._keys, self._index = expected, seen, keys, index
        self._entries, self._samples = entries, samples

    def __call__(self) -> None:
        differs = (self._expected != self._seen).any(-1).cpu()
        wrong = [
            (key, number)
            for m, key in enumerate(self._keys)
            for number, n in sorted(self._index.items())
            if differs[m, n] and (entry := self._entries.get((key, number))) is not None and entry.used
        ]
        if not wrong:
            return
        named = []
        for key, number in wrong[:_MOST_NAMED]:
            among = ", ".join(self._samples.get(key, ()))
            named.append(f"MoE layer {number} in {key}" + (f" (samples {among})" if among else ""))
        more = f" and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise ForesightMismatch(
            f"routers did not take the routes that the step was planned for: {'; '.join(named)}{more}. Plans must be "
            "made of the routes that are replayed, or these micro-batches be planned on exact loads"
        )
