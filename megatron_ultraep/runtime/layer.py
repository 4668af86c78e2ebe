"""What one balanced MoE layer does in a training step; knows nothing of Megatron.

Forward:  route:   loads -> plan -> replica weights start to travel -> reroute
          (permutation, dispatch)
          compute: weights have come -> experts over homes and slots
          (combine)
Backward: before_combine: weights start to travel again, unless they lie in the slots still
          (combine)
          experts; then replica gradients start home
          (dispatch, permutation, router, and whatever the layer had before: attention)
          home gradients have their replicas' share, and are handed on

Invariants (asserted by the tests of this file and by the parity tests):

1. Every rank of the group makes the same plan, and the same calls of the transport in the same order; nothing is
   decided by one rank.
2. Replicas are plain tensors over slots, never parameters.
3. A home parameter enters the experts as an alias, made by one autograd node when the layer begins (``_Homes``) and
   passed on by a second one before the experts (``_Slots``). Backward of the second runs when all weight gradients of
   the layer exist, and starts the replicas' gradients home. Backward of the first waits for them, and only then hands
   home gradients on; so nobody (DDP's buckets, hooks) sees a home gradient without its replicas' share. Autograd runs
   what was made last first, so the wait comes after the backward of all that the layer computed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.runtime.planning import Planned, Planner
from megatron_ultraep.runtime.slots import SlotPool
from megatron_ultraep.runtime.stopwatch import Stopwatch
from megatron_ultraep.runtime.transport import Homes, Parameters, Transport


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

    planned: Planned
    # Identifies what lies in the slots; compared by identity.
    token: object = field(default_factory=object)


class LayerBalancer:
    """Balances one layer on this rank.

    Args:
        layout: homes, nodes, slots.
        experts: this rank's experts.
        pool: slots for them.
        transport: of this rank's expert-parallel group.
        planner: of this layout.
        observe: called with every plan, for records and metrics.
        watch: told where time goes.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        experts: Experts,
        pool: SlotPool,
        transport: Transport,
        planner: Planner,
        observe: Callable[[Planned], None],
        watch: Stopwatch,
    ) -> None:
        self.layout = layout
        self.experts = experts
        self.pool = pool
        self.transport = transport
        self.planner = planner
        self.observe = observe
        self.watch = watch
        self._weights = Homes(experts.home_parameters)
        self._gradients = Homes([])
        self._aliases: tuple[torch.Tensor, ...] | None = None
        self._call: Call | None = None
        self._combining: Call | None = None

    def begin(self) -> None:
        """Make the aliases of home parameters now: at the start of all that their gradients can hide behind.

        Called before the layer that the experts belong to begins; without it :meth:`route` does it.
        """
        homes = [parameter for place in self.experts.home_parameters for parameter in place]
        self._aliases = _Homes.apply(self, *homes)  # type: ignore[no-untyped-call]

    def route(self, probs: torch.Tensor, routing_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan this micro-batch on its exact loads and reroute it.

        Args:
            probs: ``[tokens of this rank, logical experts]``.
            routing_map: bool, the same shape.

        Returns:
            the same for physical experts.
        """
        self.transport.check()
        if self._aliases is None:
            self.begin()
        self.experts.before_reading()
        planned = self.planner.plan(routing_map, self.transport, self.pool)
        self._call = self._combining = Call(planned)
        self._place(self._call)
        self.observe(planned)
        return self.planner.reroute(planned, probs, routing_map)

    @property
    def planned(self) -> Planned:
        """The plan of the last :meth:`route`.

        Raises:
            RuntimeError: when there was none.
        """
        if self._combining is None:
            raise RuntimeError("no plan: a balanced MoE layer's stages were called out of order")
        return self._combining.planned

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the experts on dispatched tokens with the plan of the last :meth:`route`.

        Raises:
            RuntimeError: when there was none.
        """
        call, self._call = self._call, None
        aliases, self._aliases = self._aliases, None
        if call is None or aliases is None:
            raise RuntimeError(
                "a balanced MoE layer computes without having routed: its stages were called out of order"
            )
        flat = _Slots.apply(self, call, *aliases)  # type: ignore[no-untyped-call]
        width = len(self.pool.shape.names)
        weights = [flat[i : i + width] for i in range(0, len(flat), width)]
        if self.experts.fused_gradients:
            self._prepare_fused(flat)
        with self.watch("weights, forward"):
            self.transport.await_placed(call.planned, self.pool)
        output = self.experts(weights, *inputs)
        self.transport.weights_sent(self.pool)
        return _BeforeExpertsBackward.apply(self, call, output)  # type: ignore[no-any-return, no-untyped-call]

    def combined(self, output: torch.Tensor) -> torch.Tensor:
        """Mark the combined output of the last :meth:`route`, so that weights travel beside the combine's backward."""
        call, self._combining = self._combining, None
        return output if call is None else _BeforeCombineBackward.apply(self, call, output)  # type: ignore[no-any-return, no-untyped-call]

    def _place(self, call: Call) -> None:
        """Start to fill the slots with the replicas of this call, unless they hold them still."""
        if self.pool.holder is not call.token:
            self.pool.holder = call.token
            self.transport.place(call.planned, self.pool, self._weights)

    def _before_backward(self, call: Call) -> None:
        self._place(call)
        with self.watch("weights, backward"):
            self.transport.await_placed(call.planned, self.pool)
            self.transport.before_gradients(
                call.planned, self.pool, self._gradient_dtype(), accumulate=self.experts.fused_gradients
            )

    def _send_home(
        self, call: Call, homes: Sequence[torch.Tensor | None], slots: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Start the replicas' gradients home.

        Where a home parameter has a ``main_grad`` (DDP's buffer), that is added to; else a copy of ``homes``.

        Args:
            call: of this forward.
            homes: gradients of home parameters, expert by expert.
            slots: gradients of the slots' weights, slot by slot; ignored where accumulation is fused.

        Returns:
            the home gradients to hand on, once they have been waited for.
        """
        self.transport.weights_sent(self.pool)
        parameters = [parameter for place in self.experts.home_parameters for parameter in place]
        handed_on = list(homes)
        targets = [getattr(parameter, "main_grad", None) for parameter in parameters]
        if any(target is None for target in targets):
            handed_on = targets = [
                torch.zeros_like(p) if g is None else g.clone(memory_format=torch.contiguous_format)
                for p, g in zip(parameters, homes, strict=True)
            ]
        width = len(self.pool.shape.names)
        self._gradients.tensors = [targets[i : i + width] for i in range(0, len(targets), width)]
        fused = self.experts.fused_gradients
        with self.watch("gradients, start"):
            self.transport.send_home(call.planned, self.pool, self._gradients, None if fused else slots)
        return handed_on

    def _gradient_dtype(self) -> torch.dtype:
        parameter = self.experts.home_parameters[0][0]
        main = getattr(parameter, "main_grad", None)
        return parameter.dtype if main is None else main.dtype

    def _prepare_fused(self, flat: Sequence[torch.Tensor]) -> None:
        """Give the aliases what kernels that accumulate weight gradients themselves look for."""
        if not torch.is_grad_enabled():
            return
        homes = [parameter for place in self.experts.home_parameters for parameter in place]
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


class _Homes(torch.autograd.Function):
    """Aliases of home parameters; backward waits for the replicas' gradients."""

    @staticmethod
    def forward(ctx: Any, layer: LayerBalancer, *homes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        ctx.parameters = homes if layer.experts.fused_gradients else ()
        return tuple(home.view_as(home) for home in homes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        with ctx.layer.watch("gradients, end"):
            ctx.layer.transport.await_home(ctx.layer.pool)
        for parameter in ctx.parameters:
            if hasattr(parameter, "grad_added_to_main_grad"):
                parameter.grad_added_to_main_grad = True
        return (None, *gradients)


class _Slots(torch.autograd.Function):
    """Passes aliases of home parameters on, and adds those of slots; backward sends the replicas' gradients home."""

    @staticmethod
    def forward(ctx: Any, layer: LayerBalancer, call: Call, *homes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.call, ctx.homes = layer, call, len(homes)
        slots = [alias for slot in range(layer.pool.slots) for alias in layer.pool.weights.aliases(slot)]
        return (*(home.view_as(home) for home in homes), *slots)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        homes = ctx.layer._send_home(ctx.call, gradients[: ctx.homes], gradients[ctx.homes :])
        return (None, None, *homes)


class _BeforeExpertsBackward(torch.autograd.Function):
    """Marks where the backward of the experts begins."""

    @staticmethod
    def forward(ctx: Any, layer: LayerBalancer, call: Call, output: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.call = layer, call
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        ctx.layer._before_backward(ctx.call)
        return None, None, gradient


class _BeforeCombineBackward(torch.autograd.Function):
    """Marks where the backward of the combine begins."""

    @staticmethod
    def forward(ctx: Any, layer: LayerBalancer, call: Call, output: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.call = layer, call
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        with ctx.layer.watch("weights, again"):
            ctx.layer._place(ctx.call)
        return None, None, gradient
