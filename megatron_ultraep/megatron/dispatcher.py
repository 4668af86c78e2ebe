"""The stock all-to-all dispatcher, built again for physical experts."""

from __future__ import annotations

import copy
from typing import Any

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.megatron import compat


def physical_dispatcher(stock: Any, layout: ExpertLayout, rank: int) -> Any:
    """A dispatcher like ``stock`` whose experts are the physical ones: homes and slots of every rank.

    Args:
        stock: the dispatcher of a stock MoE layer; stays as it is.
        layout: homes and slots.
        rank: this rank in the expert-parallel group.
    """
    width = layout.experts_per_rank + layout.slots
    config = copy.copy(stock.config)
    config.num_moe_experts = layout.ranks * width
    groups = compat.process_group_collection(ep=stock.ep_group, expt_tp=stock.tp_group, tp_ep=stock.tp_ep_group)
    return type(stock)(width, list(range(rank * width, (rank + 1) * width)), config=config, pg_collection=groups)
