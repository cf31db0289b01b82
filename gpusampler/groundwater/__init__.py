"""A map-style dataset of patch folders; its collate function keeps one copy of the points."""

from gpusampler.groundwater.collate import collate_fn
from gpusampler.groundwater.dataset import GWPatchDataset
from gpusampler.groundwater.folder import COLUMNS
from gpusampler.groundwater.normalize import Normalize

__all__ = ["COLUMNS", "GWPatchDataset", "Normalize", "collate_fn"]
