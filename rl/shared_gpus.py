"""GPUs that an engine and a trainer rank share, in turns: which of Ray's processes goes where."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rl.rank_nodes import bundles_by_node


class SharedGpus:
    """One bundle of a GPU and two CPUs for each pair.

    Args:
        pairs: how many.
        timeout_s: limit of waiting until the GPUs are ours, seconds.

    Raises:
        TimeoutError: Ray has fewer free GPUs.
    """

    def __init__(self, pairs: int, timeout_s: float) -> None:
        self._group: PlacementGroup = placement_group([{"GPU": 1, "CPU": 2}] * pairs, strategy="PACK")
        ready, _ = ray.wait([self._group.ready()], timeout=timeout_s)
        if not ready:
            free = ray.available_resources()
            self.release()
            raise TimeoutError(
                f"expected {pairs} GPUs for {pairs} pairs of engine and trainer rank within {timeout_s:g} s, Ray has "
                f"{free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs free; lower trainer.ranks and "
                "rollout.engines"
            )
        self._order = bundles_by_node(self._group)  # neighbours in rank are neighbours on a node

    def options(self, index: int) -> dict[str, Any]:
        """Ray options of an actor that takes half of the index-th GPU."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._order[index])
        return {"num_gpus": 0.5, "num_cpus": 1, "scheduling_strategy": strategy}

    def release(self) -> None:
        """Give the GPUs back; their actors must have ended."""
        remove_placement_group(self._group)
