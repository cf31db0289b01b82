"""Where the ids of a sampler are grouped: on its device if it can, with the host's groups."""

from __future__ import annotations

import logging
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.core import arrays, devices, memory
from gpusampler.core.devices import HOST, Device
from gpusampler.core.tracing import Recorder
from gpusampler.groups import from_source
from gpusampler.sources.base import PatchIds
from support.strategies import INT64, id_arrays

torch = pytest.importorskip("torch")

DEVICE = Device("torch", "cpu")
IDS = np.random.default_rng(2).integers(-20, 20, 5000)

pytestmark = pytest.mark.usefixtures("cpu_as_device")


class Samples:
    """A dataset that knows its ids."""

    def __init__(self, ids) -> None:
        self.patch_ids = ids

    def __len__(self) -> int:
        return len(self.patch_ids)

    def __getitem__(self, i):
        raise AssertionError("no sample is read")


def groups_on_device(source) -> PatchGroups:
    return PatchBatchSampler(source, 8, seed=0, device="cpu", progress=False).plan.groups


def check_host_groups(groups: PatchGroups, source) -> None:
    """Compare groups with those of the host."""
    host = PatchGroups.from_ids(source)
    for name in ("patch_ids", "counts", "starts"):
        np.testing.assert_array_equal(getattr(groups, name), getattr(host, name), name)
        assert getattr(groups, name).dtype == np.int64
    assert groups.fingerprint == host.fingerprint
    assert groups.names == host.names
    assert groups.source_size == host.source_size
    assert groups._signature == host._signature
    assert groups.is_contiguous == host.is_contiguous
    if host.order is not None:
        order = arrays.to_numpy(groups.order)
        assert order.dtype == host.order.dtype
        np.testing.assert_array_equal(order, host.order)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ids=id_arrays())
@example(ids=np.array([INT64.min, INT64.max, INT64.min]))
@example(ids=np.array([INT64.max, INT64.max - 300, INT64.max]))
@example(ids=np.array([5]))
def test_the_devices_groups_are_the_hosts(ids):
    groups = groups_on_device(ids)
    assert groups.grouped_on == groups.device == DEVICE
    assert groups.order is None or isinstance(groups.order, torch.Tensor)
    check_host_groups(groups, ids)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "uploaded"),
    [
        ("int64", 0, 255, "uint8"),
        ("int64", -1, 127, "int8"),
        ("int64", -1, 128, "int16"),
        ("uint16", 0, 32767, "int16"),
        ("uint16", 0, 32768, "int32"),
        ("int64", -(1 << 31), (1 << 31) - 1, "int32"),
        ("uint32", 0, 1 << 31, "int64"),
        ("uint64", 7, INT64.max, "int64"),
        (">i4", -5, 70_000, "int32"),
    ],
)
def test_ids_are_uploaded_in_the_narrowest_dtype(monkeypatch, dtype, low, high, uploaded):
    ids = np.array([high, low, high, low + 1, low], dtype)
    sent, upload = [], arrays.upload
    monkeypatch.setattr(arrays, "upload", lambda *args: sent.append(args) or upload(*args))
    groups = groups_on_device(ids)
    assert [(array.dtype.name, device) for array, device in sent] == [(uploaded, DEVICE)]
    check_host_groups(groups, ids)


def test_ids_are_uploaded_once_in_pieces_of_a_block(monkeypatch):
    monkeypatch.setattr(PatchIds.blocks, "__defaults__", (0, 1000))
    sent, upload = [], arrays.upload
    monkeypatch.setattr(arrays, "upload", lambda *args: sent.append(args[0]) or upload(*args))
    ids = IDS[:4500]
    groups = groups_on_device(ids)
    assert [piece.size for piece in sent] == [1000, 1000, 1000, 1000, 500]
    check_host_groups(groups, ids)


def test_narrow_keys_are_sorted(monkeypatch):
    sorted_dtypes, sort = [], arrays.stable_argsort
    monkeypatch.setattr(
        arrays, "stable_argsort", lambda keys: sorted_dtypes.append(keys.dtype) or sort(keys)
    )
    for ids in (IDS + 10**6, IDS * 100, IDS * 10**6, IDS * 10**12):
        check_host_groups(groups_on_device(ids), ids)
    assert sorted_dtypes == [torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize(
    "source",
    [IDS, IDS.tolist(), IDS[::2], np.sort(IDS), Samples(IDS)],
    ids=["array", "list", "strided", "contiguous", "dataset"],
)
def test_integers_in_memory_are_grouped_on_a_device_that_is_named(source):
    sampler = PatchBatchSampler(source, 8, seed=0, device="cpu")
    assert sampler.stats().grouped_on == sampler.stats().to_dict()["grouped_on"] == "cpu"
    assert "grouped on cpu, " in str(sampler.stats())
    check_host_groups(sampler.plan.groups, source)
    assert list(sampler) == list(PatchBatchSampler(source, 8, seed=0, device="numpy"))


def test_groups_of_a_device_are_saved_and_pickled(tmp_path):
    groups = groups_on_device(IDS)
    groups.save(tmp_path / "a.index")
    check_host_groups(PatchGroups.load(tmp_path / "a.index", source=IDS), IDS)
    copy = pickle.loads(pickle.dumps(groups))
    assert copy.device == HOST
    check_host_groups(copy, IDS)


# The host, and why


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "gpusampler")
    return lambda: [r.getMessage() for r in caplog.records if "groups 5000 ids" in r.getMessage()]


