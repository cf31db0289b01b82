"""Simulate groundwater with MODFLOW 6 and write it as a patch folder for `GWPatchDataset`."""
