"""Patch ids that are names: which there are, their order, and how little is kept of them."""

from __future__ import annotations

import threading
import time
import tracemalloc

import numpy as np
import pytest
import tqdm as tqdm_module
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, read_patch_ids
from gpusampler.sources import strings
from gpusampler.sources.sample_by_sample import THREAD_POOL_ABOVE
from gpusampler.sources.strings import CategoricalIds, NamedIds, factorize_list
from support.id_sources import arrow_chunks, parquet

NAMES = ["b", "a", "b", "C", "a", "b"]


def check(ids, expected):
    assert ids.names == tuple(sorted(set(expected)))
    assert [ids.names[i] for i in np.asarray(ids)] == list(expected)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_names_come_back_as_they_were(given_names):
    check(read_patch_ids(given_names), given_names)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 9))
def test_blocks_of_names_join(given_names, size):
    ids = NamedIds(lambda a, b: factorize_list(given_names[a:b], a), len(given_names))
    joined = np.concatenate([block for _, block in ids.blocks(size=size)])
    assert [ids.names[i] for i in joined] == given_names


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "int32")],
)
def test_places_are_narrow(count, dtype):
    ids = read_patch_ids([str(i) for i in range(count)])
    assert ids.read(0, 1).dtype == dtype
    assert len(set(ids.read(0, count).tolist())) == count


@pytest.mark.parametrize(
    "source",
    [
        np.array(NAMES),
        np.array(NAMES).astype("S"),
        np.array(NAMES, dtype=object),
        np.array(NAMES, dtype=np.dtypes.StringDType()),
        np.array([n.encode() for n in NAMES], dtype=object),
        [np.str_(n) for n in NAMES],
        tuple(NAMES),
        np.ma.masked_array(NAMES, [0] * 6),
        np.repeat(np.array(NAMES), 2)[::2],
    ],
    ids=["U", "S", "object", "StringDType", "bytes", "np.str_", "tuple", "masked", "strides"],
)
def test_names_of_every_type_in_memory(source):
    ids = read_patch_ids(source)
    check(ids, NAMES)
    assert all(type(name) is str for name in ids.names)


def test_bytes_that_are_no_utf8_are_named():
    with pytest.raises(ValueError, match=r"ids must be UTF-8, got b'\\xe4' in sample 2"):
        read_patch_ids(np.array([b"a", b"b", b"\xe4"]))


def test_names_that_no_sample_has_are_left_out():
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    categories = ["z", "b", "a", "C"]
    check(read_patch_ids(pd.Series(pd.Categorical(NAMES, categories=categories))), NAMES)
    check(read_patch_ids(pl.Series(NAMES, dtype=pl.Enum(categories))), NAMES)
    check(read_patch_ids(pl.Series([*NAMES, "z"], dtype=pl.Categorical)[:6]), NAMES)
    pa = pytest.importorskip("pyarrow")
    check(read_patch_ids(pa.array([*NAMES, "z"]).dictionary_encode()[:6]), NAMES)


def test_categories_of_other_things():
    pd = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"got dtype category of float64, such as 0\.5"):
        read_patch_ids(pd.Series([0.5, 1.5]).astype("category"))
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(TypeError, match="got dtype dictionary<values=double"):
        read_patch_ids(pa.array([0.5]).dictionary_encode())


def test_other_strings_of_arrow():
    pa = pytest.importorskip("pyarrow")
    for arrow_type in (pa.large_string(), pa.string_view()):
        check(read_patch_ids(pa.array(NAMES, arrow_type)), NAMES)


def test_a_name_that_appears_later_is_an_error():
    names = list(NAMES)
    ids = NamedIds(lambda a, b: factorize_list(names[a:b], a), 6)
    names[4] = "new"
    assert ids.read(0, 4).tolist() == [2, 1, 2, 0]
    with pytest.raises(OSError, match=r"must not change .* got the new name 'new' in sample 4"):
        ids.read(2, 6)


@pytest.mark.parametrize("kind", ["list", "array", "arrow"])
@pytest.mark.serial("measures time")
def test_a_million_names_are_read_in_about_a_second(kind):
    source = [f"patch {i % 5000}" for i in range(1_000_000)]
    if kind == "array":
        source = np.array(source)
    elif kind == "arrow":
        source = pytest.importorskip("pyarrow").array(source)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        ids = read_patch_ids(source)
        seconds.append(time.perf_counter() - start)
    assert len(ids.names) == 5000
    # 0.1 to 0.3 s alone; a loop over the samples in Python takes more.
    assert min(seconds) < 1.5


def test_only_distinct_names_are_kept(monkeypatch):
    monkeypatch.setattr(strings, "BLOCK", 10_000)
    source = np.resize(np.array(NAMES), 1_000_000)
    read_patch_ids(source)
    tracemalloc.start()
    try:
        ids = read_patch_ids(source)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ids.size == 1_000_000
    assert current < 20_000
    assert peak < 2_000_000


