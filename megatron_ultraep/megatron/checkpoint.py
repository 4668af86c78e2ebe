"""Checkpoints in logical order, wherever experts live.

Megatron's expert modules take local expert ``i`` of rank ``r`` for expert ``r*L + i``. :func:`set_home_slot` tells a
layer where its experts live, and puts a method of its own in place of ``sharded_state_dict`` of that layer's expert
module, which presents every expert under its logical id. Nothing of Megatron is patched, and a layer whose experts are
where Megatron has them is left alone. Optimizers follow: they take names and offsets from the model's sharded tensors,
parameter by parameter. So a checkpoint saved under any home order loads under any other one, and without the plugin.

How: the stock method is asked as the rank that would own an expert, with the expert at the place it would have there
(its index ``% L``); that is done once for every rank that would own any of this rank's experts. Only the answers that
were asked for are kept, under the names that the parameters have here.

Formats that follow the distributed optimizer's buffers instead of the model (``dp_reshardable`` and the ones that
Megatron has deprecated) cannot be in logical order: they are refused, unless all experts are where Megatron has them.
So is nothing else: ``state_dict()``, which Megatron's old ``torch`` format writes, holds parameters as they lie.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.support import Unsupported

_ATTRIBUTE = "_ultraep_layout"
_METHOD = "sharded_state_dict"
_FORMAT = "distrib_optim_sharding_type"
# The formats that take names and offsets from the model; the second one is what Megatron takes when none is named.
_LOGICAL_FORMATS = ("fully_reshardable", "fully_sharded_model_space")
_SEQUENTIAL = re.compile(r"^local_experts\.(\d+)\.(.+)$")
_GROUPED = re.compile(r"^(.+)\.(weight|bias|_extra_state)(\d*)$")


def local_expert_of(name: str) -> tuple[int, str] | None:
    """Which local expert a tensor of an expert module belongs to.

    Args:
        name: inside ``SequentialMLP`` (``local_experts.3.linear_fc1.weight``) or ``TEGroupedMLP``
            (``linear_fc1.weight3``).

    Returns:
        the index, and the name inside an expert (``linear_fc1.weight``, for both); None for a tensor of no expert.
    """
    if found := _SEQUENTIAL.match(name):
        return int(found[1]), found[2]
    if (found := _GROUPED.match(name)) and (found[3] or found[2] == "_extra_state"):
        return int(found[3] or 0), f"{found[1]}.{found[2]}"
    return None


def home_slot_of(layer: Any) -> tuple[int, ...]:
    """``[experts]``: the home slot of every logical expert of a Megatron MoE layer; as Megatron has them by default."""
    layout: ExpertLayout | None = layer.experts.__dict__.get(_ATTRIBUTE)
    return tuple(range(layer.config.num_moe_experts)) if layout is None else layout.home_slot


def local_experts(layer: Any) -> tuple[int, ...]:
    """The logical experts at home on this rank, in the order of the layer's local experts."""
    return ExpertLayout(layer.config.num_moe_experts, layer.ep_group.size(), home_slot_of(layer)).experts_of(
        layer.ep_group.rank()
    )


def set_home_slot(layer: Any, home_slot: Sequence[int]) -> None:
    """Say where the experts of a layer live; moves nothing.

    Args:
        layer: a Megatron-core ``MoELayer``, balanced or not.
        home_slot: ``[experts]`` home slot of every logical expert, a permutation.

    Raises:
        ValueError: no permutation of the layer's experts.
        Unsupported: an expert module whose checkpoints are not known.
    """
    experts = layer.experts
    layout = ExpertLayout(layer.config.num_moe_experts, layer.ep_group.size(), tuple(home_slot))
    for name in (_ATTRIBUTE, _METHOD):
        experts.__dict__.pop(name, None)
    if layout.home_slot == tuple(range(layout.experts)):
        return
    grouped = compat.grouped_mlp_class()
    if isinstance(experts, compat.sequential_mlp_class()):
        arrange: Arrangement = _sequential_as
    elif grouped is not None and isinstance(experts, grouped):
        arrange = _grouped_as
    else:
        raise Unsupported(
            f"expected SequentialMLP or TEGroupedMLP experts, got {type(experts).__name__}: their homes cannot change"
        )
    object.__setattr__(experts, _ATTRIBUTE, layout)
    object.__setattr__(experts, _METHOD, _logical(experts, layout, layer.ep_group.rank(), arrange))


