"""Patch ids in a column of Parquet files, decoded one row group at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpusampler.core.files import check_regular
from gpusampler.sources.arrow import arrow_values_ids, id_dtype
from gpusampler.sources.base import BLOCK, PatchIds
from gpusampler.sources.checks import choose_column, explain_errors, import_library, is_instance

SUFFIXES = (".parquet", ".pq")

_READ_BYTES = 1 << 20
_KIND = "a complete Parquet file"


def parquet_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in a pyarrow ParquetFile or Dataset; None for anything else."""
    if is_instance(source, "pyarrow.parquet", "ParquetFile"):
        return _column_ids([lambda: source], ["the Parquet file"], column, None, progress)
    if not is_instance(source, "pyarrow.dataset", "Dataset"):
        return None
    if getattr(getattr(source, "format", None), "default_extname", None) != "parquet":
        raise TypeError(
            "source must be a dataset of Parquet files, "
            f"got a {type(source).__name__} of another format; pass dataset.to_table(columns=...)"
        )
    pq = import_library("pyarrow.parquet", "a pyarrow dataset")
    filesystem = source.filesystem

    def opener(path: str) -> Callable[[], Any]:
        return lambda: pq.ParquetFile(filesystem.open_input_file(path), buffer_size=_READ_BYTES)

    return _column_ids(
        [opener(path) for path in source.files], source.files, column, None, progress
    )


def parquet_path_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in a column of a Parquet file, or of all files in a folder, sorted by path.

    Only the footers are read now, or the whole column if the ids are strings.
    """
    pq = import_library("pyarrow.parquet", path)
    paths = _list_files(path) if os.path.isdir(path) else [path]

    def opener(path: str) -> Callable[[], Any]:
        def open_file() -> Any:
            check_regular(path)
            return pq.ParquetFile(path, buffer_size=_READ_BYTES)

        return open_file

    modified = max(os.stat(path).st_mtime_ns for path in paths)
    return _column_ids([opener(path) for path in paths], paths, column, modified, progress)


def has_parquet(folder: str) -> bool:
    """Whether a folder contains a Parquet file at any depth."""
    return next(_walk(folder), None) is not None


def _list_files(folder: str) -> list[str]:
    paths = sorted(_walk(folder))
    if not paths:
        raise ValueError(f"source must be a folder with .parquet files, got {folder!r} without one")
    return paths


def _walk(folder: str) -> Iterator[str]:
    # Like pyarrow.dataset, ignore names that start with a dot or underscore.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "_")):
                continue
            if entry.is_dir():
                yield from _walk(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path


def _column_ids(
    openers: list[Callable[[], Any]],
    names: list[str],
    column: Any,
    modified: int | None,
    progress: bool,
) -> PatchIds:
    dtypes: set[str] = set()
    rows: list[int] = []
    groups: list[tuple[int, int]] = []
    for file_index, (open_file, name) in enumerate(zip(openers, names, strict=True)):
        with explain_errors(_KIND, repr(name)):
            file = open_file()
            if file_index == 0:
                column = _choose_field(file.schema_arrow, column, name)
            arrow_type = _type_of(file.schema_arrow, column, name)
            dtypes.add(id_dtype(arrow_type, f" in column {column!r} of {name!r}"))
            if "str" in dtypes and len(dtypes) > 1:
                raise TypeError(
                    f"ids must be all strings or all integers, got {arrow_type} in column "
                    f"{column!r} of {name!r}, unlike the files before it; convert them to one type"
                )
            for group, num_rows in enumerate(_rows_of_groups(file.metadata, column)):
                rows.append(num_rows)
                groups.append((file_index, group))
    if not dtypes:
        raise ValueError("source must be a dataset with at least one file, got none")
    dtype = dtypes.pop() if len(dtypes) == 1 else np.result_type(*dtypes).name
    if sum(rows) >= 1 << 63:
        raise ValueError(f"source must have < 2**63 rows, got {sum(rows)} in {names[0]!r}")
    reader = _ColumnReader(openers, names, groups, np.cumsum(np.array(rows, np.int64)), str(column))
    return arrow_values_ids(
        reader.values,
        # NumPy promotes uint64 and signed integers to a float; all valid ids fit in int64.
        "int64" if dtype.startswith("float") else dtype,
        sum(rows),
        modified=modified,
        seekable=False,
        progress=progress,
    )


def _rows_of_groups(metadata: Any, column: str) -> list[int]:
    """Return the numbers of rows of the row groups, which a damaged footer contradicts."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    index = paths.index(column) if column in paths else None
    rows: list[int] = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        rows.append(group.num_rows)
        num_values = rows[-1] if index is None else group.column(index).num_values
        if rows[-1] < 0 or num_values != rows[-1]:
            raise ValueError(
                f"a row group has {rows[-1]} rows, but {num_values} values of a column"
            )
    if sum(rows) != metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows, but it has {metadata.num_rows}")
    return rows


