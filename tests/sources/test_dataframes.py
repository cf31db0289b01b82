"""Ids in tables, columns and arrays: chosen columns, missing values, types that are no ids."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, read_patch_ids
from support.id_sources import library, table
from support.strategies import expected_by_patch, samples_by_patch

IDS = [5, 5, 2, 9, 2, 5, 9]


def frames(columns):
    """A table of every library that has tables."""
    pa, pd, pl = library("pyarrow"), library("pandas"), library("polars")
    return {
        "pandas": pd.DataFrame(columns),
        "polars": pl.DataFrame(columns),
        "lazy": pl.LazyFrame(columns),
        "arrow": pa.table(columns),
        "batch": pa.RecordBatch.from_pydict(columns),
        "huggingface": library("datasets").Dataset.from_dict(columns),
    }


FRAMES = ["pandas", "polars", "lazy", "arrow", "batch", "huggingface"]


@pytest.mark.parametrize("kind", FRAMES)
def test_columns_are_chosen(kind):
    single_column = frames({"a": IDS})[kind]
    assert read_patch_ids(single_column).read(0, 7).tolist() == IDS
    several = frames({"a": [0] * 7, "b": IDS})[kind]
    assert read_patch_ids(several, "b").read(0, 7).tolist() == IDS
    with pytest.raises(ValueError, match=r"column must be given for .*, got None; it has 'a', 'b'"):
        read_patch_ids(several)
    with pytest.raises(ValueError, match=r"column must be one of 'a', 'b' of .*, got 'c'"):
        read_patch_ids(several, "c")
    with_patch_id = frames({"a": [0] * 7, "patch_id": IDS})[kind]
    assert read_patch_ids(with_patch_id).read(0, 7).tolist() == IDS
    assert read_patch_ids(with_patch_id, "a").read(0, 7).tolist() == [0] * 7


@pytest.mark.parametrize("kind", FRAMES)
def test_the_sampler_takes_tables(kind):
    sampler = PatchBatchSampler(frames({"patch_id": IDS, "x": [0.5] * 7})[kind], 2)
    assert samples_by_patch(sampler.plan.groups) == expected_by_patch(IDS)


def series(values, dtypes):
    """A column of each library, of the types by name; None leaves a library out."""
    pandas, polars, arrow = dtypes
    pa, pd, pl = library("pyarrow"), library("pandas"), library("polars")
    if pandas is not None:
        yield pd.Series(values, dtype=pandas)
    if polars is not None:
        yield pl.Series(values, dtype=getattr(pl, polars))
    if arrow is not None:
        yield pa.array(values, getattr(pa, arrow)())
        yield pa.chunked_array([pa.array(values, getattr(pa, arrow)())])
        yield pd.Series(pd.array(values, dtype=pd.ArrowDtype(getattr(pa, arrow)())))


@pytest.mark.parametrize(
    ("values", "dtypes", "named"),
    [
        ([1.0, 2.0], ("float64", "Float64", "float64"), "float64|double"),
        ([1.0, 2.0], ("Float32", "Float32", "float32"), "Float32|float32|float"),
        ([True, False], ("bool", "Boolean", "bool_"), "bool|boolean"),
        ([True, False], ("boolean", None, None), "boolean"),
        ([datetime.date(2020, 1, 1)], (None, "Date", "date32"), "date"),
        ([datetime.datetime(2020, 1, 1)], ("datetime64[ns]", "Datetime", None), "datetime"),
        ([datetime.timedelta(1)], ("timedelta64[ns]", "Duration", None), "timedelta|duration"),
        ([b"a"], (None, "Binary", "binary"), "binary"),
        ([decimal.Decimal(1)], (None, "Decimal", None), "decimal"),
        ([1 << 100], (None, "Int128", None), "int128"),
    ],
)
def test_columns_of_other_types_are_refused(values, dtypes, named):
    sources = list(series(values, dtypes))
    assert sources
    for source in sources:
        with pytest.raises(TypeError, match=f"must be integers or strings, got dtype ({named})"):
            read_patch_ids(source)


@pytest.mark.parametrize("value", [2.5, True, {1}, 1j, [1]])
def test_objects_of_other_types_are_named(value):
    pd = library("pandas")
    for values in ([4, value, 7], [value]):
        array = np.empty(len(values), object)
        array[:] = values if value != [1] else [*values[:-2], [1], *values[2:]][: len(values)]
        position = values.index(value)
        for source in (array, pd.Series(array)):
            with pytest.raises(
                TypeError, match=rf"ids must be integers, got .* in sample {position}"
            ):
                np.asarray(read_patch_ids(source))


def columns_with_a_gap(at, words):
    """Columns of 20 samples without a value at one place."""
    pa, pd, pl = library("pyarrow"), library("pandas"), library("polars")
    values = [f"n{i % 3}" if words else i % 3 for i in range(20)]
    values[at] = None
    kind = pa.string() if words else pa.int16()
    arrow = pa.array(values, kind)
    other = pa.DictionaryArray.from_arrays(
        pa.array([1 if v is None else 0 for v in values]),
        pa.array([values[(at + 1) % 20], None], kind),
    )
    result = {
        "object": pd.Series(values, dtype=object),
        "nullable": pd.Series(values, dtype="string" if words else "Int16"),
        "categorical": pd.Series(values).astype("category")
        if words
        else pd.Series(values, dtype="Int16").astype("category"),
        "pandas arrow": pd.Series(values, dtype=pd.ArrowDtype(kind)),
        "polars": pl.Series(values),
        "lazy": pl.LazyFrame({"a": values}),
        "arrow": arrow,
        "chunks": pa.chunked_array([arrow[:7], arrow[7:8], arrow[8:]]),
        "dictionary": arrow.dictionary_encode(),
        "null in the dictionary": other,
        "huggingface": library("datasets").Dataset.from_dict({"a": values}),
        "list": values,
        "objects": np.array(values, dtype=object),
        "masked": np.ma.masked_array(
            ["x" if words else 0 if v is None else v for v in values],
            [v is None for v in values],
        ),
    }
    if words:
        result["polars categorical"] = pl.Series(values, dtype=pl.Categorical)
        result["nan"] = np.array([np.nan if v is None else v for v in values], dtype=object)
        result["str"] = pd.Series(values, dtype="str")
    return result


@pytest.mark.parametrize("words", [False, True], ids=["integers", "names"])
@pytest.mark.parametrize("at", [0, 7, 19])
def test_missing_ids_are_named_by_their_sample(at, words):
    for kind, source in columns_with_a_gap(at, words).items():
        with pytest.raises(ValueError) as caught:
            pytest.fail(f"{kind}: {read_patch_ids(source).read(at // 2, 20)}")
        message = f"ids must have a value for every sample, got none in sample {at}"
        assert (kind, str(caught.value)) == (kind, message)


@pytest.mark.parametrize("at", [7, 19])
def test_missing_integers_are_found_when_they_are_read(at):
    lazy = columns_with_a_gap(at, False)
    # Of objects the first thousand are looked at, to tell what they are.
    for kind in ("nullable", "categorical", "polars", "arrow", "chunks", "dictionary"):
        ids = read_patch_ids(lazy[kind])
        assert ids.read(1, at).tolist() == [i % 3 for i in range(1, at)], kind


def test_floats_of_pandas_say_what_made_them():
    pd = library("pandas")
    with pytest.raises(
        TypeError, match="got dtype float64: values are missing, the first in sample 2"
    ):
        read_patch_ids(pd.Series([1, 2, None, 4, None]))
    with pytest.raises(TypeError, match=r"got dtype float64$"):
        read_patch_ids(pd.Series([1.0, 2.0]))


def test_columns_without_any_value():
    pa, pl = library("pyarrow"), library("polars")
    for source in (pa.nulls(3), pl.Series([None, None]), [None, 3]):
        with pytest.raises(ValueError, match="got none in sample 0"):
            read_patch_ids(source)


@pytest.mark.parametrize("kind", FRAMES)
def test_empty_tables(kind):
    pa = library("pyarrow")
    empty = pa.table({"a": pa.array([], pa.int64())})
    source = {
        "pandas": empty.to_pandas,
        "polars": lambda: library("polars").from_arrow(empty),
        "lazy": lambda: library("polars").from_arrow(empty).lazy(),
        "arrow": lambda: empty,
        "batch": lambda: pa.RecordBatch.from_pydict({"a": pa.array([], pa.int64())}),
        "huggingface": lambda: library("datasets").Dataset(empty),
    }[kind]()
    with pytest.raises(ValueError, match="ids must name at least one sample, got none"):
        read_patch_ids(source)


def test_columns_that_are_there_twice():
    pd, pa = library("pandas"), library("pyarrow")
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    arrow = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    for source in (twice, arrow):
        with pytest.raises(
            ValueError, match=r"has more than one column named 'a'; rename the duplicates"
        ):
            read_patch_ids(source, "a")


def test_columns_take_no_column():
    pa, pd, pl = library("pyarrow"), library("pandas"), library("polars")
    hugging = library("datasets").Dataset(table([1]))["patch_id"]
    for source in (pa.array([1]), pd.Series([1]), pd.Index([1]), pl.Series([1]), hugging, range(3)):
        with pytest.raises(ValueError, match=r"column must be None for .* no columns, got 'a'"):
            read_patch_ids(source, "a")


def test_a_lazy_frame_computes_only_the_column():
    pl = library("polars")

    def touched(values):
        raise AssertionError("another column was computed")

    lazy = pl.LazyFrame({"a": IDS}).with_columns(
        pl.col("a").map_batches(touched, return_dtype=pl.Int64).alias("x")
    )
    assert read_patch_ids(lazy, "a").read(0, 7).tolist() == IDS


def test_integers_are_not_copied():
    pd, pa, torch = library("pandas"), library("pyarrow"), library("torch")
    array = np.arange(1000)
    arrow = pa.array(array)
    for source, where in (
        (array, array),
        (pd.Series(array, copy=False), array),
        (torch.from_numpy(array), array),
        (arrow, arrow.to_numpy()),
    ):
        part = read_patch_ids(source).read(10, 20)
        assert part.__array_interface__["data"][0] == where.ctypes.data + 80


def test_arrays_keep_their_device(library):
    ids = read_patch_ids(library.array(np.array(IDS)))
    assert str(ids.device) == library.device
    assert ids.array.shape == (7,)
    assert ids.read(2, 5).tolist() == IDS[2:5]
    assert isinstance(ids.read(2, 5), np.ndarray)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (np.zeros((2, 2), int), ValueError, r"must be 1-D, one id per sample, got shape \(2, 2\)"),
        (np.array(3), ValueError, "must be 1-D"),
        (np.array([["a"]]), ValueError, "must be 1-D"),
        (np.zeros(0, "U1"), ValueError, "must name at least one sample"),
        ([], ValueError, "must name at least one sample"),
        ([1 << 64, 1], ValueError, f"must fit in int64, got {1 << 64} in sample 0"),
        ([1, -(1 << 64)], ValueError, f"must fit in int64, got -{1 << 64} in sample 1"),
        ([1, "a"], TypeError, "all strings or all integers, got 'a' in sample 1"),
        (["a", 1], TypeError, "all strings or all integers, got 1 in sample 1"),
        (np.zeros(3, "M8[s]"), TypeError, r"got dtype datetime64\[s\]"),
        (
            np.zeros(3, [("a", int), ("b", int)]),
            ValueError,
            "column must be given for a structured",
        ),
        (np.ma.masked_array([1, 2, 3], [0, 0, 1]), ValueError, "got none in sample 2"),
        ([b"a", b"\xff"], ValueError, r"ids must be UTF-8, got b'\\xff' in sample 1"),
        (7, TypeError, "source must be a dataset, an array"),
        (type("Rows", (), {"patch_ids": [1]})(), TypeError, "got Rows without __getitem__"),
        (None, TypeError, "source must be a dataset, an array"),
        ({1: 2}, TypeError, "source must be a dataset, an array"),
    ],
)
def test_arrays_and_lists_that_hold_no_ids(source, error, match):
    with pytest.raises(error, match=match):
        np.asarray(read_patch_ids(source))


@pytest.mark.parametrize("progress", [None, 1, "no"])
def test_progress_is_a_bool(progress):
    with pytest.raises(TypeError, match=f"progress must be a bool, got {progress!r}"):
        read_patch_ids([1, 2], progress=progress)


def test_a_masked_array_without_a_gap():
    assert read_patch_ids(np.ma.masked_array([3, 1], [0, 0])).read(0, 2).tolist() == [3, 1]


# HuggingFace


def test_orders_and_shards_of_huggingface_are_respected():
    datasets = library("datasets")
    plain = np.random.default_rng(0).integers(0, 9, 500)
    dataset = datasets.Dataset.from_dict({"patch_id": plain, "at": np.arange(500)})
    for part in (
        dataset.shuffle(seed=3),
        dataset.select(range(5, 100, 7)),
        dataset.shuffle(seed=1).select(range(10, 90)),
        dataset.filter(lambda row: row["at"] % 3 == 1),
        dataset.shard(4, 2, contiguous=False),
        dataset.train_test_split(0.3, seed=0)["test"],
        datasets.concatenate_datasets([dataset.shuffle(seed=2), dataset]),
        dataset.with_format("torch"),
    ):
        order = np.asarray(part.with_format("numpy")["at"][:])
        ids = read_patch_ids(part)
        assert ids.seekable
        np.testing.assert_array_equal(np.asarray(ids), plain[order])


def test_no_other_column_of_huggingface_is_formatted():
    datasets = library("datasets")

    def never(batch):
        raise AssertionError("a row was formatted")

    dataset = datasets.Dataset.from_dict({"patch_id": IDS, "x": [0.5] * 7}).with_transform(never)
    assert read_patch_ids(dataset).read(0, 7).tolist() == IDS


def test_class_labels_of_huggingface_stay_integers():
    datasets = library("datasets")
    features = datasets.Features({"patch_id": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"patch_id": [1, 0, 1]}, features=features)
    ids = read_patch_ids(dataset)
    assert ids.names is None
    assert ids.read(0, 3).tolist() == [1, 0, 1]


def test_what_huggingface_has_beside_a_dataset():
    datasets = library("datasets")
    dataset = datasets.Dataset(table([1, 2]))
    splits = datasets.DatasetDict(train=dataset, test=dataset)
    with pytest.raises(TypeError, match=r"must be one split, got a DatasetDict of 'train', 'test'"):
        read_patch_ids(splits)
    with pytest.raises(TypeError, match=r"\(a map-style dataset\), got an IterableDataset"):
        read_patch_ids(dataset.to_iterable_dataset())


# Datasets


class Known:
    def __init__(self, ids):
        self.patch_ids = ids

    def __len__(self):
        return 7

    def __getitem__(self, i):
        raise AssertionError(f"sample {i} was touched")


def test_datasets_give_ids_of_every_kind(tmp_path):
    pd, pl, pa = library("pandas"), library("polars"), library("pyarrow")
    np.save(tmp_path / "ids.npy", IDS)
    kinds = (
        pd.Series(IDS),
        pl.Series(IDS),
        pa.array(IDS),
        tmp_path / "ids.npy",
        range(7),
        pd.DataFrame({"patch_id": IDS}),
    )
    for ids in kinds:
        expected = np.arange(7) if isinstance(ids, range) else IDS
        assert np.asarray(read_patch_ids(Known(ids))).tolist() == list(expected)
    with pytest.raises(ValueError, match=r"Known has 7 samples, got ids of shape \(6,\)"):
        read_patch_ids(Known(pd.Series(IDS[1:])))
    np.save(tmp_path / "ids.npy", IDS[1:])
    with pytest.raises(ValueError, match=r"Known has 7 samples, got ids of shape \(6,\)"):
        read_patch_ids(Known(tmp_path / "ids.npy"))
    with pytest.raises(TypeError, match=r"ids of Known must be an array, a list .* got dict"):
        read_patch_ids(Known({}))


def test_parts_of_datasets_with_ids_in_files(tmp_path):
    data = pytest.importorskip("torch.utils.data")
    np.save(tmp_path / "ids.npy", IDS)
    dataset = Known(tmp_path / "ids.npy")
    assert np.asarray(read_patch_ids(data.Subset(dataset, [6, 0, 2]))).tolist() == [9, 5, 2]
    concatenated = data.ConcatDataset([dataset, Known(np.array(IDS, np.int8))])
    assert np.asarray(read_patch_ids(concatenated)).tolist() == [*IDS, *IDS]


def test_a_dataset_takes_no_column():
    with pytest.raises(ValueError, match=r"column must be None for a Known, .* got 'x'"):
        read_patch_ids(Known(IDS), "x")
