"""The stock all-to-all dispatcher, built again for physical experts, with the counts that the plan knows already."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.support import Unsupported
from megatron_ultraep.runtime.layer import LayerBalancer
from megatron_ultraep.runtime.planning import Splits

_ATTRIBUTES = ("input_splits", "output_splits", "cuda_sync_point", "ep_size", "tp_size", "drop_and_pad")
_METHODS = ("_maybe_update_cuda_sync_point", "_maybe_dtoh_and_synchronize")


class _PlannedCounts:
    """Mixed into the stock dispatcher: what it counts comes from the plan, and so does what it tells the host.

    The stock stages count the tokens of each expert, gather the counts of all ranks, and copy four tensors to the host,
    which waits for them before the all-to-all. The plan was made from gathered loads, so its quotas are those counts.
    The host waits where it did, if it waits at all, and learns which slots are filled at the same moment.
    """

    balancer: LayerBalancer
    _splits: Splits | None = None

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Tokens of each physical expert of this rank, int64 ``[L + R]``; splits follow when the host needs them."""
        dispatcher: Any = self
        ranks, width = dispatcher.ep_size, dispatcher.num_local_experts
        self._splits = self.balancer.planner.splits(self.balancer.planned)
        counts = self._splits.counts
        dispatcher.num_out_tokens = routing_map.size(0) * dispatcher.config.moe_router_topk
        dispatcher.output_splits_tp = None
        dispatcher.num_global_tokens_per_local_expert = counts[2 * ranks + width : -1].view(ranks, width)
        dispatcher._maybe_update_cuda_sync_point("before_ep_alltoall")
        return counts[2 * ranks : 2 * ranks + width]

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        """Where stock waits: splits as lists, and the tokens of each physical expert on the host."""
        dispatcher: Any = self
        if point != dispatcher.cuda_sync_point or self._splits is None:
            return tokens_per_expert
        ranks, width = dispatcher.ep_size, dispatcher.num_local_experts
        splits, self._splits = self._splits, None
        host = splits.on_host()
        dispatcher.input_splits, dispatcher.output_splits = host[: 2 * ranks].view(2, ranks).tolist()
        if not dispatcher.config.moe_permute_fusion:
            dispatcher.num_global_tokens_per_local_expert = host[2 * ranks + width : -1].view(ranks, width)
        return host[2 * ranks : 2 * ranks + width]


def physical_dispatcher(stock: Any, layout: ExpertLayout, rank: int, balancer: LayerBalancer) -> Any:
    """A dispatcher like ``stock`` whose experts are the physical ones: homes and slots of every rank.

    Args:
        stock: the dispatcher of a stock MoE layer; stays as it is.
        layout: homes and slots.
        rank: this rank in the expert-parallel group.
        balancer: whose last plan the counts come from.

    Raises:
        Unsupported: a dispatcher that is not what was tried.
    """
    _check(stock)
    width = layout.experts_per_rank + layout.slots
    config = copy.copy(stock.config)
    config.num_moe_experts = layout.ranks * width
    groups = compat.process_group_collection(ep=stock.ep_group, expt_tp=stock.tp_group, tp_ep=stock.tp_ep_group)
    kind = type(f"Planned{type(stock).__name__}", (_PlannedCounts, type(stock)), {"__module__": __name__})
    dispatcher = kind(width, list(range(rank * width, (rank + 1) * width)), config=config, pg_collection=groups)
    dispatcher.balancer = balancer  # type: ignore[attr-defined]
    return dispatcher


def _check(stock: Any) -> None:
    found = list(inspect.signature(type(stock).preprocess).parameters)
    missing = [name for name in (*_ATTRIBUTES, *_METHODS) if not hasattr(stock, name)]
    if found != ["self", "routing_map"] or missing:
        raise Unsupported(
            f"{type(stock).__name__}.preprocess of Megatron-core {compat.version()} takes {found} and lacks {missing}; "
            f"tested versions: {', '.join(compat.TESTED_VERSIONS)}"
        )
    if stock.tp_size != 1 or stock.drop_and_pad:
        raise Unsupported("expected a dispatcher without expert tensor parallelism and padding to capacity")