def test_files_are_read_once_for_their_names(tmp_path, monkeypatch):
    from gpusampler.sources import parquet as parquet_module

    path = parquet(np.array(NAMES * 50), tmp_path)
    begun = []
    begin_group = parquet_module._ColumnReader._begin_group
    monkeypatch.setattr(
        parquet_module._ColumnReader,
        "_begin_group",
        lambda self, group: (begun.append(group), begin_group(self, group)),
    )
    monkeypatch.setattr(strings, "BLOCK", 7)
    check(read_patch_ids(path), NAMES * 50)
    groups = 25
    # Once for the names, once for the ids.
    assert begun == [*range(groups), *range(groups)]


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("slow", [True, False])
def test_a_bar_is_shown_when_it_takes_long(monkeypatch, slow, progress):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(tqdm_module.tqdm, "monitor_interval", 0)
    # On a busy machine anything may take 0.02 s.
    monkeypatch.setattr("gpusampler.core.progress_bar.SHOW_AFTER_SECONDS", 0.02 if slow else 60)
    monkeypatch.setattr(strings, "BLOCK", 1)

    def factor(start, stop):
        time.sleep(0.02 if slow else 0)
        return factorize_list(NAMES[start:stop], start)

    NamedIds(factor, 6, progress=progress)
    assert ("patch names" in terminal.text) == (slow and progress)


def test_the_sampler_groups_by_name():
    sampler = PatchBatchSampler(NAMES, 2, seed=1)
    for batch in sampler:
        assert len({NAMES[i] for i in batch}) == 1
    assert sorted(i for batch in sampler for i in batch) == list(range(6))
    assert sampler.plan.groups.counts.tolist() == [1, 2, 3]


# Datasets


class Samples:
    def __init__(self, ids):
        self.ids = ids
        self.asked = []
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        with self.lock:
            self.asked.append(i)
        return {"patch_id": self.ids[i]}


class Known(Samples):
    def get_all_patch_ids(self):
        return self.ids

    def __getitem__(self, i):
        raise AssertionError("touched")


@pytest.mark.parametrize("size", [7, THREAD_POOL_ABOVE + 1, 20_000])
def test_samples_may_have_names(size):
    given_names = np.resize(np.array([*NAMES, "only at the end of this"]), size).tolist()
    for wrap in (str, np.str_, np.array):
        dataset = Samples(list(map(wrap, given_names)))
        check(read_patch_ids(dataset), given_names)
        assert sorted(dataset.asked) == list(range(size))


@pytest.mark.parametrize("size", [9, THREAD_POOL_ABOVE + 9])
def test_samples_have_names_or_integers_all_of_them(size):
    for wrong in (3, None, 0.5, b"a", ["a"]):
        values = ["a"] * size
        values[8] = wrong
        with pytest.raises(TypeError, match=r"must be a name, as in sample 0, got .* in sample 8"):
            read_patch_ids(Samples(values))
    values = [3] * size
    values[8] = "a"
    with pytest.raises(TypeError, match="patch_id must be an int, got 'a' in sample 8"):
        read_patch_ids(Samples(values))


class Late(Samples):
    """Sample 0 fails, later than others are asked for."""

    def __getitem__(self, i):
        if i == 0:
            time.sleep(0.05)
            raise OSError("gone")
        return super().__getitem__(i)


def test_no_thread_waits_for_a_first_sample_that_fails():
    with pytest.raises(RuntimeError, match="sample 0 raised"):
        read_patch_ids(Late([5] * 5000))
    assert not [t for t in threading.enumerate() if t.name.startswith("gpusampler-ids")]


def test_the_first_sample_says_of_which_kind_they_are():
    class First(Samples):
        def __getitem__(self, i):
            if i == 0:
                time.sleep(0.05)
            return super().__getitem__(i)

    values = ["a"] * 5000
    check(read_patch_ids(First(values)), values)


def test_parts_of_datasets_with_names():
    data = pytest.importorskip("torch.utils.data")
    dataset = Known(NAMES)
    # "C" is in no sample of this part.
    part = read_patch_ids(data.Subset(dataset, [5, 1, 0]))
    check(part, ["b", "a", "b"])
    nested = data.Subset(data.Subset(dataset, [3, 1, 0]), [2, 0])
    check(read_patch_ids(nested), ["b", "C"])
    concatenated = data.ConcatDataset([Known(["z", "b"]), dataset, Samples(["a", "k"])])
    check(read_patch_ids(concatenated), ["z", "b", *NAMES, "a", "k"])
    names_dataset = data.ConcatDataset([Known(["z", "b"]), dataset])
    check(read_patch_ids(data.Subset(names_dataset, [6, 0])), ["a", "z"])
    with pytest.raises(TypeError, match="must all have string ids or all integer ids, got a mix"):
        read_patch_ids(data.ConcatDataset([dataset, Known([1, 2])]))


def test_coded_names_take_any_order():
    ids = CategoricalIds(np.array([2, 0, 2]), ["b", "unused", "a"])
    assert ids.names == ("a", "b")
    assert ids.read(0, 3).tolist() == [0, 1, 0]
    assert ids.read(1, 2).dtype == np.uint8


def test_names_in_chunks_with_large_dictionaries(tmp_path):
    pytest.importorskip("pyarrow")
    many = [f"n{i}" for i in range(3000)]
    source = arrow_chunks(many, tmp_path)
    check(read_patch_ids(source), many)
    check(read_patch_ids(source.dictionary_encode()), many)
