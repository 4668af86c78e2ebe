"""Megatron-UltraEP: experts balanced exactly, in every micro-batch of every MoE layer, over stock Megatron-core.

from megatron_ultraep import BalanceConfig, attach, detach

balancer = attach(model, BalanceConfig(slots=2))   # before or after DistributedDataParallel
"""

from typing import Any

from megatron_ultraep.config import BalanceConfig

__all__ = ["BalanceConfig", "Balancer", "Unsupported", "attach", "detach"]


def __getattr__(name: str) -> Any:
    # Megatron takes seconds to import; planners, traces and viewers do without it.
    if name in ("attach", "detach", "Balancer"):
        from megatron_ultraep.megatron import attach as module

        return getattr(module, name)
    if name == "Unsupported":
        from megatron_ultraep.megatron.support import Unsupported

        return Unsupported
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
