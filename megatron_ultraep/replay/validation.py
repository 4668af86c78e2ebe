"""Checks on captured routes, where they enter: each returns a reason, or None when all is well."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Routes = npt.NDArray[np.unsignedinteger]


def route_dtype(experts: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds every expert id.

    Raises:
        ValueError: for more than 65,536 experts.
    """
    if experts <= 1 << 8:
        return np.dtype(np.uint8)
    if experts <= 1 << 16:
        return np.dtype(np.uint16)
    raise ValueError(f"expected at most 65536 experts, got {experts}")


def check_routes(routes: npt.NDArray[np.integer], *, rows: int, moe_layers: int, experts: int, topk: int) -> str | None:
    """Why these routes must not be trained on, or None.

    Args:
        routes: int ``[rows, moe_layers, topk]``.
        rows: tokens - 1 of the sample.
        moe_layers: MoE layers of the model (dense layers have no entry).
        experts: number of experts E.
        topk: experts per token.

    Returns:
        A sentence that says what was expected and what came, or None.
    """
    if routes.ndim != 3 or routes.shape != (rows, moe_layers, topk):
        return f"expected routes of shape {(rows, moe_layers, topk)} [tokens-1, moe layers, topk], got {routes.shape}"
    if not np.issubdtype(routes.dtype, np.integer):
        return f"expected integer routes, got {routes.dtype}"
    if rows == 0 or moe_layers == 0:
        return None
    low, high = int(routes.min()), int(routes.max())
    if low < 0 or high >= experts:
        row, layer = (int(x) for x in np.argwhere((routes < 0) | (routes >= experts))[0][:2])
        return f"expected expert ids in 0..{experts - 1}, got {low}..{high} (first at row {row}, MoE layer {layer})"
    if high == 0 and experts > 1 and (topk > 1 or rows * moe_layers > 1):
        return "all routes are zero: the engine returned an unfilled buffer"
    if topk > 1:
        ordered = np.sort(routes, axis=-1)
        duplicate = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
        if duplicate.any():
            row, layer = (int(x) for x in np.argwhere(duplicate)[0])
            return (
                f"an expert occurs twice in one token's top-{topk} ({int(duplicate.sum())} times, first at row {row}, "
                f"MoE layer {layer}: {routes[row, layer].tolist()})"
            )
    return None
