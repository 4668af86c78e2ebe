"""What one balanced MoE layer does in a training step; knows nothing of Megatron.

Forward:  route:   loads -> plan -> replica weights start to travel -> reroute
          (permutation, dispatch)
          compute: weights have come -> experts over homes and slots
          (combine)
Backward: before_combine: weights start to travel again, unless they lie in the slots still
          (combine)
          experts
          (dispatch, permutation); then replica gradients start home
          (router, and whatever the layer had before: attention)
          home gradients have their replicas' share, and are handed on

Invariants (asserted by the tests of this file and by the parity tests):

1. Every rank of the group makes the same plan, and the same calls of the transport in the same order; nothing is
   decided by one rank.
2. Replicas are plain tensors over slots, never parameters.
3. A home parameter enters the experts as an alias, made by one autograd node when the layer begins (``_Homes``). The
   aliases of slots are made by a second one before the experts (``_Slots``), which hangs on the first by a token.
   Backward of the second runs when the replicas' gradients exist, and starts them home. Backward of the first waits for
   them, and only then hands home gradients on; so nobody (DDP's buckets, hooks) sees a home gradient without its
   replicas' share. Autograd runs what was made last first, so the wait comes after the backward of all that the layer
   computed in between. Where nobody looks before backward has ended, the wait alone is made (``early``).
4. Once the host knows the plan (``Planned.filled``), which all ranks come to know alike, nothing is done that the plan
   does not need: no slot is computed that is empty, and without replicas nothing travels in either direction.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.runtime.calls import Backwards, Call
from megatron_ultraep.runtime.planning import Foreseen, Planned, Planner
from megatron_ultraep.runtime.slots import SlotPool
from megatron_ultraep.runtime.stopwatch import Stopwatch
from megatron_ultraep.runtime.transport import Homes, Parameters, Transport


class Experts(Protocol):
    """Home experts and slots as one module that computes with the weights it is given."""

    home_parameters: Sequence[Parameters]
    fused_gradients: bool
    awaits_parameters: bool
    """Home parameters may be on their way still, so that reading them early would wait early."""

    def before_reading(self) -> None:
        """Wait until home parameters hold this step's values."""
        ...

    def __call__(self, weights: Sequence[Parameters], *inputs: torch.Tensor) -> torch.Tensor:
        """Compute with ``weights[physical expert of this rank][parameter]``; there are none of the last empty slots."""
        ...


# In C, for every parameter of every forward.
_requires_grad = operator.attrgetter("requires_grad")
_main_grad = operator.attrgetter("main_grad")


