"""Patch ids as people have them: tuples, intervals, Enum members, paths and codes."""

from __future__ import annotations

import datetime
import enum
import json
import sys
import types
from array import array
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from gpusampler import CostBudget, PatchBatchSampler, PatchGroups, read_patch_ids

pd = pytest.importorskip("pandas")

SHAPES = [(512, 768), (64, 64), (512, 768), (1024, 64), (64, 64)]


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Number(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Text(str, enum.Enum):
    LOW = "low"
    HIGH = "high"


def object_array(values):
    result = np.empty(len(values), object)
    result[:] = values
    return result


def labels_of(source):
    return PatchBatchSampler(source, 2, seed=0).plan.groups.labels.tolist()


@pytest.mark.parametrize(
    "form", [list, tuple, object_array, pd.Series, lambda keys: pd.Index(keys, tupleize_cols=False)]
)
def test_tuples_are_names_in_their_own_order(form):
    ids = read_patch_ids(form(SHAPES))
    # As text, "(1024, 64)" would come first.
    assert ids.names == ((64, 64), (512, 768), (1024, 64))
    assert ids.read(0, 5).tolist() == [1, 0, 1, 2, 0]


def test_a_tuple_names_a_patch_wherever_an_id_does():
    sizes = {(64, 64): 2, (512, 768): 1, (1024, 64): 1}
    sampler = PatchBatchSampler(SHAPES, sizes, seed=0, weights=dict.fromkeys(sizes, 1))
    batches = {batch.patch_id: batch.indices.tolist() for batch in sampler.batches()}
    assert sorted(batches[64, 64]) == [1, 4]
    groups = sampler.plan.groups
    assert groups.samples_of((512, 768)).tolist() == [0, 2]
    with pytest.raises(KeyError, match=r"got \(1, 1\)"):
        groups.samples_of((1, 1))
    assert sampler.coverage().patch_ids.tolist() == [(64, 64), (512, 768), (1024, 64)]
    named = PatchGroups.from_counts([3, 2], [(8, 8), (4, 4)])
    assert named.labels.tolist() == [(4, 4), (8, 8)]
    assert named.samples_of((4, 4)).tolist() == [3, 4]


def test_samples_and_subsets_may_have_tuples():
    data = pytest.importorskip("torch.utils.data")

    class Samples(data.Dataset):
        def __len__(self):
            return len(SHAPES)

        def __getitem__(self, i):
            return {"patch_id": SHAPES[i]}

    class Declared(Samples):
        patch_ids = SHAPES

    assert labels_of(Samples()) == [(64, 64), (512, 768), (1024, 64)]
    assert labels_of(data.Subset(Declared(), [0, 1])) == [(64, 64), (512, 768)]
    both = data.ConcatDataset([Declared(), data.Subset(Declared(), [3])])
    assert PatchBatchSampler(both, 9, seed=0).plan.groups.counts.tolist() == [2, 2, 2]


def test_equal_tuples_of_numpy_integers_are_the_same_patches_everywhere():
    numpy_shapes = [tuple(np.array(shape, np.int16)) for shape in SHAPES]
    assert (
        PatchGroups.from_ids(numpy_shapes).fingerprint == PatchGroups.from_ids(SHAPES).fingerprint
    )
    others = PatchGroups.from_ids([(h, w + 1) for h, w in SHAPES])
    assert others.fingerprint != PatchGroups.from_ids(SHAPES).fingerprint
    state = PatchBatchSampler(SHAPES, 2, seed=0).state_dict()
    PatchBatchSampler(numpy_shapes, 2, seed=0).load_state_dict(state)


def test_an_index_keeps_tuples(tmp_path):
    path = tmp_path / "shapes.index"
    built = PatchGroups.from_ids(SHAPES, path=path)
    assert built.labels.tolist() == [(64, 64), (512, 768), (1024, 64)]
    assert PatchGroups.load(path, source=SHAPES, verify=True).fingerprint == built.fingerprint
    PatchGroups.from_ids([("a", 1), ("a", 0)]).save(tmp_path / "mixed.index")
    assert PatchGroups.load(tmp_path / "mixed.index").labels.tolist() == [("a", 0), ("a", 1)]
    dates = [datetime.date(2026, 1, 2), datetime.date(2026, 1, 1)]
    for save in (
        lambda path: PatchGroups.from_ids(dates).save(path),
        lambda path: PatchGroups.from_ids(dates, path=path),
    ):
        with pytest.raises(TypeError, match=r"strings or tuples .* date; pass \[str\(key\)"):
            save(tmp_path / "dates.index")
        assert not (tmp_path / "dates.index").exists()


def test_intervals_of_pandas_sort_by_their_bounds():
    values = pd.Series([1.0, 5, 19, 1])
    for cut in (pd.cut(values, [0, 2, 10, 100]), pd.qcut(values.rank(method="first"), 3)):
        intervals = cut.cat.categories
        assert labels_of(cut) == list(intervals)
        assert labels_of(list(cut)) == list(intervals)
        assert labels_of(pd.Index(cut.astype(object))) == list(intervals)
        assert labels_of(pd.IntervalIndex(cut)) == list(intervals)
    with pytest.raises(ValueError, match="every sample, got none in sample 2"):
        read_patch_ids(pd.cut(values, [0, 2, 10]))


def test_paths_dates_and_periods_are_names():
    paths = [Path("b/x"), Path("a"), Path("b/x")]
    assert labels_of(paths) == [Path("a"), Path("b/x")]
    days = [datetime.date(2026, 11, 29), datetime.date(2026, 2, 1)]
    assert labels_of(days) == sorted(days)
    months = pd.Series(pd.period_range("2026-01", periods=3, freq="M"))
    assert labels_of(months) == months.tolist()


def test_members_of_an_enum():
    assert labels_of([Number.HIGH, Number.LOW]) == [1, 2]
    assert labels_of([Text.LOW, Text.HIGH]) == ["high", "low"]
    assert labels_of(np.array(["low", "high"])) == ["high", "low"]
    sampler = PatchBatchSampler([Text.LOW, Text.HIGH], {Text.LOW: 1, Text.HIGH: 2}, seed=0)
    assert sampler.plan.sizes_by_patch.tolist() == [2, 1]
    for use in (read_patch_ids, lambda keys: PatchGroups.from_counts([3, 4], keys)):
        with pytest.raises(TypeError, match=r"keys that sort, got <Level.LOW: 1>: pass \[key.na"):
            use([Level.LOW, Level.HIGH])
    assert PatchGroups.from_counts([3, 4], [Number.HIGH, Number.LOW]).labels.tolist() == [1, 2]


def test_array_and_memoryview_of_integers():
    for source in (array("q", [3, 1, 3]), array("b", [3, 1, 3]), memoryview(b"\x03\x01\x03")):
        assert read_patch_ids(source).read(0, 3).tolist() == [3, 1, 3]
    with pytest.raises(TypeError, match="integers, got dtype float64"):
        read_patch_ids(array("d", [1.0]))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            pd.MultiIndex.from_tuples(SHAPES, names=["h", "w"]),
            TypeError,
            r"levels \['h', 'w'\]: pass frame.groupby\(level=\[0, 1\]\).ngroup\(\)",
        ),
        (pd.DataFrame(SHAPES, columns=["h", "w"]), ValueError, r"groupby\(\['h', 'w'\]\).ngroup"),
        ([list(shape) for shape in SHAPES], ValueError, r"pass \[tuple\(row\) for row in ids\]"),
        (np.array(SHAPES), ValueError, r"pass \[tuple\(row\) for row in ids\]"),
        ([(1, "a"), ("a", 1)], TypeError, r"values sort: .*convert them to one type"),
        ([(1, 2), 3], TypeError, "all keys of one type, got 3 in sample 1"),
        ([(1, 2), "a"], TypeError, "all keys of one type, got 'a' in sample 1"),
        (["a", (1, 2)], TypeError, r"all strings or all integers, got \(1, 2\) in sample 1"),
        ([(1, (2, float("nan")))], ValueError, "every sample, got none in sample 0"),
        ([(1, [2]), (1, [3])], ValueError, "must be"),
        ([(np.zeros(3), 0), (np.ones(3), 1)], ValueError, "must be"),
        ([(1, 2), None], ValueError, "every sample, got none in sample 1"),
        ([(1, 2), (1, float("nan"))], ValueError, "every sample, got none in sample 1"),
        (pd.Series([0.5, 1.5]).astype("category"), TypeError, r"pass the column's \.cat\.codes"),
        ([frozenset({1})], TypeError, "patch_ids or samples"),
        ([0.5, 1.5], TypeError, "got dtype float64"),
        ([Fraction(1, 2)], TypeError, r"must be integers, got Fraction\(1, 2\) in sample 0"),
    ],
)
def test_what_cannot_name_a_patch(source, error, message):
    with pytest.raises(error, match=message):
        read_patch_ids(source)


