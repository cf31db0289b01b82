"""Patch ids from arrays, files, columns of tables and datasets, read by `read_patch_ids`.

There is one module per kind of source. Its library is imported only when such a source is used.
"""

from gpusampler.sources.base import PatchIds
from gpusampler.sources.dispatch import read_patch_ids

__all__ = ["PatchIds", "read_patch_ids"]
