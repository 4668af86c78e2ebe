"""Expert loads of a sample: what planners and viewers read instead of rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def histogram(routes: npt.NDArray[np.integer], experts: int) -> npt.NDArray[np.int32]:
    """How often each expert occurs, per MoE layer.

    Args:
        routes: int ``[rows, moe_layers, topk]``, ids in ``0..experts-1``.
        experts: number of experts E.

    Returns:
        int32 ``[moe_layers, experts]``; each layer sums to ``rows * topk``.
    """
    layers = routes.shape[1]
    shifted = routes.astype(np.int64) + (np.arange(layers, dtype=np.int64) * experts)[None, :, None]
    counts = np.bincount(shifted.reshape(-1), minlength=layers * experts)
    return counts.reshape(layers, experts).astype(np.int32)