def test_a_dataset_of_xarray_is_no_list_of_ids(monkeypatch):
    class Dataset(dict):
        """As in xarray: a mapping of variables, whose __array__ raises."""

        def __array__(self):
            raise TypeError("cannot directly convert an xarray.Dataset into a numpy array")

    module = types.ModuleType("xarray")
    module.Dataset = Dataset
    monkeypatch.setitem(sys.modules, "xarray", module)
    with pytest.raises(TypeError, match=r"of 'patch_id', 'head': .* such as ds\['patch_id'\]"):
        read_patch_ids(Dataset(patch_id=[1, 2], head=[0.5, 0.6]))


def test_codes_of_pandas_with_missing_values_are_warned_of():
    column = pd.Series(["b", None, "a", None]).astype("category")
    with pytest.warns(UserWarning, match="smallest patch id in an int8 column is -1, in 2 samples"):
        assert labels_of(column.cat.codes) == [-1, 0, 1]
    with pytest.raises(ValueError, match="every sample, got none in sample 1"):
        read_patch_ids(column)
    # Ids of one's own may be negative.
    labels_of(column.cat.codes.astype(np.int64))
    labels_of(pd.Series([-2, -1, 0], dtype=np.int8))
    labels_of(column.dropna().cat.codes)


def test_a_list_of_samples_is_probably_no_list_of_ids():
    files = [(f"{i}.png", i % 3) for i in range(200)]
    with pytest.warns(UserWarning, match="each of 200 tuples names a patch of its own: if they"):
        read_patch_ids(files)
    read_patch_ids([(i % 3, i % 2) for i in range(200)])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((1, None), ValueError, "every sample, got none in sample 1"),
        ((float("nan"), 2), ValueError, "every sample, got none in sample 1"),
        (
            (1, [2]),
            TypeError,
            r"patch_id must be a name, as in sample 0, got \(1, \[2\]\) in sample 1",
        ),
        (Level.LOW, TypeError, r"got <Level.LOW: 1>: pass \[key.name"),
    ],
)
def test_bad_keys_of_samples(value, error, message):
    samples = [{"patch_id": (1, 2)}, {"patch_id": value}]
    with pytest.raises(error, match=message):
        PatchBatchSampler(samples, 1, seed=0)


