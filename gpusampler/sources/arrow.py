"""Patch ids in Arrow arrays, from pyarrow or from libraries that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import devices
from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_id_shape
from gpusampler.sources.base import IntegerIds, PatchIds
from gpusampler.sources.checks import (
    check_fits_int64,
    check_no_column,
    check_no_missing,
    choose_column,
    is_instance,
    raise_missing,
    wrong_dtype_error,
)
from gpusampler.sources.strings import Factorized, NamedIds

_NO_IDS = np.empty(0, np.int64)


def arrow_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in a pyarrow array or table; None for anything else."""
    if is_instance(source, "pyarrow", "Table", "RecordBatch"):
        label = f"a {type(source).__name__}"
        source = source.column(choose_column(source.schema.names, column, label))
    elif is_instance(source, "pyarrow", "Array", "ChunkedArray"):
        check_no_column(column, f"a {type(source).__name__}")
    else:
        return None
    return arrow_values_ids(
        lambda start, stop: source.slice(start, stop - start),
        id_dtype(source.type),
        len(source),
        progress=progress,
    )


def arrow_values_ids(
    values: Callable[[int, int], Any],
    dtype: str,
    size: int,
    *,
    modified: int | None = None,
    seekable: bool = True,
    progress: bool = False,
) -> PatchIds:
    """Return the ids that ``values(start, stop)`` returns as Arrow arrays."""
    check_id_shape((size,))
    if dtype == "str":
        return NamedIds(
            lambda start, stop: _factorize(values(start, stop), start),
            size,
            modified=modified,
            seekable=seekable,
            progress=progress,
        )
    return IntegerIds(
        lambda start, stop: _to_integers(values(start, stop), start),
        size,
        dtype,
        modified=modified,
        seekable=seekable,
    )


def id_dtype(arrow_type: Any, location: str = "") -> str:
    """Return "str" or the integer dtype of an Arrow type, or raise if ids cannot have it."""
    types: Any = devices.loaded_module("pyarrow.types")
    value_type = arrow_type.value_type if types.is_dictionary(arrow_type) else arrow_type
    if types.is_null(value_type):
        raise_missing(0)
    if types.is_integer(value_type):
        return str(value_type)
    string_checks = ("is_string", "is_large_string", "is_string_view")
    # Old supported versions of pyarrow lack is_string_view.
    if any(getattr(types, name, lambda _: False)(value_type) for name in string_checks):
        return "str"
    raise wrong_dtype_error(arrow_type, location)


def _chunks(values: Any, first: int) -> Iterator[tuple[int, Any]]:
    """Yield (first sample, chunk) of a list, ChunkedArray or Array; raise for a null."""
    chunks = values if isinstance(values, list) else getattr(values, "chunks", [values])
    for chunk in chunks:
        _check_no_null(chunk, first)
        yield first, chunk
        first += len(chunk)


def _check_no_null(chunk: Any, first: int) -> None:
    if chunk.null_count:
        check_no_missing(chunk.is_null().to_numpy(zero_copy_only=False), first)


def _to_integers(values: Any, first: int) -> NDArray[Any]:
    types: Any = devices.loaded_module("pyarrow.types")
    pieces: list[NDArray[Any]] = []
    for start, chunk in _chunks(values, first):
        if types.is_dictionary(chunk.type):
            chunk = chunk.cast(chunk.type.value_type)
            # The dictionary itself may contain a null.
            _check_no_null(chunk, start)
        pieces.append(check_fits_int64(chunk.to_numpy(zero_copy_only=False), start))
    if len(pieces) == 1:
        return pieces[0]
    # NumPy would promote uint64 and int64 to float64; all values were checked to fit in int64.
    mixed = pieces and np.result_type(*pieces).kind not in "iu"
    return np.concatenate([p.astype(np.int64) for p in pieces] if mixed else pieces or [_NO_IDS])


def _factorize(values: Any, first: int) -> Factorized:
    types: Any = devices.loaded_module("pyarrow.types")
    if hasattr(values, "combine_chunks") and not types.is_dictionary(values.type):
        values = values.combine_chunks()
    pieces: list[NDArray[Any]] = [_NO_IDS]
    labels: list[str] = []
    dictionary, offset = None, 0
    for start, chunk in _chunks(values, first):
        if not types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_encode()
        elif chunk.dictionary.null_count:
            decoded = chunk.cast(chunk.type.value_type)
            _check_no_null(decoded, start)
            chunk = decoded.dictionary_encode()
        if dictionary is None or not chunk.dictionary.equals(dictionary):
            dictionary, offset = chunk.dictionary, len(labels)
            try:
                labels.extend(dictionary.to_pylist())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"ids must be UTF-8, got {short_repr(error.object)} in a sample from sample "
                    f"{start} on"
                ) from None
        pieces.append(chunk.indices.to_numpy().astype(np.int64) + offset)
    return np.concatenate(pieces), labels
