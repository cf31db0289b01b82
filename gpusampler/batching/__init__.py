"""Batch sizes, cost budgets, mixture weights and steps."""

from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.mixture import Temperature

__all__ = ["CostBudget", "Temperature"]
