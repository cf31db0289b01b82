"""Groups in a file: what is loaded is what was saved, and anything else is refused."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader
from gpusampler.groups import index_format
from gpusampler.groups.index_format import MAGIC, ORDER_OFFSET
from gpusampler.groups.verification import BLOCK_IDS, NUM_BLOCKS
from gpusampler.sources.base import HostIds
from support.dataloaders import IDS, LOADERS, Rows, loader_of, rows_of
from support.processes import run_python
from support.strategies import draw, epoch_of, samples_by_patch, through_json

LONG = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 2_000))
NAMES = ["sand", "clay", "sand", "silt", "clay", "sand"]


def fake_long() -> PatchGroups:
    """Groups of few samples out of more than 2**31."""
    samples = np.array([1, 1 << 32, 7, (1 << 31) + 5, (1 << 40) + 1])
    tables = np.array([3, 9]), np.array([2, 3]), np.array([0, 2])
    return PatchGroups(*tables, samples, source_size=1 << 41)


KINDS = {
    "shuffled": lambda: PatchGroups.from_ids(IDS),
    "runs": lambda: PatchGroups.from_ids(np.repeat([7, -3, 5], [4, 60, 5])),
    "one sample": lambda: PatchGroups.from_ids([5]),
    "extremes": lambda: PatchGroups.from_ids([2**63 - 1, -(2**63), 2**63 - 1]),
    "names": lambda: PatchGroups.from_ids(NAMES),
    "names in runs": lambda: PatchGroups.from_ids(["ä", "ä", "", "z" * 1000]),
    "selected": lambda: PatchGroups.from_ids(IDS).select(np.arange(0, IDS.size, 3)),
    "selected runs": lambda: PatchGroups.from_ids(np.repeat([7, 5], 50)).select(range(20, 70)),
    "split by patch": lambda: PatchGroups.from_ids(IDS).split([0.5, 0.5])[1],
    "split by sample": lambda: PatchGroups.from_ids(IDS).split([0.5, 0.5], by="sample")[0],
    "counts": lambda: PatchGroups.from_counts([4, 0, 9], patch_ids=[8, 2, -1]),
    "named counts": lambda: PatchGroups.from_counts([4, 0, 9], patch_ids=["b", "c", "a"]),
    "huge counts": lambda: PatchGroups.from_counts([2**31 - 1] * 1000),
    "int64": fake_long,
}


def check_same(groups: PatchGroups, loaded: PatchGroups) -> None:
    for name in ("patch_ids", "counts", "starts", "labels"):
        np.testing.assert_array_equal(getattr(groups, name), getattr(loaded, name), name)
    for name in ("names", "source_size", "num_samples", "fingerprint", "is_contiguous", "nbytes"):
        assert getattr(groups, name) == getattr(loaded, name), name
    if groups.order is not None:
        assert loaded.order.dtype == groups.order.dtype
        np.testing.assert_array_equal(loaded.order, groups.order)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(tmp_path, kind, mmap):
    groups = KINDS[kind]()
    path = tmp_path / "an index"
    groups.save(path)
    assert os.listdir(tmp_path) == ["an index"]
    loaded = PatchGroups.load(path, mmap=mmap, verify=True)
    check_same(groups, loaded)
    assert repr(loaded) == repr(groups)
    # Once more, from what was loaded, over the very file that it is mapped from.
    loaded.save(str(path))
    check_same(groups, loaded)
    again = PatchGroups.load(str(path), mmap=mmap, verify=True)
    check_same(groups, again)
    if groups.num_samples < 1000:
        assert samples_by_patch(again) == samples_by_patch(groups)
        half = [0.5, 0.5]
        if groups.num_patches > 1:
            for part, other in zip(groups.split(half), again.split(half), strict=True):
                check_same(part, other)


def test_groups_on_a_device_are_saved_and_loaded_on_the_host(tmp_path, library, cpu_as_device):
    groups = PatchGroups.from_ids(library.array(IDS))
    groups.save(tmp_path / "a")
    loaded = PatchGroups.load(tmp_path / "a", source=library.array(IDS), verify=True)
    check_same(PatchGroups.from_ids(IDS), loaded)
    assert type(loaded.order) is np.ndarray


@pytest.fixture
def index(tmp_path: Path) -> Path:
    PatchGroups.from_ids(LONG).save(tmp_path / "a.index")
    return tmp_path / "a.index"


@pytest.fixture
def of_loader(tmp_path: Path) -> Path:
    PatchGroups.from_ids(IDS, path=tmp_path / "ids.index")
    return tmp_path / "ids.index"


# The same batches


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("device", ["numpy", "cpu"])
@pytest.mark.parametrize("interleave", [True, False])
def test_the_same_batches_from_a_file(of_loader, mmap, device, interleave):
    settings: dict[str, Any] = {"seed": 5, "device": device, "interleave": interleave}
    loaded = PatchGroups.load(of_loader, source=IDS, mmap=mmap)
    there, here = (PatchBatchSampler(source, 7, **settings) for source in (loaded, IDS))
    assert there.state_dict() == here.state_dict()
    assert epoch_of(there, 2) == epoch_of(here, 2)
    assert list(there) == list(here)
    slots = np.arange(here.plan.num_batches)
    for plan in (EpochPlan(loaded, 7, seed=5, device=device),):
        other = EpochPlan(PatchGroups.from_ids(IDS), 7, seed=5, device=device)
        for found, expected in zip(plan.evaluate(3, slots), other.evaluate(3, slots), strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_the_traceable_form_and_the_cursor(of_loader):
    torch = pytest.importorskip("torch")
    plans = [
        EpochPlan(source, 7, seed=5, device="cpu")
        for source in (PatchGroups.load(of_loader), PatchGroups.from_ids(IDS))
    ]
    for slot in range(plans[0].num_batches):
        one, other = (plan.batch(torch.tensor(1), torch.tensor(slot)) for plan in plans)
        for found, expected in zip(one, other, strict=True):
            assert found.tolist() == expected.tolist()
    from gpusampler.sampler.cursor import BatchCursor

    one, other = (BatchCursor(plan, epoch=1) for plan in plans)
    for _ in range(plans[0].num_batches + 3):
        for found, expected in zip(one(), other(), strict=True):
            assert found.tolist() == expected.tolist()


def test_the_tensor_loader(of_loader):
    torch = pytest.importorskip("torch")
    rows = torch.arange(IDS.size)
    passes = []
    for source in (PatchGroups.load(of_loader), IDS):
        loader = PatchTensorLoader(PatchBatchSampler(source, 7, seed=5, device="cpu"), rows=rows)
        passes.append([batch["rows"].tolist() for batch in loader])
    assert passes[0] == passes[1]


@pytest.mark.parametrize("between", [("loaded", "ids"), ("ids", "loaded")])
def test_a_state_goes_between_ids_and_index(of_loader, between):
    sources = {"loaded": PatchGroups.load(of_loader), "ids": IDS}
    first, second = (PatchBatchSampler(sources[kind], 4, seed=9) for kind in between)
    batches = iter(first)
    draw(batches, 5)
    second.load_state_dict(through_json(first.state_dict()))
    assert list(second) == list(batches)


# Travelling


@pytest.mark.parametrize("what", ["groups", "plan", "sampler"])
def test_a_mapped_order_travels_as_a_path(index, what):
    groups = PatchGroups.load(index)
    whole = {
        "groups": groups,
        "plan": EpochPlan(groups, 32, seed=1),
        "sampler": PatchBatchSampler(groups, 32, seed=1),
    }[what]
    pickled = pickle.dumps(whole)
    # Tables for 50 patches, and no order of 400,000 bytes.
    assert len(pickled) < 20_000
    for copied in (pickle.loads(pickled), copy.deepcopy(whole)):
        if what == "groups":
            check_same(groups, copied)
        elif what == "plan":
            assert copied.evaluate(0, [5]).indices.tolist() == [
                whole.evaluate(0, [5]).indices[0].tolist()
            ]
        else:
            assert epoch_of(copied, 1)[:50] == epoch_of(whole, 1)[:50]


def test_it_is_found_from_another_folder(index, monkeypatch):
    monkeypatch.chdir(index.parent)
    groups = PatchGroups.load(index.name)
    pickled = pickle.dumps(groups)
    monkeypatch.chdir("/")
    check_same(groups, pickle.loads(pickled))


def test_a_copy_does_not_need_the_files_name(index):
    groups = PatchGroups.load(index)
    os.unlink(index)
    check_same(groups, copy.deepcopy(groups))
    with pytest.raises(FileNotFoundError, match=r"a\.index"):
        pickle.loads(pickle.dumps(groups))


@pytest.mark.parametrize("change", ["shorter", "empty", "written", "replaced"])
def test_a_pickle_of_a_file_that_is_another_by_now(index, change):
    pickled = pickle.dumps(PatchGroups.load(index))
    change_file(index, change)
    with pytest.raises(OSError, match=r"a\.index changed while it was in use"):
        pickle.loads(pickled)


def change_file(path: Path, change: str) -> None:
    if change in ("shorter", "empty"):
        os.truncate(path, 0 if change == "empty" else ORDER_OFFSET)
    elif change == "written":
        with open(path, "r+b") as file:
            file.seek(ORDER_OFFSET)
            file.write(bytes(8))
        os.utime(path, ns=(0, 1))
    else:
        PatchGroups.from_ids(LONG[:-1]).save(path)


@pytest.mark.parametrize("kind", LOADERS)
def test_workers_of_a_loader(of_loader, kind):
    sampler = PatchBatchSampler(PatchGroups.load(of_loader), 6, seed=3)
    expected = epoch_of(PatchBatchSampler(IDS, 6, seed=3), 0)
    loader = loader_of(Rows(), sampler, **LOADERS[kind])
    worker = bool(LOADERS[kind].get("num_workers"))
    assert [rows_of(batch, worker) for batch in loader] == expected


def batches_of(sampler: PatchBatchSampler) -> list[list[int]]:
    return epoch_of(sampler, 1)


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow("a process that imports everything"))],
)
def test_other_processes_read_the_same_file(index, method):
    sampler = PatchBatchSampler(PatchGroups.load(index), 500, seed=3)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(batches_of, (sampler,)).get(60) == epoch_of(sampler, 1)


# Other ids


def changed(at: int) -> np.ndarray:
    ids = LONG.copy()
    ids[at] += 1
    return ids


BETWEEN = (LONG.size - BLOCK_IDS) // (NUM_BLOCKS - 1) + BLOCK_IDS + 5
assert LONG.size > 2 * NUM_BLOCKS * BLOCK_IDS


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("ids", "differs"),
    [
        (LONG[:-1], "the index has 100000 samples, the ids 99999"),
        (np.append(LONG, 1), "the index has 100000 samples, the ids 100001"),
        (LONG.astype(np.int32), "the index has dtype int64, the ids int32"),
        (LONG.astype(np.uint64), "the index has dtype int64, the ids uint64"),
        (changed(0), "values differ in block 0 of 64 compared blocks"),
        (changed(LONG.size - 1), "values differ in block 63 of 64 compared blocks"),
        (LONG[::-1], "values differ"),
        (LONG.astype(str).tolist(), "the index has dtype int64, the ids str"),
    ],
    ids=["shorter", "longer", "int32", "uint64", "first", "last", "backward", "names"],
)
def test_other_ids_are_refused(index, ids, differs, verify):
    text = f"source must match the index .*a.index: {differs}"
    with pytest.raises(ValueError, match=text):
        PatchGroups.load(index, source=ids, verify=verify)


def test_a_change_between_the_blocks_is_found_when_asked_for(index):
    check_same(PatchGroups.load(index), PatchGroups.load(index, source=changed(BETWEEN)))
    with pytest.raises(ValueError, match=r"must match the index .*a\.index: fingerprints differ"):
        PatchGroups.load(index, source=changed(BETWEEN), verify=True)


@pytest.mark.parametrize("size", [1, 255, 16_384, 16_385])
def test_every_block_is_compared(tmp_path, size):
    ids = np.arange(size) % 7
    PatchGroups.from_ids(ids).save(tmp_path / "a")
    PatchGroups.load(tmp_path / "a", source=ids)
    last = size - BLOCK_IDS
    starts = (
        [last * k // (NUM_BLOCKS - 1) for k in range(NUM_BLOCKS)] if size > 16_384 else range(size)
    )
    for at in [*list(starts)[::20], size - 1]:
        other = ids.copy()
        other[at] = 99
        with pytest.raises(ValueError, match=r"values differ in block"):
            PatchGroups.load(tmp_path / "a", source=other)


def test_a_touched_file_is_compared_as_a_whole(tmp_path):
    np.save(tmp_path / "ids.npy", LONG)
    source = str(tmp_path / "ids.npy")
    PatchGroups.from_ids(source).save(tmp_path / "a")
    for same in (source, np.load(source, mmap_mode="r"), LONG):
        PatchGroups.load(tmp_path / "a", source=same)
    os.utime(source, ns=(0, 1_600_000_000_000_000_007))
    text = (
        r"the file's modification time is 2020-09-13T12:26:40\.000000007, but was 20.* when the "
        r"index was built; PatchGroups.load"
    )
    with pytest.raises(ValueError, match=text):
        PatchGroups.load(tmp_path / "a", source=source)
    with pytest.raises(ValueError, match=text):
        PatchGroups.from_ids(source, path=tmp_path / "a")
    # Ids that lie in no file say nothing of the time of one.
    PatchGroups.load(tmp_path / "a", source=LONG, verify=True).save(tmp_path / "a")
    with pytest.raises(ValueError, match=text):
        PatchGroups.load(tmp_path / "a", source=source)
    # Once it was compared, the time that it has now can be noted.
    PatchGroups.load(tmp_path / "a", source=source, verify=True).save(tmp_path / "a")
    PatchGroups.load(tmp_path / "a", source=source)
    PatchGroups.from_ids(source, path=tmp_path / "a")
    np.save(source, changed(BETWEEN))
    with pytest.raises(ValueError, match="the file's modification time is"):
        PatchGroups.load(tmp_path / "a", source=source)
    with pytest.raises(ValueError, match="fingerprints differ"):
        PatchGroups.load(tmp_path / "a", source=source, verify=True)


@pytest.mark.parametrize("verify", [False, True])
def test_other_names_are_refused(tmp_path, verify):
    PatchGroups.from_ids(NAMES).save(tmp_path / "a")
    PatchGroups.load(tmp_path / "a", source=NAMES, verify=verify)
    # The same places among the names.
    other = [name.replace("clay", "chalk") for name in NAMES]
    with pytest.raises(ValueError, match="the patch names differ"):
        PatchGroups.load(tmp_path / "a", source=other, verify=verify)


def test_groups_of_no_ids_are_compared_as_a_whole(tmp_path):
    groups = PatchGroups.from_counts([2, 3], patch_ids=["b", "a"])
    groups.save(tmp_path / "a")
    source = ["b", "b", "a", "a", "a"]
    with pytest.raises(ValueError, match=r"does not record its source; pass verify=True"):
        PatchGroups.load(tmp_path / "a", source=source)
    check_same(groups, PatchGroups.load(tmp_path / "a", source=source, verify=True))
    for differs, other in {
        "the patch names differ": ["y", "y", "x", "x", "x"],
        "fingerprints differ": ["b", "a", "b", "a", "a"],
        "the index has 5 samples, the ids 4": source[:4],
    }.items():
        with pytest.raises(ValueError, match=f"must match the index .*: {differs}"):
            PatchGroups.load(tmp_path / "a", source=other, verify=True)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_selection_is_compared_with_the_dataset_it_is_of(tmp_path, contiguous):
    ids = np.sort(LONG) if contiguous else LONG
    kept = np.arange(500, 90_000) if contiguous else np.arange(0, ids.size, 2)
    groups = PatchGroups.from_ids(ids).select(kept)
    groups.save(tmp_path / "a")
    check_same(groups, PatchGroups.load(tmp_path / "a", source=ids, verify=True))
    other = ids.copy()
    # A sample that it does not hold.
    other[-1] = 7
    check_same(groups, PatchGroups.load(tmp_path / "a", source=other, verify=True))
    other[kept[70]] += 1
    with pytest.raises(ValueError, match="fingerprints differ"):
        PatchGroups.load(tmp_path / "a", source=other, verify=True)


# Other files, and damaged ones


def test_a_damaged_byte_anywhere_is_found(tmp_path):
    path = tmp_path / "a"
    groups = PatchGroups.from_ids(NAMES)
    groups.save(path)
    whole = path.read_bytes()
    used = 24 + struct.unpack_from("<I", whole, 16)[0]
    order_ends = ORDER_OFFSET + 4 * len(NAMES)
    for at in [*range(used), *range(used, ORDER_OFFSET, 99), *range(ORDER_OFFSET, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        verify = ORDER_OFFSET <= at < order_ends
        text = "not an index file|damaged: wrong checksum of the (header|tables)"
        text = "damaged: wrong checksum of block 0 of 1 of the order" if verify else text
        with pytest.raises(ValueError, match=f"a is ({text})"):
            PatchGroups.load(path, verify=verify)
    path.write_bytes(whole)
    check_same(groups, PatchGroups.load(path, verify=True))


@pytest.mark.parametrize("seed", range(8))
def test_samples_that_changed_places_in_the_order_are_found(index, seed):
    rng = np.random.default_rng(seed)
    order = np.memmap(index, "<i4", "r+", ORDER_OFFSET, LONG.shape)
    at = rng.choice(LONG.size, 2, replace=False)
    # Within a patch, across patches, and around the blocks in which it is read.
    first = [at[0], 65_535, 0, LONG.size - 2][seed % 4]
    second = first + 1 if seed < 4 else at[1]
    order[[first, second]] = order[[second, first]]
    order.flush()
    with pytest.raises(ValueError, match=r"is damaged: wrong checksum of block \d of 7"):
        PatchGroups.load(index, verify=True)


@pytest.mark.parametrize(
    "size", [0, 5, 16, 24, 100, ORDER_OFFSET - 1, ORDER_OFFSET, ORDER_OFFSET + 1, -1, -9]
)
def test_a_file_that_is_cut_off(index, size):
    whole = index.stat().st_size
    os.truncate(index, size % whole if size < 0 else size)
    with pytest.raises(ValueError, match=r"a\.index is (truncated|not an index file)"):
        PatchGroups.load(index)


def test_a_file_that_is_longer(index):
    size = index.stat().st_size
    with open(index, "ab") as file:
        file.write(b"!")
    with pytest.raises(
        ValueError, match=f"is truncated or damaged: expected {size} bytes, got {size + 1}. Delete"
    ):
        PatchGroups.load(index)


def test_a_file_of_another_version(index):
    data = bytearray(index.read_bytes())
    size = struct.unpack_from("<I", data, 16)[0]
    text = bytes(data[24 : 24 + size]).replace(b'"version": 2', b'"version": 7')
    struct.pack_into("<II", data, 16, size, zlib.crc32(text))
    data[24 : 24 + size] = text
    index.write_bytes(data)
    with pytest.raises(
        ValueError, match="must be an index of version 1 or 2, got version 7; rebuild"
    ):
        PatchGroups.load(index)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(100_000), MAGIC])
def test_another_file_is_neither_loaded_nor_written_over(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"notes (is not an index file|is truncated|exists and is not an index file)",
    ):
        PatchGroups.load(path)
    with pytest.raises(
        ValueError,
        match=r"notes (is not an index file|is truncated|exists and is not an index file)",
    ):
        PatchGroups.from_ids(LONG, path=path)
    if content != MAGIC:
        with pytest.raises(ValueError, match="notes exists and is not an index file"):
            PatchGroups.from_ids(LONG).save(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["notes"]


def test_a_folder_and_a_file_that_is_not_there(tmp_path):
    groups = PatchGroups.from_ids(LONG)
    with pytest.raises(FileNotFoundError, match="no index"):
        PatchGroups.load(tmp_path / "no index")
    (tmp_path / "file").touch()
    for use in (groups.save, PatchGroups.load, from_unreadable_ids):
        with pytest.raises(IsADirectoryError, match=r"path must be a file, got a folder: '.+'"):
            use(tmp_path)
        with pytest.raises(IsADirectoryError, match="path must be a file, got a folder: ''"):
            use("")
        with pytest.raises(FileNotFoundError, match=r"path must be in an existing .*no folder/a'"):
            use(tmp_path / "no folder" / "a")
        with pytest.raises(
            NotADirectoryError, match="path must be in a folder, but its parent is a file"
        ):
            use(tmp_path / "file" / "a")
        for none in (3, True, b"a", ["a"]):
            with pytest.raises(
                TypeError, match=rf"path must be a str or an .* got {re.escape(repr(none))}"
            ):
                use(none)
    assert os.listdir(tmp_path) == ["file"]


def from_unreadable_ids(path):
    """Where an index cannot be is told before ids are read."""

    class Unreadable:
        def get_all_patch_ids(self):
            raise AssertionError

        def __len__(self):
            return 3

        def __getitem__(self, i):
            raise AssertionError

    PatchGroups.from_ids(Unreadable(), path=path)


def test_a_column_of_no_source(index):
    with pytest.raises(ValueError, match="column must be None without a source, got 'x'"):
        PatchGroups.load(index, column="x")


def test_an_index_and_groups_are_no_ids(index):
    with pytest.raises(
        ValueError, match=r"got an index file: '.*'; open it with PatchGroups\.load"
    ):
        PatchGroups.from_ids(index)
    with pytest.raises(TypeError, match="got PatchGroups, which are already grouped; pass the"):
        PatchGroups.from_ids(PatchGroups.load(index))


# What is kept open


def open_now() -> tuple[int, int]:
    """Descriptors and maps of this process that are of index files."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    fds = [os.readlink(link) for link in links if os.path.islink(link)]
    maps = Path("/proc/self/maps").read_text()
    return sum("a.index" in name for name in fds), maps.count("a.index")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")