def test_fingerprints_of_tuples_are_of_plain_values(tmp_path):
    plain = PatchGroups.from_ids([(1, ("low", 2)), (2, ("high", 1))])
    fancy = PatchGroups.from_ids(
        [(Number.LOW, (Text.LOW, np.int16(2))), (np.int64(2), (Text.HIGH, Number.LOW))]
    )
    assert plain.fingerprint == fancy.fingerprint

    class Bare:
        def __init__(self, value):
            self.value = value

        def __lt__(self, other):
            return self.value < other.value

    # Its text would be another one in another process.
    with pytest.raises(TypeError, match="patch_ids or samples"):
        read_patch_ids([Bare(1), Bare(2)])


def test_a_budget_by_tuples_comes_back_from_json():
    budget = CostBudget(100, cost={(64, 64): 1, (512, 768): 3, (1024, 64): 2})
    again = CostBudget.from_dict(json.loads(json.dumps(budget.to_dict())))
    assert again == budget
    by_date = CostBudget(100, cost={datetime.date(2026, 1, 1): 1})
    with pytest.raises(TypeError, match="tuples of them as keys to be saved, got datetime"):
        by_date.to_dict()


def test_samples_of_a_key_that_is_none_of_them():
    groups = PatchGroups.from_ids(SHAPES)
    for key in ((1, 1), ("a", 2), "a", 3):
        with pytest.raises(KeyError, match="must be one of the 3 patches"):
            groups.samples_of(key)
