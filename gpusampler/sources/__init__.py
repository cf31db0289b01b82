"""Where patch ids come from: arrays, files, columns of tables, and datasets that know them.

`read_patch_ids` takes all of these. A file of each kind of source stands in this folder; none of
their libraries is imported before a source of theirs is met.
"""

from gpusampler.sources.base import PatchIds
from gpusampler.sources.dispatch import read_patch_ids

__all__ = ["PatchIds", "read_patch_ids"]
