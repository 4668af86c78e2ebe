"""Random problems, small enough to be solved exactly."""

import numpy as np

from megatron_ultraep.pipeline.problem import PipelineModel, Problem


def random_problem(seed: int, most: int = 3) -> Problem:
    """Two models on 2 or 3 nodes: stages unlike each other, delays, replicas, either direction, forward only."""
    rng = np.random.default_rng([seed, 7])
    nodes = int(rng.integers(2, 4))
    models = []
    for name in ("large", "small"):
        stages = nodes if name == "large" or nodes == 3 else int(rng.integers(1, nodes + 1))
        forward_only = name == "small" and rng.random() < 0.25
        order = np.arange(nodes)[:: -1 if rng.random() < 0.7 and name == "small" else 1]
        placed = order.reshape(nodes // stages, stages)
        models.append(
            PipelineModel(
                name,
                tuple(tuple(int(n) for n in replica) for replica in placed),
                int(rng.integers(1, most + 1)),
                tuple(rng.integers(1, 6, size=stages).tolist()),
                (0,) * stages if forward_only else tuple(rng.integers(1, 9, size=stages).tolist()),
                tuple(rng.integers(1, 4, size=stages).tolist()),
                float(rng.integers(0, 3)),
                bool(forward_only),
            )
        )
    return Problem(nodes, tuple(models))
