"""What one balanced MoE layer does in a training step; knows nothing of Megatron.

Forward:  loads -> plan -> reroute -> (dispatch) -> weights into slots -> experts -> (combine)
Backward: (combine) -> weights into slots again -> experts -> replica gradients home -> home gradients are ready

Invariants (asserted by the tests of this file and by the parity tests):

1. Every rank of the group makes the same plan, and so the same moves in the same order; nothing is decided by one rank.
2. Replicas are plain tensors over slots, never parameters.
3. A home parameter enters the experts as an alias made by one autograd node. That node's backward runs when all weight
   gradients of the layer exist, adds what replicas collected, in the order of the moves, and only then hands the
   gradients on; so nobody (DDP's buckets, hooks) sees a home gradient without its replicas' share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import Plan
from megatron_ultraep.runtime import reroute
from megatron_ultraep.runtime.slots import SlotPool
from megatron_ultraep.runtime.transport import Move, Parameters, Transport, moves_of

Solver = Callable[[np.ndarray, ExpertLayout], Plan]


class Experts(Protocol):
    """Home experts and slots as one module that computes with the weights it is given."""

    home_parameters: Sequence[Parameters]
    fused_gradients: bool

    def before_reading(self) -> None:
        """Wait until home parameters hold this step's values."""
        ...

    def __call__(self, weights: Sequence[Parameters], *inputs: torch.Tensor) -> torch.Tensor:
        """Compute with ``weights[physical expert of this rank][parameter]``."""
        ...


@dataclass
class Call:
    """One forward of one layer, until its backward is over."""

    plan: Plan
    moves: tuple[Move, ...]
    # Identifies what lies in the slots; compared by identity.
    token: object = field(default_factory=object)


