"""Patch ids in columns of pandas, polars and HuggingFace datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import devices
from gpusampler.core.log import warn
from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_id_shape
from gpusampler.sources.arrow import arrow_ids, arrow_values_ids, id_dtype
from gpusampler.sources.base import IntegerIds, PatchIds
from gpusampler.sources.checks import (
    check_no_column,
    check_no_missing,
    check_no_plain_enum,
    choose_column,
    is_instance,
    is_key,
    list_names,
    wrong_dtype_error,
)
from gpusampler.sources.in_memory import ArrayIds, object_ids
from gpusampler.sources.strings import Factorized, NamedIds

_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def dataframe_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in a column of pandas, polars or HuggingFace; None for anything else."""
    if is_instance(source, "xarray", "Dataset"):
        raise TypeError(
            f"source must be one variable, got an xarray Dataset of {list_names(list(source))}: "
            "pass the variable, such as ds['patch_id']"
        )
    for reader in (_pandas_ids, _polars_ids, _huggingface_ids):
        ids = reader(source, column, progress)
        if ids is not None:
            return ids
    return None


def _pandas_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    if is_instance(source, "pandas", "MultiIndex"):
        levels = list(source.names)
        raise TypeError(
            f"source must have one id per row, got a MultiIndex of levels {levels}: pass "
            f"frame.groupby(level={list(range(len(levels)))}).ngroup(), or index.to_flat_index() "
            "to have tuples as ids"
        )
    if is_instance(source, "pandas", "DataFrame"):
        series = source[choose_column(list(source.columns), column, "a pandas DataFrame")]
    elif is_instance(source, "pandas", "Series", "Index"):
        check_no_column(column, f"a {type(source).__name__}")
        series = source
        if is_instance(source, "pandas", "Index"):
            pandas: Any = devices.loaded_module("pandas")
            series = pandas.Series(source, copy=False)
    else:
        return None
    size = check_id_shape(series.shape)
    dtype = series.dtype
    # A StringDtype column stored in Arrow does not have an ArrowDtype.
    if is_instance(dtype, "pandas", "ArrowDtype"):
        return arrow_ids(series.array.__arrow_array__(), None, progress)
    if is_instance(dtype, "pandas", "CategoricalDtype"):
        return _category_ids(series, dtype.categories, size, progress)
    if is_instance(dtype, "pandas", "StringDtype"):
        return NamedIds(lambda a, b: _factorize(series.iloc[a:b], a), size, progress=progress)
    if str(dtype) == "object" or is_instance(dtype, "pandas", "IntervalDtype", "PeriodDtype"):
        return object_ids(lambda a, b: series.iloc[a:b].tolist(), size, "ids", progress)
    # NumPy dtypes have any byte order; pandas' extension dtypes have names such as "Int64".
    name = dtype.name.lower()
    if name in _INTEGERS and isinstance(dtype, np.dtype):
        if name in ("int8", "int16") and int(series.min()) == -1:
            warn(
                f"the smallest patch id in an {name} column is -1, in {int((series == -1).sum())} "
                "samples: -1 means a missing value in the codes of pandas. If these are codes, "
                "drop the samples, or pass the categorical column itself to get an error instead."
            )
        return ArrayIds(series.to_numpy())
    if name in _INTEGERS:

        def load(start: int, stop: int) -> NDArray[Any]:
            rows = series.iloc[start:stop]
            check_no_missing(rows.isna().to_numpy(), start)
            values: NDArray[Any] = rows.to_numpy(dtype=name)
            return values

        return IntegerIds(load, size, name)
    missing = series.isna().to_numpy() if name.startswith("float") else np.zeros(1, np.bool_)
    detail = ""
    if missing.any():
        # pandas stores integers with a missing value as floats.
        detail = f": values are missing, the first in sample {int(missing.argmax())}"
    raise wrong_dtype_error(dtype, detail)


def _category_ids(series: Any, categories: Any, size: int, progress: bool) -> PatchIds:
    def codes(start: int, stop: int) -> NDArray[Any]:
        result: NDArray[Any] = series.iloc[start:stop].cat.codes.to_numpy()
        check_no_missing(result < 0, start)
        return result

    # Categories of strings have dtype object or a pandas extension dtype.
    if categories.dtype.kind in "iu":
        values = np.asarray(categories.to_numpy(dtype=str(categories.dtype).lower()))
        return IntegerIds(lambda a, b: values[codes(a, b)], size, values.dtype.name)
    labels = categories.tolist()
    for label in labels:
        check_no_plain_enum(label, "ids")
        if not is_key(label):
            raise wrong_dtype_error(
                f"category of {categories.dtype}",
                f", such as {short_repr(label)}: pass the column's .cat.codes (-1 if missing)",
            )
    return NamedIds(lambda a, b: (codes(a, b), labels), size, progress=progress)


def _factorize(series: Any, first: int) -> Factorized:
    codes, labels = series.factorize()
    check_no_missing(codes < 0, first)
    return codes, labels.tolist()


def _polars_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    label = f"a {type(source).__name__}"
    if is_instance(source, "polars", "LazyFrame"):
        column = choose_column(source.collect_schema().names(), column, label)
        series = source.select(column).collect().to_series()
    elif is_instance(source, "polars", "DataFrame"):
        series = source.get_column(choose_column(source.columns, column, label))
    elif is_instance(source, "polars", "Series"):
        check_no_column(column, label)
        series = source
    else:
        return None
    polars: Any = devices.loaded_module("polars")
    size = check_id_shape(series.shape)

    def load(start: int, stop: int) -> Any:
        rows = series.slice(start, stop - start)
        if rows.null_count():
            check_no_missing(rows.is_null().to_numpy(), start)
        return rows

    def factorize(start: int, stop: int) -> Factorized:
        strings = load(start, stop).cast(polars.String)
        labels = strings.unique()
        return strings.cast(polars.Enum(labels)).to_physical().to_numpy(), labels.to_list()

    name = str(series.dtype).lower()
    if series.dtype in (polars.String, polars.Categorical, polars.Enum):
        return NamedIds(factorize, size, progress=progress)
    if name == "null":
        check_no_missing(np.ones(1, np.bool_), 0)
    if name not in _INTEGERS:
        raise wrong_dtype_error(name)
    return IntegerIds(lambda a, b: load(a, b).to_numpy(), size, name)


def _huggingface_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    name = type(source).__name__
    if is_instance(source, "datasets.dataset_dict", "DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, source))
        raise TypeError(
            f"source must be one split, got a {name} of {splits}; pass one of them: dataset[split]"
        )
    if is_instance(source, "datasets.iterable_dataset", "IterableDataset"):
        raise TypeError(
            "source must have a length (a map-style dataset), got an IterableDataset of "
            "HuggingFace; load it without streaming=True"
        )
    if is_instance(source, "datasets.arrow_dataset", "Column"):
        check_no_column(column, "a column of a HuggingFace dataset")
        return _huggingface_ids(source.source, source.column_name, progress)
    if not is_instance(source, "datasets.arrow_dataset", "Dataset"):
        return None
    column = choose_column(source.column_names, column, "a HuggingFace dataset")
    values = source.data.column(column)
    # select, shuffle and similar methods reorder rows through these indices.
    rows = None if source._indices is None else source._indices.column(0)

    def read(start: int, stop: int) -> Any:
        if rows is None:
            return values.slice(start, stop - start)
        return values.take(rows.slice(start, stop - start))

    return arrow_values_ids(
        read, id_dtype(values.type, f" in column {column!r}"), len(source), progress=progress
    )
