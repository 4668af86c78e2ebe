"""Balancing of stock Megatron-core MoE layers, built by anyone, before or after DistributedDataParallel.

    balancer = attach(model, BalanceConfig(slots=2))
    ...train...
    detach(model)

What changes in a layer: its class becomes a subclass that overrides two stages, and its dispatcher is replaced by the
same dispatcher over physical experts. Nothing of Megatron is patched; its modules keep their parameters.

| stage | stock | balanced |
|---|---|---|
| ``route`` | logical probs and map; auxiliary losses, expert bias | the same code |
| ``preprocess`` | dispatcher's preprocess | gather loads, plan, reroute; then the same code over physical experts |
| ``dispatch``, ``combine``, shared experts | | the same code |
| ``routed_experts_compute`` | experts | the same between: weights into slots, experts over homes and slots |
| ``postprocess`` | | the same code, then a mark where backward begins |

A forward pre-hook on the transformer layer marks what the replicas' gradients can hide behind; without one (a MoE layer
that is in none) they hide behind less.
"""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep import plan as planners
from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.layout import ExpertLayout, MicroBatchKey
from megatron_ultraep.megatron import compat, microbatch
from megatron_ultraep.megatron.dispatcher import physical_dispatcher
from megatron_ultraep.megatron.experts import PhysicalExperts
from megatron_ultraep.megatron.support import Unsupported, check_version, refusals
from megatron_ultraep.plan.foresight import StepPlan
from megatron_ultraep.plan.types import Costs, Plan, PlanSettings
from megatron_ultraep.runtime import choose
from megatron_ultraep.runtime.foresight import Foresight
from megatron_ultraep.runtime.layer import Backwards, LayerBalancer
from megatron_ultraep.runtime.measure import measure_costs
from megatron_ultraep.runtime.planning import DevicePlanner, HostPlanner, PlanBatch, Planned, Planner
from megatron_ultraep.runtime.slots import ExpertShape, SlotPool
from megatron_ultraep.runtime.stopwatch import Stopwatch
from megatron_ultraep.runtime.symmetric import SymmetricTransport
from megatron_ultraep.runtime.transport import Transport
from megatron_ultraep.telemetry.metrics import StepMetrics
from megatron_ultraep.telemetry.recorder import Recorder

log = logging.getLogger(__name__)

_ATTRIBUTE = "_ultraep"
_MOST_COUNTED = 100_000  # (micro-batch, layer)s that metrics are kept of
_MOST_ARRIVING = 4096  # plans that are not counted yet
_MOST_BYTES = 16 * 2**20  # of the device's memory, in them
_MOST_CROSSING = 16  # batches of plans on the host that are not counted yet
_STAGES = {
    "preprocess": ["self", "hidden_states", "probs", "routing_map"],
    "routed_experts_compute": ["self", "hidden_states", "probs"],
    "postprocess": ["self", "output", "shared_expert_output"],
}


