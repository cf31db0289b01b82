"""Batches from one patch each: exact, seekable, fast, and identical on every backend.

``PatchBatchSampler`` is the batch sampler of a ``DataLoader``. It builds on ``PatchGroups`` and
``EpochPlan``. ``PatchTensorLoader`` replaces the loader if the data is in memory. Importing the
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
