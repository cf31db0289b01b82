"""Sources: where patch ids come from, and what is said when they do not."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import tqdm as tqdm_module

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.sources.datasets import dataset_patch_ids
from gpusampler.sources.sample_by_sample import THREAD_POOL_ABOVE
from support.strategies import expected_by_patch, samples_by_patch

IDS = np.array([5, 5, 2, 9, 2, 5, 9])


class Samples:
    """A dataset that must be asked sample by sample, and remembers who asked."""

    def __init__(self, ids, wrap=int):
        self.ids, self.wrap = ids, wrap
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        self.asked.append(i)
        self.threads.add(threading.current_thread().name)
        return {"patch_id": self.wrap(self.ids[i]), "x": 0.5}


class Untouchable:
    """A dataset whose samples must not be touched."""

    def __init__(self, ids):
        self._ids = ids

    def __len__(self):
        return len(self._ids)

    def __getitem__(self, i):
        raise AssertionError(f"sample {i} was touched")


class ByMethod(Untouchable):
    def get_all_patch_ids(self):
        return self._ids


class ByAttribute(Untouchable):
    @property
    def patch_ids(self):
        return self._ids


class ByPatchIdsMethod(Untouchable):
    def patch_ids(self):
        return self._ids


class ByBoth(ByMethod):
    patch_ids = np.zeros(3)


def groups_of(source, **settings) -> dict[int, list[int]]:
    return samples_by_patch(PatchBatchSampler(source, 2, **settings).plan.groups)


@pytest.mark.parametrize("kind", [ByMethod, ByAttribute, ByPatchIdsMethod, ByBoth, Samples])
def test_every_kind_of_dataset(kind):
    assert groups_of(kind(IDS)) == expected_by_patch(IDS)


@pytest.mark.parametrize("kind", [ByMethod, ByAttribute])
def test_datasets_may_hold_ids_of_any_library(library, kind):
    sampler = PatchBatchSampler(kind(library.array(IDS)), 2)
    assert samples_by_patch(sampler.plan.groups) == expected_by_patch(IDS)
    if library.name not in ("numpy", "torch"):
        # On the host, "auto" may still move a dataset's ids to a GPU.
        assert str(sampler.plan.device) == library.device


@pytest.mark.parametrize(
    "source", [IDS.tolist(), tuple(IDS.tolist()), list(IDS), ByMethod(IDS.tolist())]
)
def test_plain_sequences(source):
    assert groups_of(source) == expected_by_patch(IDS)


def test_a_range_and_groups_are_sources():
    assert groups_of(range(3, 6)) == {3: [0], 4: [1], 5: [2]}
    groups = PatchGroups.from_ids(IDS)
    assert PatchBatchSampler(groups, 2).plan.groups is groups


def test_a_list_of_samples_is_a_dataset():
    assert groups_of([{"patch_id": int(i)} for i in IDS]) == expected_by_patch(IDS)


def test_auto_stays_where_the_ids_are(library):
    assert str(PatchBatchSampler(library.array(IDS), 2).plan.device) == library.device


def wraps():
    torch = pytest.importorskip("torch")
    return {
        "int": int,
        "numpy": np.int32,
        "0-d array": np.array,
        "0-d tensor": torch.tensor,
        "tensor of one": lambda i: torch.tensor([i]),
    }


@pytest.mark.parametrize("wrap", ["int", "numpy", "0-d array", "0-d tensor", "tensor of one"])
@pytest.mark.parametrize("size", [7, THREAD_POOL_ABOVE + 1])
def test_sample_values_of_every_type(wrap, size):
    ids = np.resize(IDS, size)
    assert groups_of(Samples(ids, wraps()[wrap])) == expected_by_patch(ids)


@pytest.mark.parametrize("size", [THREAD_POOL_ABOVE, THREAD_POOL_ABOVE + 1, 20_000])
def test_every_sample_is_read_once_and_by_threads_when_many(size):
    dataset = Samples(np.arange(size) % 13 - 4)
    result = dataset_patch_ids(dataset)
    np.testing.assert_array_equal(result, dataset.ids)
    assert sorted(dataset.asked) == list(range(size))
    thread_name = threading.current_thread().name
    if size <= THREAD_POOL_ABOVE:
        assert dataset.threads == {thread_name}
    else:
        assert thread_name not in dataset.threads
        assert all(name.startswith("gpusampler-ids") for name in dataset.threads)


def pool_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("gpusampler-ids")]


class Breaks(Samples):
    """Raises at one sample; a thread pool must then begin few others."""

    def __init__(self, ids, sample, error):
        super().__init__(ids)
        self.at, self.error = sample, error

    def __getitem__(self, i):
        if i == self.at:
            raise self.error
        return super().__getitem__(i)


@pytest.mark.parametrize("size", [10, 50_000])
@pytest.mark.parametrize("error", [KeyError("head"), OSError("file is gone"), StopIteration()])
def test_an_exception_inside_names_the_sample(size, error):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="sample 7 raised ") as caught:
        dataset_patch_ids(Breaks(np.zeros(size, np.int64), 7, error))
    assert caught.value.__cause__ is error
    assert repr(error) in str(caught.value)
    assert not pool_threads()
    assert threading.active_count() == before


def test_after_an_exception_little_more_is_read():
    dataset = Breaks(np.zeros(200_000, np.int64), 3, OSError("gone"))
    with pytest.raises(RuntimeError, match="sample 3 raised"):
        dataset_patch_ids(dataset)
    assert len(dataset.asked) < 100_000


class Interrupted(Samples):
    def __getitem__(self, i):
        if i == 3000:
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_an_interrupt_gets_through_and_leaves_no_thread():
    with pytest.raises(KeyboardInterrupt):
        dataset_patch_ids(Interrupted(np.zeros(50_000, np.int64)))
    assert not pool_threads()


def test_no_thread_is_left_after_success():
    before = threading.active_count()
    dataset_patch_ids(Samples(np.zeros(5000, np.int64)))
    assert threading.active_count() == before


@pytest.mark.parametrize("size", [9, THREAD_POOL_ABOVE + 9])
@pytest.mark.parametrize(
    ("sample", "error", "match"),
    [
        ({"patch_id": 1.5}, TypeError, r"patch_id must be an int, got 1\.5 in sample 8"),
        ({"patch_id": True}, TypeError, "patch_id must be an int, got True in sample 8"),
        ({"patch_id": "p"}, TypeError, "patch_id must be an int, got 'p' in sample 8"),
        ({"patch_id": None}, TypeError, "patch_id must be an int, got None in sample 8"),
        ({"patch_id": [1, 2]}, TypeError, r"patch_id must be an int, got \[1, 2\] in sample 8"),
        ({"patch_id": 2**63}, ValueError, f"patch_id must fit in int64, got {2**63} in sample 8"),
        ({"patch_id": 2**70}, ValueError, f"patch_id must fit in int64, got {2**70} in sample 8"),
        ({"x": 1}, TypeError, "samples with a 'patch_id', got a dict without one as sample 8"),
        ((1, 2), TypeError, "samples with a 'patch_id', got a tuple without one as sample 8"),
        (np.zeros(3), TypeError, "samples with a 'patch_id', got a ndarray without one"),
        (None, TypeError, "samples with a 'patch_id', got a NoneType without one"),
    ],
)
def test_wrong_samples_are_named(size, sample, error, match):
    class Wrong(Samples):
        def __getitem__(self, i):
            return sample if i == 8 else super().__getitem__(i)

    with pytest.raises(error, match=match):
        dataset_patch_ids(Wrong(np.zeros(size, np.int64)))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def bar_of(monkeypatch, size: int, after: float | None = 0.0, **settings) -> str:
    terminal = Terminal()
    if after is not None:
        monkeypatch.setattr("gpusampler.core.progress_bar.SHOW_AFTER_SECONDS", after)
    monkeypatch.setattr("sys.stderr", terminal)
    # Its watching thread would outlive the test.
    monkeypatch.setattr(tqdm_module.tqdm, "monitor_interval", 0)
    PatchBatchSampler(Samples(np.zeros(size, np.int64)), 2, **settings)
    return terminal.getvalue()


def test_a_terminal_shows_a_bar_when_there_are_many(monkeypatch):
    bar_text = bar_of(monkeypatch, 5000)
    # All that takes long has one.
    for label in ("patch ids", "counting patches"):
        assert label in bar_text
    assert "5.00k/5.00k" in bar_text
    assert "100%" in bar_text


@pytest.mark.parametrize("settings", [{"progress": False}, {"after": None}])
def test_no_bar_when_not_wanted_or_when_it_takes_no_time(monkeypatch, settings):
    assert bar_of(monkeypatch, 5000, **settings) == ""


@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_written_when_piped(capfd, progress):
    PatchBatchSampler(Samples(np.zeros(5000, np.int64)), 2, progress=progress)
    assert capfd.readouterr() == ("", "")


def test_empty_datasets():
    for dataset_type in (ByMethod, ByAttribute, Samples):
        with pytest.raises(
            ValueError, match=f"at least one sample, got an empty {dataset_type.__name__}"
        ):
            PatchBatchSampler(dataset_type([]), 2)


@pytest.mark.parametrize("kind", [ByMethod, ByAttribute])
@pytest.mark.parametrize("length", [0, 6, 8])
def test_ids_of_another_length_than_the_dataset(kind, length):
    class Claims(kind):
        def __len__(self):
            return 7

    with pytest.raises(ValueError, match=rf"Claims has 7 samples, got ids of shape \({length},\)"):
        PatchBatchSampler(Claims(np.zeros(length, np.int64)), 2)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (np.zeros(3), TypeError, "ids must be integers, got dtype float64"),
        (np.array([1.0, np.nan, 2.0]), TypeError, "ids must be integers, got dtype float64"),
        (np.zeros((3, 2), np.int64), ValueError, "ids must be 1-D"),
        (np.zeros(3, np.bool_), TypeError, "ids must be integers, got dtype bool"),
        (["a", "b", 3], TypeError, "ids must be all strings or all integers, got 3 in sample 2"),
    ],
)
def test_bad_ids_of_a_dataset(ids, error, match):
    with pytest.raises(error, match=match):
        PatchBatchSampler(ByMethod(ids), 2)


def test_a_sampler_as_source_names_the_flag_of_lightning():
    data = pytest.importorskip("torch.utils.data")

    class Shuffled(data.Sampler):
        def __iter__(self):
            return iter([0])

        def __len__(self):
            return 1

    inner = data.SequentialSampler(range(5))
    for source in (
        inner,
        data.BatchSampler(inner, 2, False),
        data.DistributedSampler(range(5), num_replicas=2, rank=0),
        Shuffled(),
    ):
        with pytest.raises(TypeError, match=r"got \w+; .*use_distributed_sampler=False"):
            PatchBatchSampler(source, 2)


def test_datasets_without_a_length():
    data = pytest.importorskip("torch.utils.data")

    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter([{"patch_id": 1}])

    with pytest.raises(TypeError, match=r"must have a length \(a map-style dataset\), got Stream"):
        PatchBatchSampler(Stream(), 2)


@pytest.mark.parametrize("kind", [ByMethod, ByAttribute])
def test_subsets_touch_no_sample(kind):
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    chosen = [6, 0, 2, 3]
    expected = expected_by_patch(IDS[chosen])
    for indices in (chosen, tuple(chosen), np.array(chosen), torch.tensor(chosen)):
        assert groups_of(data.Subset(kind(IDS), indices)) == expected
    assert groups_of(data.Subset(kind(IDS), range(1, 7, 2))) == expected_by_patch(IDS[1:7:2])
    nested = data.Subset(data.Subset(kind(IDS), chosen), [2, 0])
    assert groups_of(nested) == expected_by_patch(IDS[[2, 6]])


@pytest.mark.parametrize("kind", [ByMethod, ByAttribute])
def test_random_split_touches_no_sample(kind):
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    ids = np.random.default_rng(0).integers(0, 4, 3000)
    subsets = data.random_split(kind(ids), [0.7, 0.3], torch.Generator().manual_seed(0))
    for part in subsets:
        assert groups_of(part) == expected_by_patch(ids[part.indices])
    halves = data.random_split(subsets[0], [0.5, 0.5], torch.Generator().manual_seed(1))
    indices = np.array(subsets[0].indices)
    assert groups_of(halves[1]) == expected_by_patch(ids[indices[halves[1].indices]])


def test_concatenations_touch_no_sample(library):
    data = pytest.importorskip("torch.utils.data")
    first, second = np.array([7, -1, 7], np.int32), np.array([2**40, 7])
    concatenated = data.ConcatDataset(
        [ByMethod(library.array(first)), ByAttribute(library.array(second))]
    )
    ids = np.concatenate([first, second])
    assert groups_of(concatenated) == expected_by_patch(ids)
    nested = data.ConcatDataset([data.Subset(concatenated, [4, 0]), ByMethod([1]), concatenated])
    assert groups_of(nested) == expected_by_patch([7, 7, 1, *ids])


def test_concatenations_of_signed_and_unsigned_ids():
    data = pytest.importorskip("torch.utils.data")
    id_arrays = [np.array([1, 2**62 + 1], np.uint64), np.array([-1, 2**62 + 1])]
    concatenated = data.ConcatDataset(list(map(ByMethod, id_arrays)))
    assert groups_of(concatenated) == {-1: [2], 1: [0], 2**62 + 1: [1, 3]}


def test_concatenations_with_an_empty_part():
    data = pytest.importorskip("torch.utils.data")
    concatenated = data.ConcatDataset([ByMethod([]), ByMethod([4, 4])])
    assert len(concatenated) == 2
    assert groups_of(concatenated) == {4: [0, 1]}


def test_a_concatenation_reads_only_the_part_that_cannot_tell():
    data = pytest.importorskip("torch.utils.data")
    samples = Samples(np.array([3, 1]))
    concatenated = data.ConcatDataset([ByMethod(IDS), samples])
    assert groups_of(concatenated) == expected_by_patch([*IDS, 3, 1])
    assert sorted(samples.asked) == [0, 1]


def test_a_subset_of_a_dataset_that_cannot_tell_reads_its_own_samples_only():
    data = pytest.importorskip("torch.utils.data")
    samples = Samples(np.arange(1000))
    part = data.Subset(data.ConcatDataset([samples]), [500, 3])
    assert groups_of(part) == {3: [1], 500: [0]}
    assert sorted(samples.asked) == [3, 500]


def test_floats_in_a_part_of_a_concatenation():
    data = pytest.importorskip("torch.utils.data")
    problem = "part of ConcatDataset must be integers, got dtype float64"
    with pytest.raises(TypeError, match=problem):
        groups_of(data.ConcatDataset([ByMethod(IDS), ByMethod(np.array([0.5]))]))


class Column:
    """What a table's column looks like: indexable, and an array when asked."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def test_a_column_of_a_table_is_ids():
    assert groups_of(Column([3, 1, 3])) == {1: [1], 3: [0, 2]}
    with pytest.raises(TypeError, match="ids must be integers, got dtype float64"):
        groups_of(Column([0.5]))


class Endless:
    """A dataset whose samples never end for one who does not ask its length."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize(
    "call",
    [
        lambda: PatchGroups.from_counts(Endless()),
        lambda: PatchGroups.from_ids([1, 2]).select(Endless()),
        lambda: PatchBatchSampler([1, 2], 1).plan.evaluate(0, Endless()),
    ],
)
def test_a_dataset_where_an_array_is_due_is_refused(call):
    with pytest.raises(TypeError, match="must be an array or a list of integers, got Endless"):
        call()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_lists_of_arrays_of_one_id(kind):
    if kind == "torch":
        make = pytest.importorskip("torch").tensor
    else:
        make = np.array
    ids = [make(4), make(-2), make(4)]
    assert PatchGroups.from_ids(ids).patch_ids.tolist() == [-2, 4]
    assert PatchBatchSampler(ByAttribute(ids), 2).plan.groups.counts.tolist() == [1, 2]
    # A list of longer ones is none of ids.
    with pytest.raises(TypeError):
        PatchGroups.from_ids([np.arange(3), np.arange(3)])
