"""Where ids lie in anything that is no map-style dataset."""

from __future__ import annotations

import os
from typing import Any

from gpusampler.core import arrays
from gpusampler.sources.arrow import arrow_ids
from gpusampler.sources.base import PatchIds
from gpusampler.sources.column_checks import no_column
from gpusampler.sources.dataframes import table_ids
from gpusampler.sources.files import path_ids
from gpusampler.sources.in_memory import array_ids, is_list_of_ids, list_ids
from gpusampler.sources.parquet import parquet_ids
from gpusampler.sources.zarr_hdf5 import chunked_ids


def known_ids(
    source: Any, column: Any = None, *, name: str = "ids", progress: bool = True
) -> PatchIds | None:
    """Return the ids in an array, a list, a file, a table or a column; None for anything else.

    Parameters
    ----------
    source, column, progress
        As in `read_patch_ids`.
    name : str
        What errors call ids in memory.

    Raises
    ------
    TypeError, ValueError, OSError, RuntimeError
        As by `read_patch_ids`.
    """
    if isinstance(source, PatchIds):
        no_column(column, f"a {type(source).__name__}")
        return source
    if isinstance(source, (str, os.PathLike)):
        # In full: the program may go to another folder before they are read.
        return _ids_in_file(os.path.abspath(os.fsdecode(source)), column, progress)
    if arrays.library_of(source) is not None:
        return array_ids(source, column, name, progress)
    for reader in (table_ids, arrow_ids, parquet_ids, chunked_ids):
        ids = reader(source, column, progress)
        if ids is not None:
            return ids
    # Whatever else is a column of a table says that it is an array by this method.
    if is_list_of_ids(source) or hasattr(source, "__array__"):
        no_column(column, f"a {type(source).__name__}")
        return list_ids(source, name, progress)
    return None


def _ids_in_file(path: str, column: Any, progress: bool) -> PatchIds:
    """Return ids that travel to another process as the file's name."""
    ids = path_ids(path, column, progress)
    ids.reopen = _ids_in_file, (path, column, False)
    return ids
