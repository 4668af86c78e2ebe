"""Routing replay: every router takes the experts that rollout captured, by micro-batch key.

Megatron's router hands its scores to ``router.router_replay`` when that is set. We set it to a handle of our own, one
per router, owned by the model: nothing of Megatron is patched. A handle looks up (key, layer) in the model's store, so
pipelines, virtual pipelines, recomputation and accumulation may run micro-batches in any order and as often as they
like. Router weights still get their gradients, through the scores gathered at the replayed experts.

Invariants (asserted by the tests of this file):

1. A router never falls back to its own choice silently: routes are set for (key, layer), or the pass was declared
   ``own``, or it raises. A row of ``-1`` means "ask the router" for that row.
2. What is set must be consumed: :meth:`RoutingReplay.finish` raises for routes that no router took.
3. What is counted is what the dispatcher gets: digests and differences come from the router's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.megatron import compat, microbatch


class ReplayError(RuntimeError):
    """Routes that are missing, of the wrong shape, or were not consumed; names the key and the layer."""


@dataclass
class _Entry:
    routes: torch.Tensor  # int [rows, topk] on the router's device
    used: int  # rows before the padding, for the counts of differing rows
    consumed: int = 0
    differing: torch.Tensor | None = None  # int64 [], rows whose own top-k is another set
    output: torch.Tensor | None = None  # int64 [rows, topk], the experts in the router's output, ascending
    faults: torch.Tensor | None = None  # bool [rows], output has not topk experts, or changed in recomputation


class RouterHandle:
    """Stands where Megatron expects its ``RouterReplay``; one per router.

    Attributes:
        moe_layer: index among the MoE layers of the whole model, from 0.
    """

    def __init__(self, owner: RoutingReplay, moe_layer: int) -> None:
        self.owner = owner
        self.moe_layer = moe_layer
        # 0.19 writes the layer number here when the layer gets its own.
        self.layer_number: int | None = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and experts of each row, called by Megatron's ``topk_routing_with_score_function``.

        Args:
            scores: ``[rows, experts]``, before or after the score function as the model has it.
            topk: experts per row.
            num_groups, group_topk, default_compute_topk: what the router would do by itself.

        Returns:
            ``(scores at the chosen experts [rows, topk], experts int64 [rows, topk])``.
        """
        assert default_compute_topk is not None
        entry = self.owner.entry(microbatch.current_key(), self.moe_layer)
        if entry is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        routes = entry.routes.long()
        if routes.shape != (scores.shape[0], topk):
            raise ReplayError(
                f"{microbatch.current_key()}, MoE layer {self.moe_layer}: the router has {scores.shape[0]} rows and "
                f"top-{topk}, the routes are {tuple(routes.shape)}"
            )
        with torch.no_grad():
            _, own = default_compute_topk(scores.detach(), topk, num_groups=num_groups, group_topk=group_topk)
        experts = torch.where(routes < 0, own, routes)
        if entry.differing is None:
            entry.differing = (own.sort(-1)[0] != experts.sort(-1)[0]).any(-1)[: entry.used].sum()
        entry.consumed += 1
        return scores.gather(1, experts), experts


