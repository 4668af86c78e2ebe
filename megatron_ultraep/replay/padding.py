"""Routes of padding rows: one pure function that planner and routers share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def padding_routes(positions: npt.ArrayLike, moe_layer: int, experts: int, topk: int) -> npt.NDArray[np.int64]:
    """Distinct experts for padding rows, spread evenly over all experts.

    Padding computes nothing that counts, but its tokens are dispatched like any other: sent to one expert they would
    overload the rank that owns it. Consecutive positions take consecutive experts, and layers start at different ones.

    Args:
        positions: int ``[n]``, position of each padding row in its micro-batch.
        moe_layer: index among the MoE layers of the model.
        experts: number of logical experts E.
        topk: experts per token K <= E.

    Returns:
        int64 ``[n, topk]``, ids in ``0..E-1``, distinct within a row.
    """
    if topk > experts:
        raise ValueError(f"expected topk <= experts, got topk={topk}, experts={experts}")
    first = (np.asarray(positions, dtype=np.int64) + moe_layer) * topk
    return (first[:, None] + np.arange(topk, dtype=np.int64)) % experts
