"""`read_patch_ids`: patch ids from any supported source."""

from __future__ import annotations

from typing import Any

from gpusampler.core.validation import check_bool
from gpusampler.sources.base import PatchIds
from gpusampler.sources.checks import check_no_column
from gpusampler.sources.datasets import dataset_patch_ids
from gpusampler.sources.formats import known_format_ids
from gpusampler.sources.zarr_hdf5 import Allowed


def read_patch_ids(
    source: Any,
    column: Any = None,
    *,
    progress: bool = True,
    allow_external: bool = False,
    allow_missing: bool = False,
) -> PatchIds:
    """Open the patch ids of all samples in any supported source, to be read in blocks.

    The number and dtype of the ids are read now. Integer ids are read later; string ids are read
    once now to find the distinct strings. Missing ids, and ids that do not fit in int64, raise an
    error when they are read.

    Parameters
    ----------
    source : object
        One id per sample, either integers that fit in int64 or names (strings), as one of:

        - a NumPy array (also a memory map), a torch or CuPy array on any device, or a list, tuple,
          range or ``array.array``. In a list, an object array or a pandas column, names may also be
          other keys that hash and sort: tuples, intervals, dates or paths;
        - the path of an ``.npy`` file, a ``.parquet`` or ``.pq`` file or a folder of them (sorted
          by path), a ``.zarr`` folder, or an ``.h5``, ``.hdf5`` or ``.hdf`` file;
        - a column or table of pandas, polars or pyarrow, or a HuggingFace dataset;
        - an array or group of zarr or h5py, or a ``ParquetFile`` or ``dataset`` of pyarrow;
        - a map-style dataset with ``get_all_patch_ids()``, ``patch_ids`` (either may give any of
          the above) or ``dataset[i]["patch_id"]``, or a ``Subset`` or ``ConcatDataset`` of such
          (subclasses that return samples in another order need samples with a "patch_id", or
          ``get_all_patch_ids()`` of their own);
        - `PatchIds`, which are returned unchanged.
    column : str, optional
        Column of a source with several columns; a path such as "a/b" in a group, or "a.b" in
        Parquet. Default: "patch_id" if it exists, else the only column.
    progress : bool
        Whether to show a progress bar if reading strings or samples takes over a second.
    allow_external : bool
        Whether an HDF5 file may name other files to read: in external links, external storage and
        virtual datasets. Such a file can name any file of the machine.
    allow_missing : bool
        Whether samples of Zarr and HDF5 without a stored value have the fill value: those of
        chunks that are not stored, or of external files that are missing or too short.

    Returns
    -------
    PatchIds
        ``read(start, stop)`` returns the ids of a range of samples as a NumPy integer array.
        ``dtype`` is the name of their dtype, or "str" for names. For names, ``names`` is the tuple
        of distinct names in ascending order, and ids are indices into it. Bytes are decoded as
        UTF-8. Strings sort as text ("10" before "9"), other keys by their own order.

    Raises
    ------
    TypeError
        If the source is not supported, its samples may be in another order than their ids, its ids
        are neither integers nor names, or names cannot be compared with one another.
    ValueError
        If the source is empty or not 1-D, its ``__getitem__`` and ``__getitems__`` disagree, an id
        is missing or does not fit in int64, a file is truncated or of an unknown format, or the
        column does not exist or must be given. If a Zarr or HDF5 source reads other files or lacks
        values without being allowed to, has a codec that executes code, or has chunks of over 1
        GiB.
    OSError
        If a file does not exist, is not readable, or shrinks while it is read.
    RuntimeError
        If the library that reads a file is not installed, or a dataset raises.

    Warns
    -----
    UserWarning
        If the smallest id in an int8 or int16 column of pandas is -1: its ``.cat.codes`` are -1
        where the value is missing.

    Examples
    --------
    >>> import numpy as np
    >>> ids = read_patch_ids(["sand", "clay", "sand"])
    >>> ids.names, ids.read(0, 3).tolist()
    (('clay', 'sand'), [1, 0, 1])
    >>> read_patch_ids(np.array([7, -1, 7], np.int16)).read(1, 3)
    array([-1,  7], dtype=int16)
    >>> read_patch_ids([(512, 768), (64, 64)]).names
    ((64, 64), (512, 768))
    """
    check_bool(progress, "progress")
    allowed = Allowed(
        check_bool(allow_external, "allow_external"), check_bool(allow_missing, "allow_missing")
    )
    ids = known_format_ids(source, column, progress=progress, allowed=allowed)
    if ids is not None:
        return ids
    check_no_column(column, f"a {type(source).__name__}")
    return dataset_patch_ids(source, progress=progress)