class RoutingReplay:
    """The routes of one model on this rank, and what became of them.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        moe_layer_of: index among the model's MoE layers, by Megatron's 1-based ``layer_number``.
        keep_output: keep the experts of each router's output for :meth:`consumed` (rows x topk integers).

    Raises:
        ReplayError: a router that cannot be replayed, with what to change.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], moe_layer_of: dict[int, int], *, keep_output: bool = True
    ) -> None:
        self._entries: dict[tuple[MicroBatchKey, int], _Entry] = {}
        self._own: set[tuple[str, str]] = set()
        self._hooks: list[Any] = []
        self._routers: list[torch.nn.Module] = []
        self.moe_layers: tuple[int, ...] = ()
        microbatch.install()
        routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, compat.router_class())]
        for router in routers:
            _check_replayable(router)
        layers = []
        for router in routers:
            moe_layer = moe_layer_of[int(router.layer_number)]
            router.router_replay = RouterHandle(self, moe_layer)
            if keep_output:
                self._hooks.append(router.register_forward_hook(self._keep_output))
            self._routers.append(router)
            layers.append(moe_layer)
        self.moe_layers = tuple(sorted(layers))

    def detach(self) -> None:
        """Give the routers back as they were."""
        for router in self._routers:
            router.router_replay = None
        for hook in self._hooks:
            hook.remove()
        self._entries.clear()
        self._routers.clear()
        self._hooks.clear()

    def let_routers_choose(self, model: str, pass_: str) -> None:
        """Declare that in this pass of this model routers choose by themselves, until :meth:`clear`."""
        self._own.add((model, pass_))

    def set(self, key: MicroBatchKey, routes: np.ndarray | torch.Tensor, *, used: int | None = None) -> None:
        """Set the routes of one micro-batch for all MoE layers of this rank.

        Args:
            key: the micro-batch.
            routes: signed integers ``[len(self.moe_layers), rows, topk]`` in the order of :attr:`moe_layers`, for the
                rows that this rank's routers see. ``-1`` asks the router.
            used: rows before the padding, all by default.

        Raises:
            ReplayError: another shape, rows that are neither distinct experts nor -1 throughout, or a key set before.
        """
        tensor = torch.as_tensor(routes)
        if tensor.dim() != 3 or tensor.shape[0] != len(self.moe_layers):
            raise ReplayError(
                f"{key}: expected routes [{len(self.moe_layers)} MoE layers of this rank, rows, topk], "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device.type == "cpu" and self._routers:
            self._check_experts(key, tensor)
        device = next(self._routers[0].parameters()).device if self._routers else tensor.device
        tensor = tensor.to(device, non_blocking=True)
        for index, moe_layer in enumerate(self.moe_layers):
            if (key, moe_layer) in self._entries:
                raise ReplayError(f"{key}, MoE layer {moe_layer}: routes are set already")
            self._entries[key, moe_layer] = _Entry(tensor[index], tensor.shape[1] if used is None else used)

    def _check_experts(self, key: MicroBatchKey, routes: torch.Tensor) -> None:
        """Later they would end in a dispatcher, or in a kernel of the device, without a name."""
        experts = int(self._routers[0].config.num_moe_experts)
        ordered = routes.sort(-1).values
        wrong = (ordered[..., 1:] == ordered[..., :-1]).any(-1) | (ordered[..., 0] < 0) | (ordered[..., -1] >= experts)
        wrong &= ~(routes == -1).all(-1)
        if wrong.any():
            layer, row = wrong.nonzero()[0].tolist()
            raise ReplayError(
                f"{key}, MoE layer {self.moe_layers[layer]}: expected distinct experts in 0..{experts - 1} in each "
                f"row, or -1 throughout, got {routes[layer, row].tolist()} in row {row} ({int(wrong.sum())} such rows)"
            )

    def entry(self, key: MicroBatchKey, moe_layer: int) -> _Entry | None:
        found = self._entries.get((key, moe_layer))
        if found is None and (key.model, key.pass_) not in self._own:
            raise ReplayError(
                f"{key}, MoE layer {moe_layer}: no routes were set. Set them before the forward, or call "
                f"let_routers_choose({key.model!r}, {key.pass_!r})"
            )
        return found

    def consumed(self, key: MicroBatchKey, moe_layer: int) -> np.ndarray:
        """int64 ``[rows, topk]``: the experts in this router's output, ascending per row.

        Raises:
            ReplayError: when no router has taken them, or outputs are not kept.
        """
        entry = self._entries.get((key, moe_layer))
        if entry is None or entry.output is None:
            raise ReplayError(f"{key}, MoE layer {moe_layer}: no router output was kept")
        return entry.output.cpu().numpy()

    def finish(self, key: MicroBatchKey) -> dict[int, int]:
        """End a micro-batch: everything set must have been consumed; frees it.

        Returns:
            per MoE layer, the number of rows (padding excluded) whose router would have chosen another set of experts.

        Raises:
            ReplayError: routes that no router took.
        """
        differing = {}
        for moe_layer in self.moe_layers:
            entry = self._entries.pop((key, moe_layer), None)
            if entry is None:
                continue
            if entry.consumed == 0:
                raise ReplayError(f"{key}, MoE layer {moe_layer}: routes were set but no router consumed them")
            faults = 0 if entry.faults is None else int(entry.faults.sum())
            if faults:
                raise ReplayError(
                    f"{key}, MoE layer {moe_layer}: {faults} rows of the router's output do not have "
                    f"{entry.routes.shape[1]} distinct experts, or recomputation routed them otherwise than the forward"
                )
            assert entry.differing is not None
            differing[moe_layer] = int(entry.differing)
        return differing

    def pending(self) -> list[MicroBatchKey]:
        """Keys whose routes are set and not finished."""
        return sorted({key for key, _ in self._entries})

    def clear(self) -> None:
        """End a pass, also one that failed: forget its routes and what was declared for it."""
        self._entries.clear()
        self._own.clear()

    def _keep_output(self, router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        entry = self._entries.get((microbatch.current_key(), router.router_replay.moe_layer))
        if entry is None:
            return
        # No host synchronisation here: what must be compared is compared when the micro-batch is finished.
        routing_map = output[1]
        chosen = routing_map.to(torch.float32).topk(entry.routes.shape[1], dim=1).indices.sort(dim=1).values
        faults = routing_map.sum(1) != entry.routes.shape[1]
        if entry.output is not None:
            faults = faults | (entry.output != chosen).any(1)
        entry.faults = faults if entry.faults is None else entry.faults | faults
        entry.output = chosen


def _check_replayable(router: Any) -> None:
    config = router.config
    reasons = []
    if getattr(config, "moe_router_fusion", False):
        reasons.append("moe_router_fusion bypasses replay: turn it off")
    if getattr(config, "moe_expert_capacity_factor", None) is not None:
        reasons.append("moe_expert_capacity_factor drops tokens of the routes: unset it")
    balancing = config.moe_router_load_balancing_type
    kinds = [balancing] if isinstance(balancing, str) else list(balancing)
    if "sinkhorn" in kinds:
        reasons.append("moe_router_load_balancing_type=sinkhorn bypasses replay: use 'none'")
    elif any(kind != "none" for kind in kinds) and np.any(np.asarray(config.moe_aux_loss_coeff) != 0):
        reasons.append(
            f"moe_router_load_balancing_type={balancing} computes its loss from the router's own top-k, not from the "
            "replayed routes: use 'none' or moe_aux_loss_coeff=0"
        )
    if not hasattr(router, "router_replay"):
        reasons.append(
            f"this Megatron-core ({compat.version()}) has no routing replay; tested: {compat.TESTED_VERSIONS}"
        )
    if getattr(router, "router_replay", None) is not None and not isinstance(router.router_replay, RouterHandle):
        reasons.append("moe_enable_routing_replay is on and would be overridden: turn it off")
    if reasons:
        raise ReplayError(f"layer {router.layer_number}: routing cannot be replayed: " + "; ".join(reasons))
