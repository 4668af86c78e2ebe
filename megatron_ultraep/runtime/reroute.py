"""From (token, logical expert) to (token, physical expert), by a plan's quotas. Deterministic, no communication.

The tokens of one expert on one rank are numbered in token order. The numbers are interleaved with a stride coprime to
their count, so that neighbouring tokens spread over copies, and looked up in the sums of the quotas.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from megatron_ultraep.plan.types import Plan, stride


def tables(plan: Plan, source: int) -> npt.NDArray[np.int64]:
    """What a source rank reroutes by, in one array: int64 ``[E, 2 + 2 C]``: count, stride, quota sums, physical ids."""
    until = plan.until(source)
    count = until[:, -1]
    return np.concatenate([np.maximum(1, count)[:, None], stride(count)[:, None], until, plan.copies], axis=1)


def reroute(
    probs: torch.Tensor, routing_map: torch.Tensor, table: torch.Tensor, *, topk: int, physical: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send every (token, expert) pair to one copy of the expert.

    Args:
        probs: ``[T, E]``; differentiable.
        routing_map: bool ``[T, E]`` with ``topk`` experts in each row.
        table: :func:`tables` on the device of ``probs``.
        topk: experts per token.
        physical: number of physical experts P.

    Returns:
        ``(probs [T, P], routing_map bool [T, P])``.
    """
    copies = (table.shape[1] - 2) // 2
    ordinals = routing_map.cumsum(0) - 1
    experts = routing_map.to(torch.uint8).topk(topk, dim=1).indices
    row = table[experts]  # [T, topk, 2 + 2 C]
    number = ordinals.gather(1, experts) * row[..., 1] % row[..., 0]
    copy = (number.unsqueeze(-1) >= row[..., 2 : 2 + copies]).sum(-1, keepdim=True)
    target = row[..., 2 + copies :].gather(-1, copy).squeeze(-1)
    shape = (probs.shape[0], physical)
    physical_map = torch.zeros(shape, dtype=torch.bool, device=probs.device).scatter(1, target, True)
    physical_probs = probs.new_zeros(shape).scatter(1, target, probs.gather(1, experts))
    return physical_probs, physical_map
