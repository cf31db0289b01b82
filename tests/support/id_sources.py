"""The same ids in every kind of source that `read_patch_ids` knows, in small pieces."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

ROWS = 12
"""Rows of a row group, samples of a chunk."""


def library(name):
    return pytest.importorskip(name)


def as_list(values):
    return np.asarray(values).tolist()


def npy(values, folder):
    path = folder / "ids.npy"
    np.save(path, np.asarray(values))
    return path


def memory_map(values, folder):
    return np.load(npy(values, folder), mmap_mode="r")


def table(values):
    pa = library("pyarrow")
    other = [float(i) for i in range(len(values))]
    return pa.table({"x": other, "patch_id": pa.array(as_list(values), arrow_type(values))})


def arrow_type(values):
    pa = library("pyarrow")
    dtype = np.asarray(values).dtype
    return pa.string() if dtype.kind == "U" else pa.from_numpy_dtype(dtype.newbyteorder("="))


def parquet(values, folder):
    path = folder / "ids.parquet"
    library("pyarrow.parquet").write_table(table(values), path, row_group_size=ROWS)
    return path


def parquet_folder(values, folder):
    """Files of uneven size, in an order that is by path and not by number, one of no rows."""
    pq = library("pyarrow.parquet")
    folder = folder / "parts"
    (folder / "b").mkdir(parents=True)
    full_table = table(values)
    cuts = [0, 5, 5, 41, len(values)]
    names = ["a10.parquet", "a11.parquet", "a2.pq", "b/a.parquet"]
    for name, (start, stop) in zip(names, pairwise(cuts), strict=True):
        pq.write_table(full_table.slice(start, stop - start), folder / name, row_group_size=ROWS)
    (folder / "_metadata.parquet").write_text("no data")
    (folder / "a10.crc").write_text("no data")
    return folder


def parquet_file(values, folder):
    return library("pyarrow.parquet").ParquetFile(parquet(values, folder))


def parquet_dataset(values, folder):
    library("pyarrow.dataset")
    import pyarrow.dataset as ds

    return ds.dataset(parquet(values, folder))


def zarr_array(values, folder):
    zarr = library("zarr")
    values = np.asarray(values)
    array = zarr.create_array(
        folder / "ids.zarr",
        shape=values.shape,
        chunks=(ROWS,),
        dtype="str" if values.dtype.kind == "U" else values.dtype,
    )
    array[:] = values
    return array


def zarr_folder(values, folder):
    zarr_array(values, folder)
    return folder / "ids.zarr"


def zarr_group(values, folder):
    zarr = library("zarr")
    values = np.asarray(values)
    group = zarr.open_group(folder / "group", mode="w")
    group.create_array("x", shape=(3,), dtype="float32")
    array = group.create_array(
        "patch_id",
        shape=values.shape,
        chunks=(ROWS,),
        dtype="str" if values.dtype.kind == "U" else values.dtype,
    )
    array[:] = values
    return group


def zarr_group_folder(values, folder):
    zarr_group(values, folder)
    return folder / "group"


def hdf5(values, folder, chunks=(ROWS,)):
    h5py = library("h5py")
    values = np.asarray(values)
    dtype = h5py.string_dtype() if values.dtype.kind == "U" else values.dtype
    with h5py.File(folder / "ids.h5", "w") as file:
        file.create_dataset("x", data=np.zeros(3))
        file.create_dataset(
            "patch_id",
            data=values.astype(object) if values.dtype.kind == "U" else values,
            dtype=dtype,
            chunks=chunks,
        )
    return folder / "ids.h5"


def hdf5_contiguous(values, folder):
    return hdf5(values, folder, None)


def hdf5_dataset(values, folder):
    h5py = library("h5py")
    return h5py.File(hdf5(values, folder), "r")["patch_id"]


def hdf5_group(values, folder):
    h5py = library("h5py")
    return h5py.File(hdf5(values, folder), "r")


FILES = {
    f.__name__: f
    for f in (
        npy,
        memory_map,
        parquet,
        parquet_folder,
        parquet_file,
        parquet_dataset,
        zarr_array,
        zarr_folder,
        zarr_group,
        zarr_group_folder,
        hdf5,
        hdf5_contiguous,
        hdf5_dataset,
        hdf5_group,
    )
}


def pandas_series(values, folder):
    series = library("pandas").Series(np.asarray(values))
    # Rows that were shuffled keep their labels: a place is not a label.
    series.index = series.index[::-1]
    return series


def pandas_index(values, folder):
    return library("pandas").Index(np.asarray(values))


def pandas_frame(values, folder):
    return library("pandas").DataFrame({"x": 0.5, "patch_id": np.asarray(values)})


def pandas_nullable(values, folder):
    pd = library("pandas")
    dtype = np.asarray(values).dtype
    name = "string" if dtype.kind == "U" else dtype.name.replace("i", "I").replace("u", "U")
    return pd.Series(as_list(values), dtype=name)


def pandas_categorical(values, folder):
    pd = library("pandas")
    kinds = sorted(set(as_list(values)), reverse=True)
    unused = "zzz" if isinstance(kinds[0], str) else 99
    if not isinstance(unused, str):
        kinds = np.array([*kinds, unused], np.asarray(values).dtype.newbyteorder("="))
    else:
        kinds = [*kinds, unused]
    return pd.Series(pd.Categorical(as_list(values), categories=kinds))


def pandas_object(values, folder):
    return library("pandas").Series(as_list(values), dtype=object)


def pandas_arrow(values, folder):
    pd = library("pandas")
    return pd.Series(as_list(values), dtype=pd.ArrowDtype(arrow_type(values)))


def polars_series(values, folder):
    pl = library("polars")
    return pl.Series("ids", np.asarray(values).astype(np.asarray(values).dtype.newbyteorder("=")))


def polars_chunks(values, folder):
    series = polars_series(values, folder)
    return series[:30].append(series[30:])


def polars_frame(values, folder):
    pl = library("polars")
    return pl.DataFrame({"x": np.zeros(len(values)), "patch_id": polars_series(values, folder)})


def polars_lazy(values, folder):
    return polars_frame(values, folder).lazy()


def arrow_array(values, folder):
    return library("pyarrow").array(as_list(values), arrow_type(values))


def arrow_chunks(values, folder):
    pa = library("pyarrow")
    array = arrow_array(values, folder)
    return pa.chunked_array([array[i : i + ROWS] for i in range(0, len(array), ROWS)])


def arrow_table(values, folder):
    return table(values)


def arrow_batch(values, folder):
    return table(values).to_batches()[0]


def arrow_dictionary(values, folder):
    return arrow_chunks(values, folder).dictionary_encode()


def arrow_dictionaries(values, folder):
    """Chunks with a dictionary each, one with a name that no sample has."""
    pa = library("pyarrow")
    chunks = [arrow_array(values[i : i + 30], folder).dictionary_encode() for i in (0, 30, 60, 90)]
    extra = ["zzz"] if np.asarray(values).dtype.kind == "U" else [99]
    wider = pa.concat_arrays([chunks[1].dictionary, pa.array(extra, chunks[1].dictionary.type)])
    chunks[1] = pa.DictionaryArray.from_arrays(chunks[1].indices, wider)
    return pa.chunked_array(chunks)


def huggingface(values, folder):
    datasets = library("datasets")
    return datasets.Dataset(table(values))


def huggingface_column(values, folder):
    return huggingface(values, folder)["patch_id"]


def huggingface_selected(values, folder):
    """In another order, brought back by an order of indices."""
    datasets = library("datasets")
    mixed = np.random.default_rng(5).permutation(len(values))
    # ``select`` of what is no range keeps the table and adds indices.
    shuffled = datasets.Dataset(table(np.asarray(values)[mixed]))
    selected = shuffled.select(np.argsort(mixed))
    assert selected._indices is not None
    return selected


TABLES = {
    f.__name__: f
    for f in (
        pandas_series,
        pandas_index,
        pandas_frame,
        pandas_nullable,
        pandas_categorical,
        pandas_object,
        pandas_arrow,
        polars_series,
        polars_chunks,
        polars_frame,
        polars_lazy,
        arrow_array,
        arrow_chunks,
        arrow_table,
        arrow_batch,
        arrow_dictionary,
        arrow_dictionaries,
        huggingface,
        huggingface_column,
        huggingface_selected,
    )
}


def array(values, folder):
    return np.asarray(values)


def view(values, folder):
    return np.repeat(np.asarray(values), 3)[1::3]


def plain_list(values, folder):
    return as_list(values)


def plain_tuple(values, folder):
    return tuple(as_list(values))


def objects(values, folder):
    return np.array(as_list(values), dtype=object)


def structured(values, folder):
    values = np.asarray(values)
    records = np.zeros(len(values), [("x", "f4"), ("patch_id", values.dtype)])
    records["patch_id"] = values
    return records


def dataset(values, folder):
    class Known:
        patch_ids = as_list(values)

        def __len__(self):
            return len(values)

        def __getitem__(self, i):
            raise AssertionError("touched")

    return Known()


MEMORY = {
    f.__name__: f for f in (array, view, plain_list, plain_tuple, objects, structured, dataset)
}
EVERYWHERE = {**FILES, **TABLES, **MEMORY}


def check_stretches(ids, plain, stretches):
    """Any stretches, in any order, are those of the plain ids; so are the blocks."""
    for stretch in stretches:
        start, stop = sorted(stretch)
        block_ids = ids.read(start, stop)
        assert isinstance(block_ids, np.ndarray)
        assert block_ids.dtype.kind in "iu"
        assert block_ids.dtype.isnative
        np.testing.assert_array_equal(block_ids, plain[start:stop])
    for size in (1, 7, 1000):
        offset = 0
        for first, block in ids.blocks(size=size):
            assert first == offset
            np.testing.assert_array_equal(block, plain[first : first + size])
            offset += len(block)
        assert offset == len(plain)
