"""Hand-made plans for the tests of this directory; independent of the planner."""

import numpy as np

from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.plan.types import NodeDecision, Plan


def key(step=0, microbatch=0, pass_="train", model="actor"):
    return MicroBatchKey(model, pass_, step, microbatch)


def zipf_loads(layout, seed=0, tokens=4096):
    """int64 ``[G, E]``: loads with some hot experts."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, layout.experts + 1) ** 1.1
    rng.shuffle(weights)
    return rng.multinomial(tokens, weights / weights.sum(), size=layout.ranks)


def make_plan(layout=None, seed=0, tokens=4096, loads=None):
    """A plan that moves half of the hottest expert of each node's busiest rank into each free slot of the idlest."""
    layout = layout or ExpertLayout(16, 4, slots=1)
    loads = zipf_loads(layout, seed, tokens) if loads is None else np.asarray(loads)
    width = layout.experts_per_rank + layout.slots
    quota = np.zeros((layout.ranks, layout.ranks * width), dtype=np.int64)
    places = np.array([s // layout.experts_per_rank * width + s % layout.experts_per_rank for s in layout.home_slot])
    quota[:, places] = loads
    replica_expert = np.full((layout.ranks, layout.slots), -1, dtype=np.int64)
    decisions = []
    for node in range(layout.ranks // layout.node_size):
        ranks = np.arange(node * layout.node_size, (node + 1) * layout.node_size)
        before = quota.sum(0).reshape(layout.ranks, width).sum(1)[ranks]
        bound = -(-int(before.sum()) // len(ranks))
        busy, idle = ranks[before.argmax()], ranks[before.argmin()]
        if busy != idle and layout.slots:
            expert = max(layout.experts_of(busy), key=lambda e: loads[:, e].sum())
            moved = quota[:, places[expert]] // 2
            quota[:, places[expert]] -= moved
            quota[:, idle * width + layout.experts_per_rank] += moved
            replica_expert[idle, 0] = expert
        after = int(quota.sum(0).reshape(layout.ranks, width).sum(1)[ranks].max())
        outcome = "balanced" if busy != idle and layout.slots else "no_replica_possible"
        decisions.append(NodeDecision(outcome, int(before.max()), after, bound, 5_000_000, 3_000_000))
    return Plan(layout, replica_expert, quota, tuple(decisions))