class _BalancedStages:
    """The stages that change; mixed into the class of a layer by :func:`_balanced_class`."""

    def preprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> Any:
        balancer: LayerBalancer = getattr(self, _ATTRIBUTE).balancer
        return super().preprocess(hidden_states, *balancer.route(probs, routing_map))  # type: ignore[misc]

    def routed_experts_compute(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        balancer: LayerBalancer = getattr(self, _ATTRIBUTE).balancer
        dispatcher: Any = self.token_dispatcher  # type: ignore[attr-defined]
        inputs = dispatcher.dispatch_postprocess(hidden_states, probs)
        return dispatcher.combine_preprocess(balancer.compute(*inputs)), None

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        balancer: LayerBalancer = getattr(self, _ATTRIBUTE).balancer
        return balancer.combined(super().postprocess(output, shared_expert_output))  # type: ignore[misc]


_classes: dict[type, type] = {}


def _balanced_class(stock: type) -> type:
    if stock not in _classes:
        _classes[stock] = type(f"Balanced{stock.__name__}", (_BalancedStages, stock), {"__module__": __name__})
    return _classes[stock]


class _Attached:
    """What a balanced layer carries, and what gives it back as it was."""

    def __init__(
        self, owner: Balancer, balancer: LayerBalancer, stock_class: type, stock_dispatcher: Any, hook: Any
    ) -> None:
        self.owner = owner
        self.balancer = balancer
        self.stock_class = stock_class
        self.stock_dispatcher = stock_dispatcher
        self.hook = hook


class Balancer:
    """Balances the MoE layers of one model on this rank. Made by :func:`attach` or :func:`make_balancer`.

    Attributes:
        config: what it was made with.
        transport: of this rank's expert-parallel group; None on a rank without MoE layers.
        costs: what the gate weighs; None while nothing was measured, and without a gate.
    """

    def __init__(self, config: BalanceConfig, transport: Transport | None, name: str) -> None:
        self.config = config
        self.transport = transport
        self.costs: Costs | None = None
        self._replicas = 0
        self._watch: Stopwatch | None = None
        self._arriving: list[tuple[MicroBatchKey, int, Planned]] = []
        self._arriving_bytes = 0
        self._crossing: list[tuple[list[tuple[MicroBatchKey, int]], PlanBatch]] = []
        self._name = name
        self._layers: list[torch.nn.Module] = []
        self._pools: dict[tuple[ExpertShape, int], SlotPool] = {}
        self._foresight: Foresight | None = None
        self._backwards = Backwards()
        self._metrics = StepMetrics()
        self._recorder: Recorder | None = None
        self._unnamed: dict[int, int] = {}
        self._counted: set[tuple[MicroBatchKey, int]] = set()
        if config.record and transport is not None and transport.rank == 0:
            meta = {"settings": str(config)}
            self._recorder = Recorder(config.record, max_mib=config.record_mib, name=name, meta=meta)
            atexit.register(self.close)
        # Recomputed layers must find the key of the forward that saved them, or records count them twice.
        microbatch.install()

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
            home_slot: where experts live, a permutation; as Megatron has them by default.
            parent: the transformer layer it is in; what comes before the experts there hides the way home of replicas'
                gradients.
            early: main gradients are not looked at before backward has ended (DDP without overlapped reduction).

        Raises:
            Unsupported: a layer that cannot be balanced, with what to change.
        """
        _check_target()
        reasons = _reasons(layer)
        if reasons:
            raise Unsupported(f"{_name(layer)} cannot be balanced: " + "; ".join(reasons))
        assert self.transport is not None
        layout = self._layout(layer, home_slot)
        experts = PhysicalExperts(layer.experts, layout.slots)
        turn = len(self._layers) % self.config.slot_sets
        pool = self._pools.get((experts.shape, turn))
        if pool is None:
            pool = self._pools[experts.shape, turn] = self.transport.make_pool(experts.shape, layout.slots)
        if self.config.gate and self.costs is None:
            self.costs = self._measure(experts, pool, layout)
        if self._watch is None:
            self._watch = Stopwatch(experts.shape.device)
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
            self._observer(layer),
            self._watch,
            early=early,
            foresee=lambda: foresight.take(microbatch.current_key_or_none(), number) if len(foresight) else None,
            backwards=self._backwards,
        )
        if self.config.slot_sets > 1 and self._layers:
            getattr(self._layers[-1], _ATTRIBUTE).balancer.alternate_with(balancer)
        stock = layer.token_dispatcher
        dispatcher = physical_dispatcher(stock, layout, self.transport.rank, balancer)
        hook = None if parent is None else parent.register_forward_pre_hook(lambda *_: balancer.begin())
        attached = _Attached(self, balancer, type(layer), stock, hook)
        layer.token_dispatcher = dispatcher
        object.__setattr__(layer, _ATTRIBUTE, attached)
        layer.__class__ = _balanced_class(type(layer))
        self._layers.append(layer)

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
                log.warning("%s is planned on the host: %s", _name(layer), error)

        def solve(loads: np.ndarray, layout: ExpertLayout) -> Plan:
            return planners.solve(loads, layout, settings)

        return HostPlanner(layout, layer.config.moe_router_topk, solve, self._watch)

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
            raise Unsupported(f"{_name(layer)} cannot be balanced: {error}") from error

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

    def _observer(self, layer: Any) -> Callable[[Planned], None]:
        def observe(planned: Planned) -> None:
            number = int(layer.layer_number or 0)
            key = self._key(number)
            if (key, number) in self._counted:
                return  # recomputation
            if len(self._counted) >= _MOST_COUNTED:  # nobody asks for metrics
                self.metrics()
            self._counted.add((key, number))
            self._arriving.append((key, number, planned))
            # Plans made on a device stay there until they are many or somebody asks: the next kernels wait.
            self._arriving_bytes += planned.bytes
            if self._arriving_bytes > _MOST_BYTES or len(self._arriving) >= _MOST_ARRIVING:
                self._send_over()
            else:
                self._land()

        return observe

    def _send_over(self) -> None:
        """Start the plans since the last time on their way to the host."""
        arriving, self._arriving, self._arriving_bytes = self._arriving, [], 0
        names = [(key, number) for key, number, _ in arriving]
        self._crossing.append((names, PlanBatch([planned for _, _, planned in arriving])))

    def _land(self) -> None:
        """Take plans that have come out of pinned memory, and count the oldest where they are many; waits for none."""
        landed = [batch.landed() for _, batch in self._crossing]
        while landed and landed[0] and len(self._crossing) > _MOST_CROSSING:
            landed.pop(0)
            self._take(*self._crossing.pop(0))

    def _take_all(self) -> None:
        """Count and record all plans since the last time; waits for the device."""
        self._send_over()
        crossing, self._crossing = self._crossing, []
        for names, batch in crossing:
            self._take(names, batch)

    def _take(self, names: Sequence[tuple[MicroBatchKey, int]], batch: PlanBatch) -> None:
        for (key, number), plan in zip(names, batch.plans(), strict=True):
            self._replicas += len(plan.replicas)
            self._metrics.add(number, plan)
            if self._recorder is not None:
                self._recorder.record(key, number, plan)

    @property
    def replicas(self) -> int:
        """Replicas made since the start, over the whole expert-parallel group; waits for the device."""
        self._take_all()
        return self._replicas

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

    def _key(self, layer: int) -> MicroBatchKey:
        key = microbatch.current_key_or_none()
        if key is not None:
            return key
        # A job that names no micro-batches: they are numbered as they come, recomputation included.
        count = self._unnamed.get(layer, 0)
        self._unnamed[layer] = count + 1
        return MicroBatchKey("model", "train", 0, count)

    def metrics(self) -> dict[str, float]:
        """Metrics of the plans since the last call, e.g. ``moe/imbalance_before/mean``; empty without any.

        See :mod:`megatron_ultraep.telemetry.metrics`. Of very long times between calls, only the newest plans count.
        """
        self._take_all()
        self._counted.clear()
        return self._metrics.finish()

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
        return {int(layer.layer_number or 0): getattr(layer, _ATTRIBUTE).balancer for layer in self._layers}

    @property
    def layers(self) -> tuple[torch.nn.Module, ...]:
        """The balanced layers of this rank."""
        return tuple(self._layers)

    @property
    def slot_bytes(self) -> int:
        """Device memory that slots take so far."""
        return sum(pool.bytes for pool in self._pools.values())

    def release(self) -> None:
        """Give all layers back as they were, and close."""
        for layer in self._layers:
            attached: _Attached = getattr(layer, _ATTRIBUTE)
            layer.__class__ = attached.stock_class
            layer.token_dispatcher = attached.stock_dispatcher
            if attached.hook is not None:
                attached.hook.remove()
            object.__delattr__(layer, _ATTRIBUTE)
        self._take_all()
        self.close()
        self._layers.clear()
        self._pools.clear()
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    def close(self) -> None:
        """Write what is left of the records. Layers stay balanced."""
        if self._recorder is not None:
            self._take_all()
            self._recorder.close()
            self._recorder = None
        atexit.unregister(self.close)


def attach(
    model: torch.nn.Module | Sequence[torch.nn.Module], config: BalanceConfig | None = None, *, timeout_s: float = 600.0
) -> Balancer | None:
    """Balance every MoE layer of a model.

    Collective over all ranks of the world; every rank calls it with its part of the model, also one without MoE layers.

    Args:
        model: a model or the chunks of one, wrapped in DistributedDataParallel or not.
        config: how to balance; the same on every rank.
        timeout_s: limit of every wait of balancing's own communication (s).

    Returns:
        the balancer; None when ``config.enabled`` is False: then nothing was touched.

    Raises:
        Unsupported: on all ranks alike, when a layer of any rank cannot be balanced.
    """
    config = config or BalanceConfig()
    if not config.enabled:
        return None
    layers = moe_layers(model)
    groups = {tuple(dist.get_process_group_ranks(layer.ep_group)) for layer in layers}
    mine = groups.pop() if len(groups) == 1 else ()
    problem = f"MoE layers are on several expert-parallel groups: {sorted(groups | {mine})}" if groups else ""
    if not problem:
        problem = next((f"{_name(layer)}: {reason}" for layer in layers for reason in _reasons(layer)), "")
    balancer = make_balancer(config, mine, problem=problem, timeout_s=timeout_s)
    parents = _parents(model)
    early = _reduced_after_backward(model)
    try:
        for layer in layers:
            balancer.adopt(layer, parent=parents.get(id(layer)), early=early)
    except BaseException:
        balancer.release()
        raise
    return balancer


def make_balancer(
    config: BalanceConfig, ranks: Iterable[int], *, problem: str = "", timeout_s: float = 600.0
) -> Balancer:
    """A balancer without layers; they are adopted one by one. Collective over all ranks of the world.

    Args:
        config: how to balance; the same on every rank.
        ranks: global ranks of this rank's expert-parallel group; none on a rank without MoE layers.
        problem: why this rank cannot take part, if it cannot: then all ranks raise.
        timeout_s: limit of every wait of balancing's own communication (s).

    Raises:
        Unsupported: when any rank has a problem, or none has an expert-parallel group; on all ranks alike.
    """
    warning = check_version(allow_untested=config.allow_untested)
    if warning:
        log.warning("%s", warning)
    mine = tuple(ranks)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (mine, problem, config, choose.means(config.transport)))
    first = next(((rank, said) for rank, (_, said, _, _) in enumerate(told) if said), None)
    if first is not None:
        raise Unsupported(f"the model cannot be balanced: {first[1]} (rank {first[0]})")
    differs = next((rank for rank, (_, _, other, _) in enumerate(told) if _shared(other) != _shared(config)), None)
    if differs is not None:
        raise Unsupported(
            f"ranks were given different settings: rank {dist.get_rank()} {config}, rank {differs} {told[differs][2]}"
        )
    groups = sorted({group for group, _, _, _ in told if group})
    if not groups:
        raise Unsupported("the model cannot be balanced: it has no MoE layer on any rank")
    symmetric = _symmetric(config, groups, [means for _, _, _, means in told])
    transport = choose.make_transport(groups, mine, config.node_size, symmetric=symmetric, timeout_s=timeout_s)
    return Balancer(config, transport, name=f"ranks-{mine[0]}-{mine[-1]}" if mine else "none")


def _symmetric(config: BalanceConfig, groups: Sequence[tuple[int, ...]], told: Sequence[choose.Means]) -> bool:
    """Whether weights and gradients travel through symmetric memory; the same on every rank."""
    if config.transport == "collective":
        return False
    # A node size that no layout allows is refused where layers are adopted.
    if config.node_size and any(len(group) % config.node_size for group in groups):
        return False
    why_not = choose.why_not_symmetric(groups, config.node_size, told)
    if not why_not:
        return True
    if config.transport == "symmetric":
        raise Unsupported(f"transport 'symmetric' cannot be used: {why_not}")
    if dist.get_rank() == 0:  # on GPUs it is worth a warning: the other one is faster
        log.log(logging.WARNING if torch.cuda.is_available() else logging.INFO, "transport 'collective': %s", why_not)
    return False


def _shared(config: BalanceConfig) -> tuple[Any, ...]:
    """The settings that all ranks must share."""
    own = {"enabled", "record", "record_mib", "allow_untested"}
    return tuple(value for name, value in dataclasses.asdict(config).items() if name not in own)


def detach(model: torch.nn.Module | Sequence[torch.nn.Module]) -> None:
    """Give a balanced model back as it was; a model that is not balanced stays as it is. Collective like attach."""
    owners = {id(a.owner): a.owner for layer in moe_layers(model) if (a := getattr(layer, _ATTRIBUTE, None))}
    for owner in owners.values():
        owner.release()


def moe_layers(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[Any]:
    """The MoE layers of a model's chunks, in order."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, compat.moe_layer_class())]


def _parents(model: torch.nn.Module | Sequence[torch.nn.Module]) -> dict[int, torch.nn.Module]:
    """The transformer layer of each MoE layer, by the id of the latter."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    kind = compat.moe_layer_class()
    found = ((getattr(module, "mlp", None), module) for chunk in chunks for module in chunk.modules())
    return {id(mlp): module for mlp, module in found if isinstance(mlp, kind)}


def _reduced_after_backward(model: torch.nn.Module | Sequence[torch.nn.Module]) -> bool:
    """Whether every chunk is in a DistributedDataParallel that reduces gradients when backward has ended."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    configs = [getattr(chunk, "ddp_config", None) for chunk in chunks]
    return all(config is not None and not config.overlap_grad_reduce for config in configs)


def _reasons(layer: Any) -> list[str]:
    """Why a layer cannot be balanced now."""
    return ["it is balanced already: detach the model first"] if hasattr(layer, _ATTRIBUTE) else refusals(layer)


def _name(layer: Any) -> str:
    return f"MoE layer {layer.layer_number}"


def _check_target() -> None:
    """The stages that a balanced layer overrides are what they were when this was written."""
    stock = compat.moe_layer_class()
    for name, expected in _STAGES.items():
        found = list(inspect.signature(getattr(stock, name)).parameters)
        if found != expected:
            raise Unsupported(
                f"MoELayer.{name} of Megatron-core {compat.version()} takes {found}, expected {expected}; tested "
                f"versions: {', '.join(compat.TESTED_VERSIONS)}"
            )
