"""Which node each trainer rank runs on, where Ray has several: neighbours in rank are neighbours on a node.

Tensor- and expert-parallel groups are neighbouring ranks (see ``rl.placement``), and only inside a node are they joined
by the fast fabric. Left to itself, Ray puts actors where there is room.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class RankNodes:
    """Room for all ranks, taken before anything else is started.

    Args:
        ranks: how many.
        gpus: whether each needs a GPU; each needs a CPU token.
        per_node: ranks on every node; None: as few nodes as have room.
        timeout_s: limit of waiting until there is room, seconds.

    Raises:
        TimeoutError: the nodes have no such room.
    """

    def __init__(self, ranks: int, *, gpus: bool, per_node: int | None, timeout_s: float) -> None:
        self._per_bundle = per_node or 1
        size = {"CPU": self._per_bundle} | ({"GPU": self._per_bundle} if gpus else {})
        bundles = [{name: float(count) for name, count in size.items()} for _ in range(ranks // self._per_bundle)]
        self._group: PlacementGroup = placement_group(bundles, strategy="STRICT_SPREAD" if per_node else "PACK")
        ready, _ = ray.wait([self._group.ready()], timeout=timeout_s)
        if not ready:
            self.release()
            what = "GPUs and CPU tokens" if gpus else "CPU tokens"
            wanted = f"{ranks} trainer ranks" + (f", {per_node} on each of {len(bundles)} nodes" if per_node else "")
            raise TimeoutError(
                f"expected room for {wanted} ({what}) within {timeout_s:g} s, Ray has {described_nodes()}; change "
                "trainer.ranks or trainer.ranks_per_node, or give the cluster more"
            )
        self._order = bundles_by_node(self._group)

    def options(self, rank: int) -> dict[str, Any]:
        """Ray options of a rank's actor."""
        index = self._order[rank // self._per_bundle]
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        }

    def release(self) -> None:
        """Give the room back; the actors in it must have ended."""
        remove_placement_group(self._group)


def bundles_by_node(group: PlacementGroup) -> list[int]:
    """Indices of a ready group's bundles, those of one node together; nodes in the order of their first bundle."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    first: dict[str, int] = {}
    for index in sorted(nodes):
        first.setdefault(nodes[index], index)
    return sorted(nodes, key=lambda index: (first[nodes[index]], index))


def live_nodes() -> list[dict[str, Any]]:
    """Ray's nodes that are alive, as ``ray.nodes()`` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def described_nodes() -> str:
    """What each living node of Ray offers in all, for errors."""
    return "; ".join(
        f"{node['NodeName']}: {node['Resources'].get('CPU', 0):g} CPUs, {node['Resources'].get('GPU', 0):g} GPUs"
        for node in live_nodes()
    )
