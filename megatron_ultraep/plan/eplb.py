"""EPLB, DeepSeek's expert-parallel load balancer, written from its published description. A comparator.

Experts are replicated by their load and packed greedily; homes may move, and every copy of an expert takes an even
share of its tokens. Source: https://github.com/deepseek-ai/EPLB, README.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_ultraep.plan.types import Array

Floats = npt.NDArray[np.float64]


def rebalance_experts(
    weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Array, Array]:
    """Replicate and place the experts of each layer.

    Groups of experts are packed onto nodes, experts replicated inside each node, and their copies packed onto its GPUs
    (the hierarchical policy). Where the nodes do not divide the groups, all GPUs count as one node (the global policy).

    Args:
        weight: ``[X, E]``, load of each expert in each layer.
        num_replicas: physical experts of a layer, a multiple of ``num_gpus``.
        num_groups: expert groups of equal size, in order of expert ids.
        num_nodes: nodes, whose GPUs are numbered one after the other.
        num_gpus: GPUs, a multiple of ``num_nodes``.

    Returns:
        int64 ``[X, num_replicas]``: the logical expert of each physical one, GPU by GPU; and int64 ``[X, E]``: how many
        copies each expert has.

    Raises:
        ValueError: numbers that do not divide each other.
    """
    loads = np.atleast_2d(np.asarray(weight, dtype=np.float64))
    experts = loads.shape[1]
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if experts % num_groups or num_gpus % num_nodes or num_replicas % num_gpus or num_replicas < experts:
        raise ValueError(
            f"expected groups that divide the experts, nodes that divide the GPUs, GPUs that divide the replicas, got "
            f"{experts} experts, {num_groups} groups, {num_nodes} nodes, {num_gpus} GPUs, {num_replicas} replicas"
        )
    physical = np.stack([_place_layer(layer, num_replicas, num_groups, num_nodes, num_gpus) for layer in loads])
    copies = np.stack([np.bincount(layer, minlength=experts) for layer in physical]).astype(np.int64)
    return physical, copies


def _place_layer(load: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Array:
    group_load = load.reshape(num_groups, -1).sum(axis=1)
    groups = np.arange(len(load)).reshape(num_groups, -1)
    placed = []
    for groups_of_node in _pack(group_load, num_nodes):
        experts = groups[groups_of_node].ravel()
        copied = experts[_replicate(load[experts], num_replicas // num_nodes)]
        count = np.bincount(copied, minlength=len(load))
        share = load[copied] / count[copied]
        placed.append(copied[np.concatenate(_pack(share, num_gpus // num_nodes))])
    physical: Array = np.concatenate(placed).astype(np.int64)
    return physical


def _pack(weight: Floats, packs: int) -> list[Array]:
    """Items of each pack, equally many in all: heaviest first, each into the lightest pack with room."""
    capacity = len(weight) // packs
    if capacity == 1:
        return [np.array([item]) for item in range(packs)]
    content: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in np.argsort(-weight, kind="stable").tolist():
        pack = min((p for p in range(packs) if len(content[p]) < capacity), key=lambda p: (total[p], p))
        content[pack].append(item)
        total[pack] += float(weight[item])
    return [np.array(items) for items in content]


def _replicate(weight: Floats, copies: int) -> Array:
    """Expert of each of ``copies`` copies: one of each, then one by one of the expert with the most per copy."""
    chosen = list(range(len(weight)))
    count = np.ones(len(weight))
    while len(chosen) < copies:
        expert = int(np.argmax(weight / count))
        chosen.append(expert)
        count[expert] += 1
    return np.array(chosen)
