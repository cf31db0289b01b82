"""Batches that come from one patch each: exact, seekable, the same on every backend, fast.

``PatchBatchSampler`` is what a ``DataLoader`` holds; ``PatchGroups`` and ``EpochPlan`` are what it
is made of; ``PatchTensorLoader`` takes a loader's place where the data is in memory. Importing the
package imports neither torch nor CuPy.
"""

from gpusampler.batching import CostBudget, Temperature
from gpusampler.calibration.calibrate import calibrate
from gpusampler.groundwater import GWPatchDataset
from gpusampler.groups import PatchGroups
from gpusampler.plan import BatchBlock, Coverage, EpochPlan
from gpusampler.sampler import Batch, PatchBatchSampler, PatchTensorLoader
from gpusampler.sources import read_patch_ids

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BatchBlock",
    "CostBudget",
    "Coverage",
    "EpochPlan",
    "GWPatchDataset",
    "PatchBatchSampler",
    "PatchGroups",
    "PatchTensorLoader",
    "Temperature",
    "calibrate",
    "read_patch_ids",
]
