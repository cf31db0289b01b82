"""Simulate groundwater with MODFLOW 6 and write patch folders for `GWPatchDataset`."""
