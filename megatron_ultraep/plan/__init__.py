"""Pure functions: loads in, plan out. numpy, numba and ``layout.py`` only; integers; the same bits on every rank."""

from megatron_ultraep.plan.quota import solve
from megatron_ultraep.plan.types import Costs, NodeDecision, Outcome, Plan, PlanSettings, imbalance

__all__ = ["Costs", "NodeDecision", "Outcome", "Plan", "PlanSettings", "imbalance", "solve"]
