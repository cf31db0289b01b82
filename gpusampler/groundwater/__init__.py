"""Groundwater patch folders as a map-style dataset, one point cloud per batch."""

from gpusampler.groundwater.collate import collate_fn
from gpusampler.groundwater.dataset import GWPatchDataset
from gpusampler.groundwater.folder import COLUMNS
from gpusampler.groundwater.normalize import Normalize

__all__ = ["COLUMNS", "GWPatchDataset", "Normalize", "collate_fn"]