def _choose_field(schema: Any, column: Any, name: str) -> Any:
    top = column
    if isinstance(column, str) and column not in schema.names:
        # "a.b" is field b of column a.
        top = column.partition(".")[0] if column.partition(".")[0] in schema.names else column
    chosen = choose_column(schema.names, top, repr(name))
    return chosen if column is None else column


def _type_of(schema: Any, column: str, name: str) -> Any:
    if column in schema.names:
        return schema.field(column).type
    head, *fields = column.split(".")
    if head not in schema.names:
        choose_column(schema.names, column, repr(name))
    arrow_type = schema.field(head).type
    for field in fields:
        children = [arrow_type.field(i).name for i in range(arrow_type.num_fields)]
        index = children.index(choose_column(children, field, f"{head!r}"))
        arrow_type = arrow_type.field(index).type
    return arrow_type


class _ColumnReader:
    """Forward reader of a column that decodes each row group once and keeps the last batch."""

    def __init__(
        self,
        openers: list[Callable[[], Any]],
        names: list[str],
        groups: list[tuple[int, int]],
        ends: np.ndarray[Any, np.dtype[np.int64]],
        column: str,
    ) -> None:
        self._openers = openers
        self._names = names
        self._groups = groups
        self._ends = ends
        self._column = column
        self._file: tuple[int, Any] = (-1, None)
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = ()
        self._first = 0
        self._end = 0
        # Several threads may read; the open file and the batch are shared state.
        self._lock = threading.Lock()

    def values(self, start: int, stop: int) -> list[Any]:
        """Return the values of samples ``start .. stop - 1`` as a list of Arrays."""
        arrays = []
        with self._lock:
            while start < stop:
                batch = self._batch_of(start)
                array = batch.slice(start - self._first, stop - start)
                arrays.append(array)
                start += len(array)
        return arrays

    def _batch_of(self, sample: int) -> Any:
        """Return the decoded batch that contains a sample."""
        group = int(np.searchsorted(self._ends, sample, side="right"))
        name = self._names[self._groups[group][0]]
        with explain_errors(_KIND, repr(name)):
            if not self._first <= sample < self._end:
                self._begin_group(group)
            while sample >= self._first + len(self._batch):
                self._first += len(self._batch)
                batch = next(self._batches, None)
                if batch is None:
                    raise OSError(
                        f"source must not shrink while it is read, got no sample {sample} in "
                        f"{name!r}"
                    )
                self._batch = self._field(batch)
        return self._batch

    def _begin_group(self, group: int) -> None:
        file_index, row_group = self._groups[group]
        if self._file[0] != file_index:
            self._file = file_index, self._openers[file_index]()
        self._first = int(self._ends[group - 1]) if group else 0
        self._end = int(self._ends[group])
        self._batch = ()
        self._batches = self._file[1].iter_batches(
            BLOCK, row_groups=[row_group], columns=[self._column], use_threads=False
        )

    def _field(self, batch: Any) -> Any:
        values = batch.column(0)
        if batch.schema.names[0] == self._column:
            return values
        import pyarrow.compute as compute

        # The column is a path: `values` is its first part, a struct.
        for field in self._column.split(".")[1:]:
            values = compute.struct_field(values, field)
        return values