class LayerBalancer:
    """Balances one layer on this rank.

    Args:
        layout: homes, nodes, slots.
        topk: experts per token.
        experts: this rank's experts.
        pool: slots for them.
        transport: of this rank's expert-parallel group.
        solve: from loads and layout to a plan; the same function on every rank.
        observe: called with every plan, for records and metrics.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        topk: int,
        experts: Experts,
        pool: SlotPool,
        transport: Transport,
        solve: Solver,
        observe: Callable[[Plan], None],
    ) -> None:
        self.layout = layout
        self.topk = topk
        self.experts = experts
        self.pool = pool
        self.transport = transport
        self.solve = solve
        self.observe = observe
        self.physical = layout.ranks * (layout.experts_per_rank + layout.slots)
        self._call: Call | None = None

    def route(self, probs: torch.Tensor, routing_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan this micro-batch on its exact loads and reroute it.

        Args:
            probs: ``[tokens of this rank, logical experts]``.
            routing_map: bool, the same shape.

        Returns:
            the same for physical experts.
        """
        loads = self.transport.gather_loads(routing_map.sum(0, dtype=torch.int64))
        plan = self.solve(loads.cpu().numpy(), self.layout)
        self._call = Call(plan, moves_of(plan))
        self.observe(plan)
        table = torch.from_numpy(reroute.tables(plan, self.transport.rank)).to(probs.device)
        return reroute.reroute(probs, routing_map, table, topk=self.topk, physical=self.physical)

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the experts on dispatched tokens with the plan of the last :meth:`route`.

        Raises:
            RuntimeError: when there was none.
        """
        call, self._call = self._call, None
        if call is None:
            raise RuntimeError(
                "a balanced MoE layer computes without having routed: its stages were called out of order"
            )
        self.experts.before_reading()
        self.place(call)
        homes = [parameter for parameters in self.experts.home_parameters for parameter in parameters]
        flat = _Weights.apply(self, call, *homes)  # type: ignore[no-untyped-call]
        width = len(self.pool.shape.names)
        weights = [flat[i : i + width] for i in range(0, len(flat), width)]
        if self.experts.fused_gradients:
            self._prepare_fused(homes, flat)
        output = self.experts(weights, *inputs)
        if call.moves:
            output = _BeforeBackward.apply(self, call, output)  # type: ignore[no-untyped-call]
        return output

    def place(self, call: Call) -> None:
        """Fill the slots with the replicas of this call, unless they hold them still."""
        if not call.moves or self.pool.holder is call.token:
            return
        self.pool.holder = None
        self.transport.place(call.moves, self.experts.home_parameters.__getitem__, self.pool.weights)
        self.pool.holder = call.token

    def before_backward(self, call: Call) -> None:
        """Weights again into the slots; gradient slots of fused accumulation start from zero."""
        self.place(call)
        if self.experts.fused_gradients:
            gradients = self.pool.gradients(self._gradient_dtype())
            for move in call.moves:
                if move.rank == self.transport.rank:
                    torch._foreach_zero_(gradients[move.slot])

    def join(self, call: Call, homes: list[torch.Tensor | None], slots: Sequence[torch.Tensor | None]) -> None:
        """Add the replicas' gradients to the home gradients.

        Where a home parameter has a ``main_grad`` (DDP's buffer), that is added to; else ``homes`` changes in place.

        Args:
            call: of this forward.
            homes: gradients of home parameters, expert by expert.
            slots: gradients of the slots' weights, slot by slot; ignored where accumulation is fused.
        """
        if not call.moves:
            return
        width = len(self.pool.shape.names)
        dtype = self._gradient_dtype()
        gradients = self.pool.gradients(dtype)
        for move in call.moves:
            if move.rank == self.transport.rank and not self.experts.fused_gradients:
                for buffer, gradient in zip(gradients[move.slot], slots[move.slot * width :], strict=False):
                    buffer.zero_() if gradient is None else buffer.copy_(gradient)

        def add(place: int, received: Parameters) -> None:
            for i, gradient in enumerate(received):
                parameter = self.experts.home_parameters[place][i]
                main = getattr(parameter, "main_grad", None)
                if main is not None:
                    main.add_(gradient)
                else:
                    own = homes[place * width + i]
                    added = gradient.to(parameter.dtype, copy=True)
                    homes[place * width + i] = added if own is None else own + added

        self.transport.send_home(call.moves, gradients, self.pool.received(dtype), add)

    def _gradient_dtype(self) -> torch.dtype:
        parameter = self.experts.home_parameters[0][0]
        main = getattr(parameter, "main_grad", None)
        return parameter.dtype if main is None else main.dtype

    def _prepare_fused(self, homes: Sequence[torch.Tensor], flat: Sequence[torch.Tensor]) -> None:
        """Give the aliases what kernels that accumulate weight gradients themselves look for."""
        if not torch.is_grad_enabled():
            return
        for parameter, alias in zip(homes, flat, strict=False):
            if hasattr(parameter, "main_grad"):
                alias.main_grad = parameter.main_grad  # type: ignore[attr-defined]
                alias.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        gradients = self.pool.gradients(self._gradient_dtype())
        replicas = flat[len(homes) :]
        buffers = [buffer for slot in range(self.pool.slots) for buffer in gradients[slot]]
        for alias, buffer in zip(replicas, buffers, strict=True):
            alias.main_grad = buffer  # type: ignore[attr-defined]
            alias.grad_added_to_main_grad = False  # type: ignore[attr-defined]


class _Weights(torch.autograd.Function):
    """Aliases of home parameters, then of slots; backward joins the replicas' gradients."""

    @staticmethod
    def forward(ctx: Any, layer: LayerBalancer, call: Call, *homes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.call, ctx.homes = layer, call, len(homes)
        ctx.parameters = homes if layer.experts.fused_gradients else ()
        slots = [alias for slot in range(layer.pool.slots) for alias in layer.pool.weights.aliases(slot)]
        return (*(home.view_as(home) for home in homes), *slots)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        homes = list(gradients[: ctx.homes])
        ctx.layer.join(ctx.call, homes, gradients[ctx.homes :])
        for parameter in ctx.parameters:
            if hasattr(parameter, "grad_added_to_main_grad"):
                parameter.grad_added_to_main_grad = True
        return (None, None, *homes)


class _BeforeBackward(torch.autograd.Function):
    """Marks where the backward of the experts begins."""

    @staticmethod
    def forward(ctx: Any, layer: LayerBalancer, call: Call, output: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.call = layer, call
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        ctx.layer.before_backward(ctx.call)
        return None, None, gradient
