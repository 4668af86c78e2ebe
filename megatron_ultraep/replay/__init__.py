"""Routing traces, pure: format, validation, slicing, histograms, digests. Imports numpy and ``layout`` only."""

from megatron_ultraep.replay.digest import layer_digests, row_hashes
from megatron_ultraep.replay.histogram import histogram
from megatron_ultraep.replay.padding import padding_routes
from megatron_ultraep.replay.slicing import assemble, overlap, router_rows
from megatron_ultraep.replay.trace import RoutingTrace, TraceSample
from megatron_ultraep.replay.validation import check_routes, route_dtype

__all__ = [
    "RoutingTrace",
    "TraceSample",
    "assemble",
    "check_routes",
    "histogram",
    "layer_digests",
    "overlap",
    "padding_routes",
    "route_dtype",
    "router_rows",
    "row_hashes",
]