@dataclass
class _Link:
    """What the two autograd nodes of one forward share.

    Attributes:
        call: set when the experts compute.
        direct: experts are given home parameters themselves, not aliases.
        slots: gradients of the slots' weights, where they wait for the home gradients.
        deferred: replicas' gradients start home behind the backward of the dispatch, not beside it: both want the
            links, and there is attention to hide behind.
        waiting: they are there and wait for that.
        sent: they are on their way home.
    """

    direct: bool = False
    deferred: bool = False
    waiting: bool = False

    call: Call | None = None
    slots: Sequence[torch.Tensor | None] | None = None
    sent: bool = False


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
        early: nobody looks at home gradients before backward has ended: with fused accumulation, home parameters then
            enter the experts themselves, and only the wait for the replicas' share is part of the graph. That spares
            the host an alias of every parameter.
        key: of the micro-batch that runs now, if it has one.
        foresee: the plan of the micro-batch that runs now, if it was made ahead.
        backwards: shared by the layers of a model: in backward weights are placed ahead, as all plans are known.

    Attributes:
        following: the next layer, where it has slots of its own: its weights are placed while this one's experts
            compute, in backward this one's while those compute. Layers that share slots are placed beside attention.
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
        *,
        early: bool = False,
        key: Callable[[], object] = lambda: None,
        foresee: Callable[[], Foreseen | None] = lambda: None,
        backwards: Backwards | None = None,
    ) -> None:
        self.early = early
        self.key = key
        self.foresee = foresee
        self.backwards = backwards or Backwards()
        self.following: LayerBalancer | None = None
        self._alternates = False  # the layer before has other slots
        self.layout = layout
        self.experts = experts
        self.pool = pool
        self.transport = transport
        self.planner = planner
        self.observe = observe
        self.watch = watch
        self._weights = Homes(experts.home_parameters)
        self._gradients = Homes([])
        self._parameters = [parameter for place in experts.home_parameters for parameter in place]
        self._token = torch.zeros((), device=pool.shape.device, requires_grad=True)
        self._aliases: tuple[torch.Tensor, ...] | None = None
        self._link = _Link()
        self._trained = True
        self._call: Call | None = None
        self._combining: Call | None = None
        self._ahead: Call | None = None

    def alternate_with(self, following: LayerBalancer) -> None:
        """Say that the next layer has slots of its own."""
        self.following, following._alternates = following, True

    def begin(self) -> None:
        """Make the aliases of home parameters now: at the start of all that their gradients can hide behind.

        Called before the layer that the experts belong to begins; without it :meth:`route` does it.
        """
        self._begin(deferred=True)
        self.prefetch()

    def _begin(self, *, deferred: bool) -> None:
        self._link = _Link(deferred=deferred)
        # Frozen experts have no gradients, and nor have their replicas.
        trained = list(map(_requires_grad, self._parameters))
        self._trained = any(trained)
        token = self._token if self._trained else self._token.detach()
        self._link.direct = (
            self.early and self.experts.fused_gradients and all(trained) and self._main_gradients() is not None
        )
        if self._link.direct:
            (token,) = _Homes.apply(self, self._link, token)  # type: ignore[no-untyped-call]
            self._aliases = (token, *self._parameters)
        else:
            self._aliases = _Homes.apply(self, self._link, token, *self._parameters)  # type: ignore[no-untyped-call]

    def prefetch(self) -> None:
        """Place the weights of the micro-batch that runs now, if its plan is known. Slots must not be in use."""
        foreseen = self.foresee()
        if foreseen is None or not foreseen.filled or not foreseen.filled.replicas or self.experts.awaits_parameters:
            return
        if self._ahead is None or self._ahead.planned is not foreseen:
            self._ahead = Call(foreseen)
            self._place(self._ahead)

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
            self._begin(deferred=False)
        self.experts.before_reading()
        foreseen, ahead = self.foresee(), self._ahead
        planned: Planned
        if foreseen is None:
            planned = self.planner.plan(routing_map, self.transport, self.pool)
        else:
            planned = self.planner.follow(foreseen, routing_map)
        self._ahead = None
        call = ahead if ahead is not None and ahead.planned is planned else Call(planned)
        call.trained = self._trained
        self._call = self._combining = call
        if planned.filled is None or planned.filled.replicas:
            self._place(call)
        self.observe(planned)
        return self.planner.reroute(planned, probs, routing_map)

    def dispatched(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mark what the last :meth:`route` dispatches: gradients that wait for its backward start home behind it."""
        link = self._link
        link.deferred = link.deferred and hidden.requires_grad
        return _when_backward_comes(lambda: self._release(link), hidden) if link.deferred else hidden

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
        token, *homes = aliases
        link = self._link
        link.call = call
        filled = call.planned.filled
        call.idle = filled is not None and not filled.replicas
        # One slot at least where the group has replicas: its node in the graph is what joins the exchange in backward.
        slots = 0 if call.idle else self.pool.slots if filled is None else max(1, filled.slots)
        aliases_of_slots = _Slots.apply(self, link, token, slots) if slots else ()  # type: ignore[no-untyped-call]
        flat = (*homes, *aliases_of_slots)
        width = len(self.pool.shape.names)
        weights = [flat[i : i + width] for i in range(0, len(flat), width)]
        if self.experts.fused_gradients:
            self._prepare_fused(flat, () if link.direct else self._parameters)
        if call.idle:
            if call.placed:
                self.transport.nothing_placed(self.pool)
            output = self.experts(weights, *inputs)
            if self.following is not None:
                self.following.prefetch()
            return output
        with self.watch("weights, forward"):
            self.transport.await_placed(call.planned, self.pool)
        output = self.experts(weights, *inputs)
        self.transport.weights_sent(self.pool)
        if self.following is not None:
            self.following.prefetch()
        key = self.key()
        if key is not None and output.requires_grad:
            self.backwards.add(key, self, call)
        return _when_backward_comes(lambda: self._before_backward(call), output)

    def combined(self, output: torch.Tensor) -> torch.Tensor:
        """Mark the combined output of the last :meth:`route`, so that weights travel beside the combine's backward."""
        call, self._combining = self._combining, None
        return output if call is None or call.idle else _when_backward_comes(lambda: self._place_again(call), output)

    def _place(self, call: Call) -> None:
        """Start to fill the slots with the replicas of this call, unless they hold them still."""
        if self.pool.holder is not call.token:
            self.pool.holder, call.placed = call.token, True
            self.transport.place(call.planned, self.pool, self._weights)

    def _place_again(self, call: Call) -> None:
        with self.watch("weights, again"):
            self._place(call)

    def _before_backward(self, call: Call) -> None:
        self._place(call)
        with self.watch("weights, backward"):
            self.transport.await_placed(call.planned, self.pool)
            if self._alternates:
                self._place_next(call)
            if not call.trained:
                self.transport.weights_sent(self.pool)
                return
            self.transport.before_gradients(
                call.planned, self.pool, self._gradient_dtype(), accumulate=self.experts.fused_gradients
            )

    def _place_next(self, call: Call) -> None:
        """Place the weights that backward needs next."""
        following = self.backwards.next_after(call)
        if following is not None:
            layer, waiting = following
            layer._place(waiting)

    def _send_home(self, link: _Link, slots: Sequence[torch.Tensor | None]) -> None:
        """Start the replicas' gradients home, if they go to ``main_grad`` (DDP's buffer).

        Args:
            link: of this forward.
            slots: gradients of the slots' weights, slot by slot, of the first slots; ignored where accumulation is
                fused.
        """
        self.transport.weights_sent(self.pool)
        if link.call is not None and not self._alternates:  # the experts are done with the slots
            self._place_next(link.call)
        missing = self.pool.slots * len(self.pool.shape.names) - len(slots)
        link.slots = (*slots, *(None,) * missing)
        targets = self._main_gradients()
        if targets is None:  # home gradients are on their way through autograd
            return
        if link.deferred:
            link.waiting = True
        else:
            self._begin_home(link, targets)

    def _release(self, link: _Link) -> None:
        """Start gradients home that wait."""
        targets = self._main_gradients()
        if link.waiting and targets is not None:
            self._begin_home(link, targets)

    def _main_gradients(self) -> list[torch.Tensor] | None:
        """DDP's buffers of the home parameters; None where not all have one."""
        try:
            found = list(map(_main_grad, self._parameters))
        except AttributeError:
            return None
        return None if found[0] is None else found

    def _begin_home(self, link: _Link, targets: Sequence[torch.Tensor]) -> None:
        assert link.call is not None
        width = len(self.pool.shape.names)
        self._gradients.tensors = [targets[i : i + width] for i in range(0, len(targets), width)]
        slots = None if self.experts.fused_gradients else link.slots
        with self.watch("gradients, start"):
            self.transport.send_home(link.call.planned, self.pool, self._gradients, slots)
        link.sent, link.waiting, link.slots = True, False, None

    def _end_home(self, link: _Link, homes: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Wait for the replicas' gradients.

        Args:
            link: of this forward.
            homes: gradients of home parameters, expert by expert.

        Returns:
            what to hand on: the same, or where replicas' gradients do not go to ``main_grad``, a copy with their share.
        """
        if link.call is not None and link.call.idle:
            return homes
        if link.slots is None and not link.sent:  # no slot was used here, but other ranks may wait for this one
            self._send_home(link, [None] * (self.pool.slots * len(self.pool.shape.names)))
        self._release(link)
        if not link.sent:
            homes = [
                torch.zeros_like(p) if g is None else g.clone(memory_format=torch.contiguous_format)
                for p, g in zip(self._parameters, homes, strict=True)
            ]
            self._begin_home(link, homes)  # type: ignore[arg-type]
        with self.watch("gradients, end"):
            self.transport.await_home(self.pool)
        self._gradients.tensors = ()  # or gradients of a model without DDP would live on here
        link.sent, link.slots = False, None
        return homes

    def _gradient_dtype(self) -> torch.dtype:
        parameter = self.experts.home_parameters[0][0]
        main = getattr(parameter, "main_grad", None)
        return parameter.dtype if main is None else main.dtype

    def _prepare_fused(self, flat: Sequence[torch.Tensor], homes: Sequence[torch.Tensor]) -> None:
        """Give the aliases what kernels that accumulate weight gradients themselves look for.

        Args:
            flat: what the experts are given.
            homes: home parameters whose aliases the first of ``flat`` are.
        """
        if not torch.is_grad_enabled() or not self._trained:
            return
        for parameter, alias in zip(homes, flat, strict=False):
            if hasattr(parameter, "main_grad"):
                alias.main_grad = parameter.main_grad  # type: ignore[attr-defined]
                alias.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        gradients = self.pool.gradients(self._gradient_dtype())
        replicas = flat[len(self._parameters) :]
        buffers = [buffer for slot in range(self.pool.slots) for buffer in gradients[slot]]
        for alias, buffer in zip(replicas, buffers, strict=False):
            alias.main_grad = buffer  # type: ignore[attr-defined]
            alias.grad_added_to_main_grad = False  # type: ignore[attr-defined]


class _Homes(torch.autograd.Function):
    """A token and aliases of home parameters; backward waits for the replicas' gradients."""

    @staticmethod
    def forward(
        ctx: Any, layer: LayerBalancer, link: _Link, token: torch.Tensor, *homes: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.link = layer, link
        return (token, *homes)  # autograd makes aliases of inputs that are returned

    @staticmethod
    def backward(ctx: Any, token: torch.Tensor | None, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        layer: LayerBalancer = ctx.layer
        handed_on = layer._end_home(ctx.link, gradients)
        if layer.experts.fused_gradients and not ctx.link.direct:
            for parameter in layer._parameters:
                if hasattr(parameter, "grad_added_to_main_grad"):
                    parameter.grad_added_to_main_grad = True
        return (None, None, None, *handed_on)


class _Slots(torch.autograd.Function):
    """Aliases of slots; backward sends the replicas' gradients home."""

    @staticmethod
    def forward(
        ctx: Any, layer: LayerBalancer, link: _Link, token: torch.Tensor, slots: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.link, ctx.token = layer, link, token.detach()
        return tuple(alias for slot in range(slots) for alias in layer.pool.weights.aliases(slot))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.layer._send_home(ctx.link, gradients)
        return (None, None, ctx.token, None)


class _WhenBackwardComes(torch.autograd.Function):
    """Passes a tensor on; when its gradient comes, something is done first."""

    @staticmethod
    def forward(ctx: Any, do: Callable[[], None], output: torch.Tensor) -> torch.Tensor:
        ctx.do = do
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.do()
        return None, gradient


def _when_backward_comes(do: Callable[[], None], output: torch.Tensor) -> torch.Tensor:
    marked: torch.Tensor = _WhenBackwardComes.apply(do, output)  # type: ignore[no-untyped-call]
    return marked
