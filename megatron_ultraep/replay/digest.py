"""Digests of routes that can be summed over ranks.

The digest of (sample, layer) is the sum modulo 2**64 of one hash per row, and a row's hash covers its index in the
sample and the *set* of its experts. Ranks that each saw some rows of a sample (sequence parallelism, context
parallelism) therefore add their partial digests, in any order, and get the digest of the captured rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]


def _mix(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection on 64 bits that spreads every input bit."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def row_hashes(routes: npt.NDArray[np.integer], rows: npt.NDArray[np.integer] | None = None) -> U64:
    """One 64-bit hash per row, of one layer or of several.

    Args:
        routes: int ``[n, topk]`` or ``[n, layers, topk]``: the experts of each row, in any order.
        rows: int ``[n]``: index of each row in its sample; ``0..n-1`` by default.

    Returns:
        uint64 ``[n]`` or ``[n, layers]``.
    """
    ordered = np.sort(routes, axis=-1)
    state = _mix((np.arange(len(routes)) if rows is None else rows).astype(np.uint64))
    state = state.reshape(-1, *[1] * (routes.ndim - 2))
    for k in range(ordered.shape[-1]):
        state = _mix(state ^ ordered[..., k].astype(np.uint64))
    return state


def layer_digests(routes: npt.NDArray[np.integer]) -> U64:
    """uint64 ``[moe_layers]``: the digest of each layer of one sample's ``[rows, moe_layers, topk]``."""
    # All layers at once: a few hundred short calls per sample would hold up the thread that steps the engine.
    digests: U64 = row_hashes(routes).sum(axis=0, dtype=np.uint64)
    return digests
