"""Ids in columns of Arrow: pyarrow's own, and what others keep in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import devices
from gpusampler.sources.base import PatchIds
from gpusampler.sources.column_checks import (
    check_all_there,
    checked_shape,
    chosen_column,
    fitting,
    is_a,
    missing,
    no_column,
    wrong_type,
)
from gpusampler.sources.column_reader import ColumnIds
from gpusampler.sources.strings import Factored, NamedIds

_NONE = np.empty(0, np.int64)


def arrow_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in a pyarrow array or table; None for anything else.

    Raises
    ------
    TypeError, ValueError
        If they are neither integers nor names, or none; if a column is due, or is none.
    """
    if is_a(source, "pyarrow", "Table", "RecordBatch"):
        what = f"a {type(source).__name__}"
        source = source.column(chosen_column(source.schema.names, column, what))
    elif is_a(source, "pyarrow", "Array", "ChunkedArray"):
        no_column(column, f"a {type(source).__name__}")
    else:
        return None
    return values_ids(
        lambda start, stop: source.slice(start, stop - start),
        dtype_of(source.type),
        len(source),
        progress=progress,
    )


def values_ids(
    values: Callable[[int, int], Any],
    dtype: str,
    size: int,
    *,
    modified: int | None = None,
    seekable: bool = True,
    progress: bool = False,
) -> PatchIds:
    """Return the ids that a function gives as Arrow arrays.

    Parameters
    ----------
    values : callable
        ``values(start, stop)``: an Array, a ChunkedArray or a list of Arrays, of length
        stop - start.
    dtype : str
        By `dtype_of`.
    size : int
    modified, seekable, progress
        As in `NamedIds`.
    """
    checked_shape((size,))
    if dtype == "str":
        return NamedIds(
            lambda start, stop: _factored(values(start, stop), start),
            size,
            modified=modified,
            seekable=seekable,
            progress=progress,
        )
    return ColumnIds(
        lambda start, stop: _integers(values(start, stop), start),
        size,
        dtype,
        modified=modified,
        seekable=seekable,
    )


def dtype_of(kind: Any, where: str = "") -> str:
    """Return "str", or the integers' dtype, of an Arrow type that ids may have.

    Raises
    ------
    TypeError
        If ids may not have it.
    ValueError
        If it is the type of a column without values.
    """
    types: Any = devices.loaded("pyarrow.types")
    value = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_null(value):
        missing(0)
    if types.is_integer(value):
        return str(value)
    strings = ("is_string", "is_large_string", "is_string_view")
    # The last is younger than the oldest pyarrow that is supported.
    if any(getattr(types, name, lambda _: False)(value) for name in strings):
        return "str"
    raise wrong_type(kind, where)


def _chunks(values: Any, first: int) -> Iterator[tuple[int, Any]]:
    """Yield (first sample, Array) of what holds several, each without a null."""
    chunks = values if isinstance(values, list) else getattr(values, "chunks", [values])
    for chunk in chunks:
        _check_no_null(chunk, first)
        yield first, chunk
        first += len(chunk)


def _check_no_null(chunk: Any, first: int) -> None:
    if chunk.null_count:
        check_all_there(chunk.is_null().to_numpy(zero_copy_only=False), first)


def _integers(values: Any, first: int) -> NDArray[Any]:
    types: Any = devices.loaded("pyarrow.types")
    parts: list[NDArray[Any]] = []
    for begin, chunk in _chunks(values, first):
        if types.is_dictionary(chunk.type):
            chunk = chunk.cast(chunk.type.value_type)
            # A place in the dictionary may be that of a null.
            _check_no_null(chunk, begin)
        parts.append(fitting(chunk.to_numpy(zero_copy_only=False), begin))
    if len(parts) == 1:
        return parts[0]
    # NumPy makes floats of uint64 beside int64; they fit, as was checked.
    mixed = parts and np.result_type(*parts).kind not in "iu"
    return np.concatenate([p.astype(np.int64) for p in parts] if mixed else parts or [_NONE])


def _factored(values: Any, first: int) -> Factored:
    types: Any = devices.loaded("pyarrow.types")
    if hasattr(values, "combine_chunks") and not types.is_dictionary(values.type):
        values = values.combine_chunks()
    parts: list[NDArray[Any]] = [_NONE]
    labels: list[str] = []
    last, offset = None, 0
    for begin, chunk in _chunks(values, first):
        if not types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_encode()
        elif chunk.dictionary.null_count:
            plain = chunk.cast(chunk.type.value_type)
            _check_no_null(plain, begin)
            chunk = plain.dictionary_encode()
        if last is None or not chunk.dictionary.equals(last):
            last, offset = chunk.dictionary, len(labels)
            labels.extend(last.to_pylist())
        parts.append(chunk.indices.to_numpy().astype(np.int64) + offset)
    return np.concatenate(parts), labels
