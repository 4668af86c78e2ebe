"""Routes of one sample as numpy arrays: from vLLM's form to ours, and joined where a sample was made in parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_ultraep.replay.validation import route_dtype
from rl.types import RouteRef

Routes = npt.NDArray[np.unsignedinteger]


def select_moe_layers(routes: npt.NDArray[np.integer], moe_layers: Sequence[int], experts: int) -> Routes:
    """Drop dense layers and narrow the type.

    vLLM's layer axis has one entry per decoder layer; those of dense layers are never written.

    Args:
        routes: int ``[rows, decoder layers, topk]`` as vLLM returns them.
        moe_layers: indices of the MoE layers, ascending.
        experts: number of experts E.

    Returns:
        ``[rows, len(moe_layers), topk]``, contiguous, uint8 or uint16.
    """
    if len(moe_layers) != routes.shape[1]:
        routes = routes[:, list(moe_layers)]
    return np.ascontiguousarray(routes, dtype=route_dtype(experts))


def join(first: Routes, second: Routes) -> Routes:
    """Routes of a sample that was broken off and went on elsewhere: rows that were computed first win.

    Args:
        first: ``[n, layers, topk]``, of the part before.
        second: ``[m, layers, topk]``, m >= n, of the continuation, whose prefill computed the first n rows again.

    Returns:
        ``[m, layers, topk]``.
    """
    if second.shape[0] < first.shape[0] or second.shape[1:] != first.shape[1:]:
        raise ValueError(f"expected a continuation of at least the rows of {first.shape}, got {second.shape}")
    return np.concatenate([first, second[first.shape[0] :]])


def row_versions(
    weight_versions: Sequence[tuple[int, int]], prompt_length: int, response_length: int
) -> npt.NDArray[np.int64]:
    """Weight version of every row of routes: that of the step which sampled the token after it.

    Rows of the prompt have the version of the first response token.

    Args:
        weight_versions: spans ``(first response token, version)`` of a sample, the first at 0.
        prompt_length, response_length: P and R, both at least 1.

    Returns:
        int64 ``[P + R - 1]``.
    """
    starts = np.array([start for start, _ in weight_versions])
    versions = np.array([version for _, version in weight_versions], dtype=np.int64)
    of_token = versions[np.searchsorted(starts, np.arange(response_length), side="right") - 1]
    return np.concatenate([np.full(prompt_length - 1, of_token[0]), of_token])


def join_versions(
    first: Sequence[tuple[int, int]], length: int, second: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Spans of a response made of ``length`` tokens with spans ``first`` and a continuation with spans ``second``."""
    spans = list(first) if length else []
    for start, version in second:
        if not spans or spans[-1][1] != version:
            spans.append((length + start if spans else 0, version))
    return tuple(spans)


def checked_slice(request: tuple[RouteRef, int, int, int, int]) -> tuple[RouteRef, slice, slice]:
    """A part of routes that was asked for, as slices of rows and MoE layers.

    Args:
        request: ``(reference, row start, row stop, MoE layer start, MoE layer stop)``.

    Raises:
        ValueError: the part lies outside its routes.
    """
    reference, row_start, row_stop, layer_start, layer_stop = request
    rows, layers, _ = reference.shape
    if not (0 <= row_start <= row_stop <= rows and 0 <= layer_start <= layer_stop <= layers):
        raise ValueError(
            f"expected rows within 0..{rows} and MoE layers within 0..{layers}, got rows {row_start}..{row_stop}, "
            f"layers {layer_start}..{layer_stop}"
        )
    return reference, slice(row_start, row_stop), slice(layer_start, layer_stop)
