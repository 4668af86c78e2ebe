"""A schedule is made once and is the same on every rank, or nothing runs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch.distributed as dist

from megatron_ultraep.pipeline.problem import Schedule


class ScheduleMismatch(RuntimeError):
    """Ranks do not agree on what to run, or one of them cannot run it; raised on every rank alike."""


def share_schedule(schedule: Schedule | None, *, source: int = 0, group: Any = None) -> Schedule:
    """The schedule of one rank, on all of them. Collective.

    Args:
        schedule: what ``source`` made; not read on the others.
        source: global rank that made it.
        group: whose ranks share it; all by default.

    Raises:
        ValueError: on every rank, when the source gave none.
    """
    mine = dist.get_rank() == source
    text: list[str | None] = [schedule.to_json() if mine and schedule is not None else None]
    dist.broadcast_object_list(text, src=source, group=group)
    if text[0] is None:
        raise ValueError(f"expected a schedule from rank {source}, got none")
    return schedule if mine and schedule is not None else Schedule.from_json(text[0])


def agree(digest: str, complaint: str = "", *, group: Any = None) -> None:
    """Compare what all ranks are about to run. Collective.

    Args:
        digest: of this rank's schedule, see ``Schedule.digest``.
        complaint: why this rank cannot run it; empty if it can.
        group: whose ranks compare; all by default.

    Raises:
        ScheduleMismatch: on every rank, naming the ranks that differ or complain.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (digest, complaint), group=group)
    ranks = list(range(len(told))) if group is None else dist.get_process_group_ranks(group)
    complaints: dict[str, list[int]] = defaultdict(list)
    digests: dict[str, list[int]] = defaultdict(list)
    for rank, (theirs, said) in zip(ranks, told, strict=True):
        digests[theirs].append(rank)
        if said:
            complaints[said].append(rank)
    problems = [f"{_named(who)}: {said}" for said, who in complaints.items()]
    if len(digests) > 1:
        parts = sorted(digests.items(), key=lambda item: (-len(item[1]), item[1]))
        held = "; ".join(f"{_named(who)} {theirs[:12]}" for theirs, who in parts)
        problems.append(
            f"ranks hold different schedules ({held}): make the schedule on one rank and share it with share_schedule()"
        )
    if problems:
        raise ScheduleMismatch("; ".join(problems))


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
