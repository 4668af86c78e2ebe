"""GPUs of Ray's processes: those that an engine and a trainer rank share in turns, and which one is an actor's own."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rl.rank_nodes import bundles_by_node

SEES_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of an actor that sees every GPU of its node, as a process of torchrun does. Ray shows an actor its own
only, which is number 0 for each, and ranks that map each other's memory must differ in their numbers."""


def own_gpu() -> int:
    """Index, among the GPUs that this actor sees, of the one that Ray gave it.

    Raises:
        RuntimeError: Ray gave it none, or several, or one that it does not see.
    """
    given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = None if shown is None else shown.split(",")
    if len(given) != 1 or (seen is not None and given[0] not in seen):
        raise RuntimeError(
            f"expected one GPU from Ray, among those that CUDA_VISIBLE_DEVICES shows ({shown}), got {given}; start Ray "
            "with that variable as its actors will have it, or without"
        )
    return int(given[0]) if seen is None else seen.index(given[0])


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
