"""Samples grouped by patch: counted, sorted, saved in index files, selected and split."""

from gpusampler.groups.patch_groups import PatchGroups

__all__ = ["PatchGroups"]
