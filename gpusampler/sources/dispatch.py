"""`read_patch_ids`: the patch id of every sample, from a source of any kind."""

from __future__ import annotations

from typing import Any

from gpusampler.core.validation import check_bool
from gpusampler.sources.base import PatchIds
from gpusampler.sources.checks import check_no_column
from gpusampler.sources.datasets import dataset_patch_ids
from gpusampler.sources.formats import known_format_ids


def read_patch_ids(source: Any, column: Any = None, *, progress: bool = True) -> PatchIds:
    """Return the patch id of every sample, to be read in blocks from where they lie.

    Nothing is read now but what tells how many there are and of which type; names are read once,
    to learn which there are. An id that is missing or does not fit is found when it is read.

    Parameters
    ----------
    source : object
        One of these, one id a sample, integers that fit in int64 or names (strings):

        - an array of NumPy (memory maps too), torch or CuPy on any device; a list, tuple or range;
        - the path of an ``.npy`` file, of a ``.parquet`` or ``.pq`` file or a folder of them
          (sorted by path), of a ``.zarr`` folder, of an ``.h5``, ``.hdf5`` or ``.hdf`` file;
        - a column or a table of pandas, polars or pyarrow, a dataset of HuggingFace;
        - an array or a group of zarr or h5py, a ``ParquetFile`` or ``dataset`` of pyarrow;
        - a map-style dataset with ``get_all_patch_ids()``, ``patch_ids`` (either may give any of
          the above) or ``dataset[i]["patch_id"]``, a ``Subset`` or ``ConcatDataset`` of such;
        - ids that were read before, which are returned as they are.
    column : str, optional
        Which column, of what has several: a path such as "a/b" in a group, "a.b" in Parquet.
        Default: "patch_id" if it is there, or the only one.
    progress : bool
        Show a bar while names or a dataset's samples are read, if that takes long.

    Returns
    -------
    PatchIds
        ``read(start, stop)`` gives any stretch as integers in NumPy. ``dtype`` is that of the ids;
        for names it is "str", ``names`` has the distinct ones in ascending order, and an id is a
        place among them. Bytes are names in UTF-8.

    Raises
    ------
    TypeError
        If the source is of no known kind, or its ids are neither integers nor names.
    ValueError
        If it is empty, is not 1-D, has no id for a sample (or one that does not fit in int64), is
        a file that is cut off or of no known kind, or the column is not there or must be named.
    OSError
        If a file is not there, may not be read, or becomes shorter while it is read.
    RuntimeError
        If the library that reads a file is not installed, or a dataset raises.

    Examples
    --------
    >>> import numpy as np
    >>> ids = read_patch_ids(["sand", "clay", "sand"])
    >>> ids.names, ids.read(0, 3).tolist()
    (('clay', 'sand'), [1, 0, 1])
    >>> read_patch_ids(np.array([7, -1, 7], np.int16)).read(1, 3)
    array([-1,  7], dtype=int16)
    """
    check_bool(progress, "progress")
    ids = known_format_ids(source, column, progress=progress)
    if ids is not None:
        return ids
    check_no_column(column, f"a {type(source).__name__}")
    return dataset_patch_ids(source, progress=progress)