class _Rank:
    """What expert modules read of their expert-parallel group when they name experts."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


# As which rank, with which of this rank's experts in each place, the stock method is asked.
Arrangement = Callable[[Any, _Rank, Sequence[int]], Any]


def _logical(experts: Any, layout: ExpertLayout, rank: int, arrange: Arrangement) -> Callable[..., dict[str, Any]]:
    """The method that takes the place of ``sharded_state_dict``."""
    stock = getattr(type(experts), _METHOD)
    mine, width = layout.experts_of(rank), layout.experts_per_rank
    asked: dict[int, dict[int, int]] = {}  # as which rank -> place there -> place here
    for here, expert in enumerate(mine):
        asked.setdefault(expert // width, {})[expert % width] = here

    def sharded_state_dict(
        prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        kind = (metadata or {}).get(_FORMAT)
        if kind is not None and kind not in _LOGICAL_FORMATS:
            raise Unsupported(
                f"checkpoints of the format {kind!r} follow the optimizer's buffers, and experts do not live where "
                f"Megatron has them: set the format to {_LOGICAL_FORMATS[0]!r} (--dist-ckpt-optim-fully-reshardable), "
                "or move experts back before saving"
            )
        found: dict[str, Any] = {}
        for owner, places in asked.items():
            others = iter([here for here in range(width) if here not in places.values()])
            order = [places[place] if place in places else next(others) for place in range(width)]
            with arrange(experts, _Rank(owner, layout.ranks), order):
                answer = stock(experts, prefix, sharded_offsets, metadata)
            for name, entry in answer.items():
                inner = local_expert_of(name[len(prefix) :])
                if inner is None:
                    found[name] = entry
                elif inner[0] in places:
                    found[prefix + _renamed(name[len(prefix) :], places[inner[0]])] = entry
        return found

    return sharded_state_dict


def _renamed(name: str, place: int) -> str:
    if found := _SEQUENTIAL.match(name):
        return f"local_experts.{place}.{found[2]}"
    found = _GROUPED.match(name)
    assert found is not None
    # The first one's extra state has no number.
    number = "" if found[2] == "_extra_state" and place == 0 else str(place)
    return f"{found[1]}.{found[2]}{number}"


@contextmanager
def _sequential_as(experts: Any, group: _Rank, order: Sequence[int]) -> Iterator[None]:
    stock, stock_group = experts._modules["local_experts"], experts.ep_group
    # Not a ModuleList of the same modules that anyone could find: gone when the stock method has answered.
    experts._modules["local_experts"] = torch.nn.ModuleList([stock[here] for here in order])
    experts.ep_group = group
    try:
        yield
    finally:
        experts._modules["local_experts"], experts.ep_group = stock, stock_group


@contextmanager
def _grouped_as(experts: Any, group: _Rank, order: Sequence[int]) -> Iterator[None]:
    linears = [module for module in experts.children() if hasattr(module, "num_gemms")]
    kept = [(linear, dict(linear._parameters), linear._pg_collection) for linear in linears]
    stock_group = experts.ep_group
    experts.ep_group = group
    try:
        for linear, parameters, collection in kept:
            for kind in ("weight", "bias"):
                for place, here in enumerate(order):
                    if f"{kind}{place}" in parameters:
                        linear._parameters[f"{kind}{place}"] = parameters[f"{kind}{here}"]
            linear._pg_collection = copy.copy(collection)
            linear._pg_collection.ep = group
        yield
    finally:
        experts.ep_group = stock_group
        for linear, parameters, collection in kept:
            linear._parameters.update(parameters)
            linear._pg_collection = collection