def test_nothing_is_logged_where_the_device_groups(log):
    groups_on_device(IDS)
    assert log() == []


def test_ids_on_the_device_or_for_the_host_are_as_before(log):
    assert PatchBatchSampler(torch.tensor(IDS), 8).plan.groups.grouped_on == DEVICE
    assert PatchBatchSampler(torch.tensor(IDS), 8, device="numpy").plan.groups.grouped_on == DEVICE
    assert PatchBatchSampler(IDS, 8).stats().grouped_on == "numpy"
    assert PatchBatchSampler(PatchGroups.from_ids(IDS), 8, device="cpu").stats().grouped_on == (
        "numpy"
    )
    assert PatchBatchSampler(PatchGroups.from_counts([3, 4]), 8).stats().grouped_on is None
    assert log() == []


# Keys of one byte take 4 * 1 + 24 bytes each, and the order 4.
PEAK = 32 * IDS.size


@pytest.mark.parametrize(
    ("free", "device", "reason"),
    [
        (PEAK * 10 // 8 + 1, DEVICE, None),
        (
            PEAK * 10 // 8,
            HOST,
            "sorting takes up to 156.2 KiB, not below 80% of the 195.3 KiB that",
        ),
        (None, HOST, "the free memory of cpu is unknown"),
    ],
)
def test_a_device_groups_only_what_fits(monkeypatch, log, free, device, reason):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "MIN_CHECKED_BYTES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = groups_on_device(IDS)
    assert groups.grouped_on == device
    check_host_groups(groups, IDS)
    assert len(log()) == (reason is not None)
    if reason is not None:
        assert log()[0].startswith(f"the host, not cpu, groups 5000 ids: {reason}")


@pytest.mark.parametrize(("factor", "size"), [(1, 1), (100, 2), (10**4, 4), (10**9, 8)])
def test_wide_keys_take_more(monkeypatch, factor, size):
    for free, device in (((4 * size + 28) * 6250 + 1, DEVICE), ((4 * size + 28) * 6250, HOST)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert groups_on_device(IDS * factor).grouped_on == device


def test_a_device_that_has_too_little_after_all(monkeypatch):
    def upload(array, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    original = arrays.upload
    monkeypatch.setattr(arrays, "upload", upload)
    with pytest.warns(UserWarning, match="not enough memory on cpu to sort 5000 ids"):
        sampler = PatchBatchSampler(IDS, 8, seed=0, device="cpu")
    monkeypatch.setattr(arrays, "upload", original)
    assert sampler.stats().grouped_on == "numpy"
    check_host_groups(sampler.plan.groups, IDS)
    assert isinstance(next(sampler.batches()).indices, torch.Tensor)


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "ids.npy", IDS)
    PatchGroups.from_ids(IDS).save(tmp_path / "ids.index")
    return tmp_path


def test_what_is_not_in_memory_stays_on_the_host(files, log):
    mapped = np.load(files / "ids.npy", mmap_mode="r")
    for source in (mapped, files / "ids.npy", [f"{i:03}" for i in IDS]):
        assert groups_on_device(source).grouped_on == HOST
    reason = "the host, not cpu, groups 5000 ids: they are not an array of integers in memory"
    assert log() == [reason] * 3
    assert groups_on_device(files / "ids.index").grouped_on is None


def test_more_samples_than_a_device_sorts(monkeypatch, log):
    monkeypatch.setattr(from_source, "INT32_SAMPLES", 5000)
    assert groups_on_device(IDS).grouped_on == HOST
    assert log() == ["the host, not cpu, groups 5000 ids: there are 2**31 or more"]
    assert groups_on_device(IDS[1:]).grouped_on == DEVICE


class TestAuto:
    """device="auto" for a dataset, where torch can use a GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(devices, "default_device", lambda: DEVICE)

    def test_no_context_is_created_that_nobody_asked_for(self, monkeypatch, log):
        monkeypatch.setattr(memory, "free_bytes", lambda device: pytest.fail("initializes CUDA"))
        sampler = PatchBatchSampler(Samples(IDS), 8)
        assert sampler.plan.device == DEVICE
        assert sampler.stats().grouped_on == "numpy"
        assert log() == [
            "the host, not cpu, groups 5000 ids: CUDA is not initialized in this process"
        ]

    def test_the_device_that_is_used_already_groups(self, monkeypatch, log):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        sampler = PatchBatchSampler(Samples(IDS), 8)
        assert sampler.stats().grouped_on == "cpu"
        assert log() == []
        # Ids in an array are evaluated where they are, so no device takes part.
        assert PatchBatchSampler(IDS, 8).stats().grouped_on == "numpy"


def test_a_worker_groups_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(devices, "is_in_worker", lambda: True)
    assert PatchBatchSampler(Samples(IDS), 8).stats().grouped_on == "numpy"
    with pytest.raises(RuntimeError, match="device must be 'numpy' or 'cpu' in a DataLoader worke"):
        groups_on_device(IDS)


def test_reading_and_uploading_are_timed_apart_from_grouping():
    recorder = Recorder()
    from_source.groups_of(IDS, DEVICE, recorder, progress=False)
    calls = {row.name: row.calls for row in recorder.ranges}
    # Opened, then read for the dtype, for the upload, and for the signature.
    assert (calls["load_ids"], calls["transfer"], calls["group"]) == (4, 1, 1)
