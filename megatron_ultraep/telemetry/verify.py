"""Makes stored plans again from stored loads, from the record files alone.

A record keeps the tokens of each logical expert, where experts are at home, and what its recorder planned with
(``plan_settings`` of its chunk). Replicas, their tokens and decisions follow from these by
:func:`megatron_ultraep.plan.solve`, bit for bit, whether the plan was made on exact loads, on a GPU, or a step ahead.
Who sent which token is not recorded, and no replica depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultraep.plan import Costs, Plan, PlanSettings, solve
from megatron_ultraep.telemetry.blocks import FIGURES, OUTCOMES, Block
from megatron_ultraep.telemetry.store import chunk_files

_SHOWN = 20  # mismatches of one file that are told one by one


@dataclass(frozen=True)
class PlanCheck:
    """What making plans again gave.

    Attributes:
        plans: plans that were made again.
        replicas: replicas in them.
        unchecked: plans that could not be: their recorder did not keep what it planned with.
        mismatches: a sentence for every stored plan that is another one, and for every file that cannot be read.
    """

    plans: int
    replicas: int
    unchecked: int
    mismatches: tuple[str, ...]


def verify_plans(directory: Path, on_plan: Callable[[], None] = lambda: None) -> PlanCheck:
    """Make every plan in a directory of load records again.

    Args:
        directory: with chunk files in it or below.
        on_plan: called after each plan, e.g. to show progress.
    """
    plans = replicas = unchecked = 0
    mismatches: list[str] = []
    for folder in sorted({path.parent for path in directory.rglob("*.loads.npz")}):
        for path in chunk_files(folder):
            name = path.relative_to(directory)
            try:
                block = Block.read(path)
            except (ValueError, OSError) as error:
                mismatches.append(f"{name}: {error}")
                continue
            settings = settings_of(block.meta)
            if settings is None:
                unchecked += len(block)
                continue
            found = []
            for index in range(len(block)):
                plans += 1
                replicas += int((block.replica_expert[index] >= 0).sum())
                found += [f"{name}: {_where(block, index)}: {what}" for what in differences(block, index, settings)]
                on_plan()
            mismatches += found[:_SHOWN]
            if len(found) > _SHOWN:
                mismatches.append(f"{name}: {len(found) - _SHOWN} more differences")
    return PlanCheck(plans, replicas, unchecked, tuple(mismatches))


def settings_of(meta: Mapping[str, Any]) -> PlanSettings | None:
    """What the records of a chunk were planned with; None where it was not kept, or is no such thing."""
    kept = meta.get("plan_settings")
    if not isinstance(kept, Mapping):
        return None
    try:
        costs = kept["costs"]
        return PlanSettings(**{**kept, "costs": Costs(**costs) if costs is not None else None})
    except (KeyError, TypeError, ValueError):
        return None


def differences(block: Block, index: int, settings: PlanSettings) -> Iterator[str]:
    """How a stored plan differs from the planner's, in sentences; nothing if it does not."""
    tokens = block.tokens[index].astype(np.int64)
    sent = int(block.source_tokens[index].sum(dtype=np.int64))
    if sent != int(tokens.sum()):
        yield f"experts have {int(tokens.sum())} tokens, and source ranks sent {sent}"
    try:
        layout = block.expert_layout(index)
        loads = np.zeros((layout.ranks, layout.experts), dtype=np.int64)
        loads[0] = tokens
        plan = solve(loads, layout, settings)
    except (ValueError, IndexError) as error:
        yield f"no plan can be made of it: {error}"
        return
    slots = _replica_tokens(plan)
    stored_experts, stored_tokens = block.replica_expert[index], block.replica_tokens[index].astype(np.int64)
    wrong = np.argwhere((plan.replica_expert != stored_experts) | (slots != stored_tokens))
    for rank, slot in wrong.tolist():
        yield (
            f"slot {slot} of rank {rank} holds {_slot(stored_experts[rank, slot], stored_tokens[rank, slot])}, the "
            f"planner puts {_slot(plan.replica_expert[rank, slot], slots[rank, slot])} there"
        )
    for node, decision in enumerate(plan.decisions):
        made = {"outcome": decision.outcome} | {name: getattr(decision, name) for name in FIGURES}
        stored = {"outcome": _outcome(int(block.outcome[index, node]))}
        stored |= dict(zip(FIGURES, block.figures[index, node].tolist(), strict=True))
        different = [f"{name} {stored[name]}, the planner {made[name]}" for name in made if made[name] != stored[name]]
        if different:
            yield f"the decision for node {node} says {'; '.join(different)}"


def _replica_tokens(plan: Plan) -> npt.NDArray[np.int64]:
    """int64 ``[G, R]``: tokens that each slot computes."""
    per_rank = plan.layout.experts_per_rank
    return plan.physical_tokens.reshape(plan.layout.ranks, -1)[:, per_rank:]


def _outcome(index: int) -> str:
    return OUTCOMES[index] if index < len(OUTCOMES) else f"{index}, which is none"


def _slot(expert: Any, tokens: Any) -> str:
    return f"expert {int(expert)} with {int(tokens)} tokens" if expert >= 0 else "nothing"


def _where(block: Block, index: int) -> str:
    return f"{block.key(index)}, layer {int(block.layer[index])}"