def test_no_descriptor_and_no_map_outlives_the_groups(index):
    assert open_now() == (0, 0)
    for _ in range(20):
        groups = PatchGroups.load(index, source=LONG, verify=True)
        copied = pickle.loads(pickle.dumps(groups))
        PatchGroups.load(index, mmap=False)
        PatchGroups.from_ids(LONG, path=index)
        copied.save(index)
        with pytest.raises(ValueError, match="must match the index"):
            PatchGroups.load(index, source=IDS)
        with pytest.raises(ValueError, match="indexes different ids"):
            PatchGroups.from_ids(IDS, path=index)
    part = groups.order[:5]
    assert part.tolist() == np.flatnonzero(LONG == 0)[:5].tolist()
    del groups, copied
    # The array holds the map, and nothing holds a descriptor of ours.
    assert open_now()[1] == 1
    assert part.tolist() == np.flatnonzero(LONG == 0)[:5].tolist()
    del part
    assert open_now() == (0, 0)
    os.truncate(index, 100)
    with pytest.raises(ValueError, match="is truncated"):
        PatchGroups.load(index)
    assert open_now() == (0, 0)


def test_it_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    # Windows renames no file that is open.
    replace, seen = os.replace, []

    def noted(source: Any, target: Any) -> None:
        fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        seen.append(str(source) in [os.readlink(fd) for fd in fds if os.path.islink(fd)])
        replace(source, target)

    monkeypatch.setattr(index_format.os, "replace", noted)
    PatchGroups.from_ids(LONG).save(tmp_path / "a")
    assert seen == [False]


