"""What is done to rewards before advantages: penalties of length, and which groups say anything.

Legend: N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Soft penalty of responses that come near the longest allowed length, float32 ``[N]``, between ``-factor`` and 0.

    0 up to ``longest - buffer`` tokens, then falling linearly, ``-factor`` at ``longest`` and beyond. To be added to
    the rewards.

    Args:
        lengths: int ``[N]``, response tokens.
        longest: tokens of the longest response that is sampled.
        buffer: tokens over which the penalty grows, in 1 .. ``longest``.
        factor: penalty of a response that is cut off, in units of reward; >= 0.

    Raises:
        ValueError: a buffer or a factor out of range.

    Source:
        DAPO, arXiv:2503.14476, section 3.4, equation 13 (soft overlong punishment).
    """
    if not 1 <= buffer <= longest:
        raise ValueError(f"expected an overlong buffer of 1 to {longest} tokens (the longest response), got {buffer}")
    if not factor >= 0:
        raise ValueError(f"expected a penalty factor >= 0, got {factor}; it is subtracted from the reward")
    into = (lengths.to(torch.float64) - (longest - buffer)).clamp(min=0, max=buffer)
    return (-factor * into / buffer).to(torch.float32)


def informative(rewards: Tensor) -> bool:
    """Whether the rewards ``[n]`` of a group differ, so that comparing them says something.

    Source:
        Dynamic sampling: DAPO, arXiv:2503.14476, section 3.2, equation 11.
    """
    return rewards.numel() > 1 and bool((rewards != rewards[0]).any())
