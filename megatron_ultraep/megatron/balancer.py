"""Balances the MoE layers of one model on one rank: adopts them, takes plans over, says what was done."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_ultraep import plan as planners
from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.megatron import microbatch
from megatron_ultraep.megatron.checkpoint import home_slot_of, set_home_slot
from megatron_ultraep.megatron.dispatcher import physical_dispatcher
from megatron_ultraep.megatron.experts import PhysicalExperts
from megatron_ultraep.megatron.layer_ranges import LayerRanges
from megatron_ultraep.megatron.plan_log import PlanLog
from megatron_ultraep.megatron.stages import (
    ATTRIBUTE,
    Attached,
    balanced_class,
    check_target,
    name_of,
    reasons_against,
)
from megatron_ultraep.megatron.support import Unsupported
from megatron_ultraep.plan.foresight import StepPlan
from megatron_ultraep.plan.types import Costs, Plan, PlanSettings
from megatron_ultraep.runtime import ranges
from megatron_ultraep.runtime.calls import Backwards
from megatron_ultraep.runtime.foresight import Foresight
from megatron_ultraep.runtime.layer import LayerBalancer
from megatron_ultraep.runtime.measure import measure_costs
from megatron_ultraep.runtime.planning import Aside, DevicePlanner, HostPlanner, Planner
from megatron_ultraep.runtime.slots import ExpertShape, SlotPool
from megatron_ultraep.runtime.stopwatch import Stopwatch
from megatron_ultraep.runtime.symmetric import SymmetricTransport
from megatron_ultraep.runtime.transport import Transport
from megatron_ultraep.telemetry.recorder import Recorder

log = logging.getLogger(__name__)


class Balancer:
    """Balances the MoE layers of one model on this rank. Made by :func:`megatron_ultraep.attach` or ``make_balancer``.

    Attributes:
        config: what it was made with.
        transport: of this rank's expert-parallel group; None on a rank without MoE layers.
        costs: what the gate weighs; None while nothing was measured, and without a gate.
    """

    def __init__(self, config: BalanceConfig, transport: Transport | None, name: str) -> None:
        self.config = config
        self.transport = transport
        self.costs: Costs | None = None
        self._watch: Stopwatch | None = None
        self._layers: list[torch.nn.Module] = []
        self._pools: dict[tuple[ExpertShape, int], SlotPool] = {}
        self._foresight: Foresight | None = None
        self._backwards = Backwards()
        self._ranges: LayerRanges | None = None
        recorder = None
        if config.record and transport is not None and transport.rank == 0:
            meta = {"settings": str(config)}
            recorder = Recorder(config.record, max_mib=config.record_mib, name=name, meta=meta)
        self._log = PlanLog(recorder)

    def adopt(
        self,
        layer: Any,
        *,
        home_slot: tuple[int, ...] = (),
        parent: torch.nn.Module | None = None,
        early: bool = False,
    ) -> None:
        """Balance one stock MoE layer. Collective over the expert-parallel group.

        Args:
            layer: a Megatron-core ``MoELayer`` on this balancer's expert-parallel group.
            home_slot: where experts live, a permutation; where they are already by default.
            parent: the transformer layer it is in; what comes before the experts there hides the way home of replicas'
                gradients.
            early: main gradients are not looked at before backward has ended (DDP without overlapped reduction).

        Raises:
            Unsupported: a layer that cannot be balanced, with what to change.
        """
        check_target()
        reasons = reasons_against(layer)
        if reasons:
            raise Unsupported(f"{name_of(layer)} cannot be balanced: " + "; ".join(reasons))
        assert self.transport is not None
        layout = self._layout(layer, home_slot or home_slot_of(layer))
        experts = PhysicalExperts(layer.experts, layout.slots)
        turn = len(self._layers) % self.config.slot_sets
        pool = self._pools.get((experts.shape, turn))
        if pool is None:
            pool = self._pools[experts.shape, turn] = self.transport.make_pool(experts.shape, layout.slots)
        if self.config.gate and self.costs is None:
            self.costs = self._measure(experts, pool, layout)
        if not self._layers:
            self._log.planned_with(self.settings)
        if self._watch is None:
            self._watch = Stopwatch(experts.shape.device)
            self._log.aside = Aside(experts.shape.device) if experts.shape.device.type == "cuda" else None
        if self._foresight is None:
            self._foresight = Foresight(self.transport.rank, experts.shape.device)
        foresight, number = self._foresight, int(layer.layer_number or 0)
        planner = self._planner(layer, layout, experts.shape.device)
        balancer = LayerBalancer(
            layout,
            experts,
            pool,
            self.transport,
            planner,
            self._log.observer(number),
            self._watch,
            early=early,
            key=microbatch.current_key_or_none,
            foresee=lambda: foresight.take(microbatch.current_key_or_none(), number) if len(foresight) else None,
            backwards=self._backwards,
        )
        if self.config.slot_sets > 1 and self._layers:
            getattr(self._layers[-1], ATTRIBUTE).balancer.alternate_with(balancer)
        stock = layer.token_dispatcher
        dispatcher = physical_dispatcher(stock, layout, self.transport.rank, balancer)
        hook = None if parent is None else parent.register_forward_pre_hook(lambda *_: balancer.begin())
        attached = Attached(self, balancer, type(layer), stock, hook)
        layer.token_dispatcher = dispatcher
        object.__setattr__(layer, ATTRIBUTE, attached)
        layer.__class__ = balanced_class(type(layer))
        self._layers.append(layer)
        if home_slot:
            set_home_slot(layer, home_slot)

    @property
    def settings(self) -> PlanSettings:
        """What plans are made with; the same on every rank."""
        return PlanSettings(self.config.min_tokens, self.config.tolerance_ppm, self.costs)

    def _planner(self, layer: Any, layout: ExpertLayout, device: torch.device) -> Planner:
        assert self.transport is not None
        assert self._watch is not None
        settings = self.settings
        if isinstance(self.transport, SymmetricTransport):
            try:
                return DevicePlanner(layout, settings, self.transport.rank, device, self._watch)
            except ValueError as error:
                log.warning("%s is planned on the host: %s", name_of(layer), error)

        def solve(loads: np.ndarray, layout: ExpertLayout) -> Plan:
            return planners.solve(loads, layout, settings)

        return HostPlanner(layout, layer.config.moe_router_topk, solve, self.transport.rank, self._watch)

    def _layout(self, layer: Any, home_slot: tuple[int, ...]) -> ExpertLayout:
        assert self.transport is not None
        try:
            return ExpertLayout(
                experts=layer.config.num_moe_experts,
                ranks=self.transport.size,
                home_slot=home_slot,
                node_size=self.config.node_size,
                slots=self.config.slots,
            )
        except ValueError as error:
            raise Unsupported(f"{name_of(layer)} cannot be balanced: {error}") from error

    def _measure(self, experts: PhysicalExperts, pool: SlotPool, layout: ExpertLayout) -> Costs:
        assert self.transport is not None
        costs = measure_costs(
            experts,
            pool,
            layout,
            self.transport,
            token_ns=self.config.token_ns,
            copy_ns_per_mib=self.config.copy_ns_per_mib,
        )
        if self.transport.rank == 0:
            log.info(
                "balancing gate: a token takes %.3f us, a replica %.1f us (%d bytes)",
                costs.token_ps / 1e6,
                costs.replica_ps / 1e6,
                costs.replica_bytes,
            )
        return costs

    @property
    def replicas(self) -> int:
        """Replicas made since the start, over the whole expert-parallel group; waits for the device."""
        return self._log.replicas

    def metrics(self) -> dict[str, float]:
        """Metrics of the plans since the last call, e.g. ``moe/imbalance_before/mean``; empty without any.

        See :mod:`megatron_ultraep.telemetry.metrics`. Of very long times between calls, only the newest plans count.
        """
        return self._log.metrics()

    def timings(self, on: bool | None = None) -> dict[str, float]:
        """How long parts of balancing held up the computing stream: mean time of one layer's call by part (us).

        Args:
            on: starts or ends timing; None leaves it as it is.

        Returns:
            what was timed since the last call; waits for the device.
        """
        if self._watch is None:
            return {}
        measured = self._watch.read()
        if on is not None:
            self._watch.on = on
        return measured

    def name_ranges(self, model: torch.nn.Module | Sequence[torch.nn.Module]) -> None:
        """Name ranges of a model's layers and of balancing for profilers until :meth:`release`.

        Args:
            model: a model or the chunks of one; also its layers that are not balanced.
        """
        if self._ranges is None:
            self._ranges = LayerRanges(model)
            ranges.enable()

    def foresee(
        self,
        step: StepPlan,
        keys: Sequence[MicroBatchKey],
        moe_layers: Mapping[int, int],
        samples: Mapping[MicroBatchKey, Sequence[str]] | None = None,
    ) -> None:
        """Take plans over that were made ahead; all ranks of the expert-parallel group call it alike.

        Their micro-batches then gather no loads and plan nothing, their hosts wait for nothing, and weights are placed
        before they are needed. All others are planned on their exact loads, as always.

        Args:
            step: plans of these micro-batches, for the expert layouts there are (:meth:`layout_of`).
            keys: of the micro-batches, in the step's order.
            moe_layers: index in the step's order of layers, by Megatron's layer number; also of layers elsewhere.
            samples: ids of each micro-batch on this rank, for errors.

        Raises:
            ForesightMismatch: plans for other layouts, or a micro-batch that has plans already.
        """
        if self._foresight is not None:
            layouts = {number: self.layout_of(number) for number in self._numbers()}
            index = {number: moe_layers[number] for number in layouts}
            self._foresight.set(step, keys, layouts, index, samples)

    def end_foresight(self, *, check: bool = True) -> None:
        """Forget the plans of :meth:`foresee`.

        Args:
            check: compare what routers did with what was planned for first; the host waits. To be done before the
                optimizer steps.

        Raises:
            ForesightMismatch: see :meth:`megatron_ultraep.runtime.foresight.Foresight.check`.
        """
        if self._foresight is None:
            return
        try:
            if check:
                self._foresight.check()
        finally:
            self._foresight.clear()
            self._backwards.clear()

    def layout_of(self, layer_number: int) -> ExpertLayout:
        """Where the experts of a layer of this rank are at home, by Megatron's layer number."""
        return self._numbers()[layer_number].layout

    def rehome(self, home_slots: Mapping[int, tuple[int, ...]]) -> None:
        """Say where the experts of layers are at home now, between steps; moves no weights.

        Args:
            home_slots: permutation by Megatron's layer number; layers that are not on this rank are passed over.
        """
        numbers = self._numbers()
        for number, home_slot in home_slots.items():
            if number in numbers:
                balancer = numbers[number]
                layout = dataclasses.replace(balancer.layout, home_slot=tuple(home_slot))
                layer = next(each for each in self._layers if int(each.layer_number or 0) == number)
                balancer.layout = layout
                balancer.planner = self._planner(layer, layout, balancer.pool.shape.device)

    def _numbers(self) -> dict[int, LayerBalancer]:
        return {int(layer.layer_number or 0): getattr(layer, ATTRIBUTE).balancer for layer in self._layers}

    @property
    def layers(self) -> tuple[torch.nn.Module, ...]:
        """The balanced layers of this rank."""
        return tuple(self._layers)

    @property
    def slot_bytes(self) -> int:
        """Device memory that slots take so far."""
        return sum(pool.bytes for pool in self._pools.values())

    def release(self) -> None:
        """Give all layers back as they were, and close.

        Raises:
            Unsupported: experts are away from where Megatron has them: stock layers would take others for them.
        """
        away = [each for each in self._layers if home_slot_of(each) != tuple(range(each.config.num_moe_experts))]
        if away:
            raise Unsupported(
                f"experts of {', '.join(map(name_of, away))} are away from where Megatron has them: move them back "
                "before detaching"
            )
        for layer in self._layers:
            attached: Attached = getattr(layer, ATTRIBUTE)
            layer.__class__ = attached.stock_class
            layer.token_dispatcher = attached.stock_dispatcher
            if attached.hook is not None:
                attached.hook.remove()
            object.__delattr__(layer, ATTRIBUTE)
        self._log.take_all()
        self.close()
        if self._ranges is not None:
            self._ranges.remove()
            self._ranges = None
            ranges.disable()
        self._layers.clear()
        self._pools.clear()
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    def close(self) -> None:
        """Write what is left of the records. Layers stay balanced."""
        self._log.close()
