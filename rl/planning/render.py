"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from rl.config import RunConfig
from rl.planning.advice import Advice
from rl.planning.cluster import GIB
from rl.planning.memory import Memory
from rl.planning.parameters import active_parameters, total_parameters
from rl.planning.plan import Plan


def render(config: RunConfig, plan: Plan, advice: Sequence[Advice] = ()) -> str:
    """The whole plan.

    Args:
        config: of the run.
        plan: of it.
        advice: on what does not fit.
    """
    lines = [*_head(config, plan), ""]
    for memory in _different(plan.trainer):
        lines += [*_memory(memory, plan.limit), ""]
    lines += [*_memory(plan.engine, plan.limit), ""]
    if plan.phases:
        lines += [*_times(plan), ""]
    lines += [f"refused today: {sentence}" for sentence in plan.refused]
    lines += _verdict(plan, advice)
    return "\n".join(lines)


def _head(config: RunConfig, plan: Plan) -> list[str]:
    arch, parallel = plan.arch, config.trainer.parallel
    gpu = plan.cluster.gpu
    total, active = total_parameters(arch), active_parameters(arch)
    layers = f"{arch.layers} layers"
    if arch.is_moe:
        layers += f" ({len(arch.moe_layers)} MoE, {arch.experts} experts top-{arch.topk})"
    where = "CPUs" if plan.limit is None else (
        f"{plan.gpus} GPUs of {plan.cluster.nodes(plan.gpus)} x {plan.cluster.gpus_per_node} "
        f"{gpu.name.upper()} ({gpu.memory_gib:g} GiB)"
    )  # fmt: skip
    sizes = " ".join(f"{name}={getattr(parallel, name)}" for name in ("tp", "pp", "vpp", "ep", "etp"))
    return [
        f"{plan.name}: {arch.family}, {total / 1e9:.2f} billion parameters, {active / 1e9:.2f} active; {layers}",
        f"planned, not run, on {where}",
        f"trainer: {config.trainer.ranks} ranks, {sizes}, "
        f"dp={config.trainer.ranks // (parallel.tp * parallel.pp)}, micro-batches of "
        f"{config.trainer.tokens_per_micro_batch} tokens, recompute {config.trainer.recompute}"
        + "".join(f" {module}" for module in config.trainer.recompute_modules),
        f"engines: {config.rollout.engines} x {config.rollout.tensor_parallel} GPUs"
        + (", colocated with the trainer" if config.stream.colocated else ""),
    ]


def _different(stages: Sequence[Memory]) -> list[Memory]:
    """First and last stage, and the fullest: those between are alike."""
    fullest = max(stages, key=lambda memory: memory.total)
    return [memory for memory in stages if memory in (stages[0], stages[-1], fullest)]


def _memory(memory: Memory, limit: int | None) -> list[str]:
    head = f"{memory.what}: {memory.total / GIB:.1f} GiB"
    if limit is not None:
        head += f" of {limit / GIB:.1f}" + (": DOES NOT FIT" if memory.total > limit else "")
    return [head, *(f"  {part.bytes / GIB:8.2f}  {part.name:24} {part.note}".rstrip() for part in memory.parts)]


def _times(plan: Plan) -> list[str]:
    lines = [f"  {'expected':>9} {'bound':>9}  phase of a step (s)"]
    lines += [f"  {p.seconds:9.1f} {p.bound:9.1f}  {p.name:15} {p.note}".rstrip() for p in plan.phases]
    how = "generation beside the rest" if plan.overlapped else "one after another"
    return [*lines, f"  {plan.step_seconds:9.1f} {plan.step_bound:9.1f}  step: {how}"]


def _verdict(plan: Plan, advice: Sequence[Advice]) -> list[str]:
    if plan.limit is None:
        return ["on CPUs nothing is compared with a GPU's memory"]
    if plan.fits:
        return ["fits"]
    lines = []
    for what, excess in plan.over:
        lines.append(f"does not fit: {what}, by {excess / GIB:.1f} GiB")
        mine = [each for each in advice if each.what == what]
        for each in mine:
            if each.change:
                lines.append(f"  would fit with ({each.bytes / GIB:.1f} GiB): {each.render()}")
            else:
                lines.append(
                    f"  nothing that was tried fits; the closest takes {each.bytes / GIB:.1f} GiB: take GPUs with more "
                    "memory, or more of them"
                )
    return lines


def summary(plan: Plan) -> str:
    """One line, as recipes have it in their head."""
    if plan.limit is None:
        return f"{plan.fullest.total / GIB:.1f} GiB a trainer rank, {plan.engine.total / GIB:.1f} an engine, on CPUs"
    return (
        f"{plan.fullest.total / GIB:.1f} GiB a trainer rank and {plan.engine.total / GIB:.1f} an engine's GPU, of "
        f"{plan.limit / GIB:.1f}; {plan.step_seconds:.0f} s a step, bound {plan.step_bound:.0f} s"
    )
