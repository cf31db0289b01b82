"""How many samples a batch has and how many batches a patch has: sizes, budgets, weights, steps."""

from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.mixture import Temperature

__all__ = ["CostBudget", "Temperature"]