@pytest.mark.parametrize("call", ["not there", "EOPNOTSUPP", "EINVAL", "ENOSYS"])
def test_a_filesystem_that_takes_no_room_beforehand(tmp_path, monkeypatch, call):
    def refuses(*_: Any) -> None:
        raise OSError(getattr(index_format.errno, call), "no")

    if call == "not there":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuses)
    groups = PatchGroups.from_ids(LONG)
    groups.save(tmp_path / "a")
    check_same(groups, PatchGroups.load(tmp_path / "a", source=LONG, verify=True))
    built = PatchGroups.from_ids(LONG, path=tmp_path / "b")
    check_same(groups, built)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_file_is_a_function_of_the_ids(tmp_path):
    for name in "ab":
        PatchGroups.from_ids(LONG).save(tmp_path / name)
    PatchGroups.from_ids(HostIds(LONG), path=tmp_path / "c")
    contents = {(tmp_path / name).read_bytes() for name in "abc"}
    assert len(contents) == 1
    assert io.BytesIO(contents.pop()).read(16) == MAGIC


def test_what_looks_at_no_sample_needs_no_file(index):
    sampler = PatchBatchSampler(PatchGroups.load(index), 8, seed=0)
    groups, before = sampler.plan.groups, sampler.stats().table_bytes
    size, text = groups.nbytes, repr(groups)
    os.truncate(index, ORDER_OFFSET + 8)
    with pytest.raises(OSError, match="changed while it was in use"):
        list(sampler)
    assert (groups.nbytes, repr(groups)) == (size, text)
    assert sampler.stats().table_bytes == before
    # What goes wrong in a profile is told as it is.
    with pytest.raises(KeyError, match="mine"), sampler.profile():
        raise KeyError("mine")


@pytest.mark.slow("a process that imports torch")
def test_nothing_is_said_when_the_program_ends_with_a_map(index):
    pytest.importorskip("torch")
    # What torch keeps lets modules go before the groups.
    code = "import sys, torch, gpusampler; groups = gpusampler.PatchGroups.load(sys.argv[1])"
    assert run_python("-c", code, index).stderr == ""
