"""The plan of an epoch: every batch as a function of (seed, epoch, slot)."""

from gpusampler.plan.coverage import Coverage
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import BatchBlock

__all__ = ["BatchBlock", "Coverage", "EpochPlan"]
