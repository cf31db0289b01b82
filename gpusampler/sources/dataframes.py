"""Ids in columns of pandas, polars and HuggingFace datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import devices
from gpusampler.core.text import shown
from gpusampler.sources.arrow import arrow_ids, dtype_of, values_ids
from gpusampler.sources.base import PatchIds
from gpusampler.sources.column_checks import (
    check_all_there,
    checked_shape,
    chosen_column,
    is_a,
    no_column,
    wrong_type,
)
from gpusampler.sources.column_reader import ColumnIds
from gpusampler.sources.in_memory import ArrayIds, listed_ids
from gpusampler.sources.strings import Factored, NamedIds

_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def table_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in a column of pandas, polars or HuggingFace; None for anything else.

    Raises
    ------
    TypeError, ValueError
        If they are neither integers nor names, or none; if a column is due, or is none.
    """
    for kind in (_pandas, _polars, _huggingface):
        ids = kind(source, column, progress)
        if ids is not None:
            return ids
    return None


def _pandas(source: Any, column: Any, progress: bool) -> PatchIds | None:
    if is_a(source, "pandas", "DataFrame"):
        series = source[chosen_column(list(source.columns), column, "a DataFrame")]
    elif is_a(source, "pandas", "Series", "Index"):
        no_column(column, f"a {type(source).__name__}")
        pandas: Any = devices.loaded("pandas")
        series = pandas.Series(source, copy=False) if is_a(source, "pandas", "Index") else source
    else:
        return None
    size = checked_shape(series.shape)
    dtype = series.dtype
    # Of Arrow, whatever it holds; a string column kept by Arrow is none of these.
    if is_a(dtype, "pandas", "ArrowDtype"):
        return arrow_ids(series.array.__arrow_array__(), None, progress)
    if is_a(dtype, "pandas", "CategoricalDtype"):
        return _categories(series, dtype.categories, size, progress)
    if is_a(dtype, "pandas", "StringDtype"):
        return NamedIds(lambda a, b: _factorized(series.iloc[a:b], a), size, progress=progress)
    if str(dtype) == "object":
        return listed_ids(lambda a, b: series.iloc[a:b].tolist(), size, "ids", progress)
    # NumPy's in any byte order; pandas' own have names such as Int64.
    name = dtype.name.lower()
    if name in _INTEGERS and isinstance(dtype, np.dtype):
        return ArrayIds(series.to_numpy())
    if name in _INTEGERS:

        def load(start: int, stop: int) -> NDArray[Any]:
            part = series.iloc[start:stop]
            check_all_there(part.isna().to_numpy(), start)
            values: NDArray[Any] = part.to_numpy(dtype=name)
            return values

        return ColumnIds(load, size, name)
    gone = series.isna().to_numpy() if name.startswith("float") else np.zeros(1, np.bool_)
    # pandas makes floats of integers when one is missing.
    raise wrong_type(
        dtype,
        f": values are missing, the first in sample {int(gone.argmax())}" if gone.any() else "",
    )


def _categories(series: Any, categories: Any, size: int, progress: bool) -> PatchIds:
    def codes(start: int, stop: int) -> NDArray[Any]:
        found: NDArray[Any] = series.iloc[start:stop].cat.codes.to_numpy()
        check_all_there(found < 0, start)
        return found

    # Categories of strings are of type object, or of a type of pandas' own.
    if categories.dtype.kind in "iu":
        values = np.asarray(categories.to_numpy(dtype=str(categories.dtype).lower()))
        return ColumnIds(lambda a, b: values[codes(a, b)], size, values.dtype.name)
    labels = categories.tolist()
    for label in labels:
        if not isinstance(label, str):
            raise wrong_type(f"category of {categories.dtype}", f", such as {shown(label)}")
    return NamedIds(lambda a, b: (codes(a, b), labels), size, progress=progress)


def _factorized(series: Any, first: int) -> Factored:
    codes, labels = series.factorize()
    check_all_there(codes < 0, first)
    return codes, labels.tolist()


def _polars(source: Any, column: Any, progress: bool) -> PatchIds | None:
    what = f"a {type(source).__name__}"
    if is_a(source, "polars", "LazyFrame"):
        column = chosen_column(source.collect_schema().names(), column, what)
        series = source.select(column).collect().to_series()
    elif is_a(source, "polars", "DataFrame"):
        series = source.get_column(chosen_column(source.columns, column, what))
    elif is_a(source, "polars", "Series"):
        no_column(column, what)
        series = source
    else:
        return None
    polars: Any = devices.loaded("polars")
    size = checked_shape(series.shape)

    def part(start: int, stop: int) -> Any:
        found = series.slice(start, stop - start)
        if found.null_count():
            check_all_there(found.is_null().to_numpy(), start)
        return found

    def factored(start: int, stop: int) -> Factored:
        strings = part(start, stop).cast(polars.String)
        labels = strings.unique()
        return strings.cast(polars.Enum(labels)).to_physical().to_numpy(), labels.to_list()

    name = str(series.dtype).lower()
    if series.dtype in (polars.String, polars.Categorical, polars.Enum):
        return NamedIds(factored, size, progress=progress)
    if name == "null":
        check_all_there(np.ones(1, np.bool_), 0)
    if name not in _INTEGERS:
        raise wrong_type(name)
    return ColumnIds(lambda a, b: part(a, b).to_numpy(), size, name)


def _huggingface(source: Any, column: Any, progress: bool) -> PatchIds | None:
    name = type(source).__name__
    if is_a(source, "datasets.dataset_dict", "DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, source))
        raise TypeError(
            f"source must be one split, got a {name} of {splits}; pass one of them: dataset[split]"
        )
    if is_a(source, "datasets.iterable_dataset", "IterableDataset"):
        raise TypeError(
            "source must have a length (a map-style dataset), got an IterableDataset of "
            "HuggingFace; load it without streaming=True"
        )
    if is_a(source, "datasets.arrow_dataset", "Column"):
        no_column(column, "a column of a HuggingFace dataset")
        return _huggingface(source.source, source.column_name, progress)
    if not is_a(source, "datasets.arrow_dataset", "Dataset"):
        return None
    column = chosen_column(source.column_names, column, "a HuggingFace dataset")
    values = source.data.column(column)
    # Rows of the table in the order that select, shuffle and the like have given them.
    rows = None if source._indices is None else source._indices.column(0)

    def read(start: int, stop: int) -> Any:
        if rows is None:
            return values.slice(start, stop - start)
        return values.take(rows.slice(start, stop - start))

    return values_ids(
        read, dtype_of(values.type, f" in column {column!r}"), len(source), progress=progress
    )
