"""Damaged orders are errors, never wrong batches; blocks are verified once, when they are used."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader
from gpusampler.groups.index_format import ORDER_OFFSET
from gpusampler.groups.verified_order import AHEAD, BLOCK_BYTES, BlockVerifier, block_sums
from support import index_files
from support.index_files import IndexFile, flip
from support.paths import GOLDEN
from support.strategies import epoch_of

# Ten blocks; most patches are in one or two of them.
IDS = np.random.default_rng(0).integers(0, 40, 150_000)
ITEMS = BLOCK_BYTES // 4
NAMES = ["sand", "clay", "sand", "silt", "clay", "sand"]
DAMAGED = r"a\.index is damaged: wrong checksum of block {} of 10 of the order\. Delete it"
needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")

pytestmark = pytest.mark.usefixtures("host_form")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    PatchGroups.from_ids(IDS).save(tmp_path / "a.index")
    return tmp_path / "a.index"


def damage(path: Path, block: int) -> None:
    """Flip a bit of a block, so that its samples stay in the dataset."""
    flip(path, [(ORDER_OFFSET + block * BLOCK_BYTES + 2048, 0)])


def blocks_of(groups: PatchGroups) -> list[int]:
    """The blocks of a mapped order that are verified."""
    return np.flatnonzero(groups._order._verifier._is_verified).tolist()


# Checksums


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("size", [1, 2, 7, 8191, 8192, 8193, 16383, 16384, 16385, 50_000])
def test_checksums_are_those_of_the_definition(size, dtype):
    limit = 2**31 if dtype == "int32" else 2**62
    order = np.random.default_rng(size).integers(0, limit, size).astype(dtype)
    expected = index_files.block_sums(order.astype(f"<i{order.itemsize}").tobytes())
    assert block_sums(order).tolist() == expected
    assert block_sums(np.repeat(order, 2)[::2]).tolist() == expected
    BlockVerifier(Path("a"), block_sums(order), limit).verify_all(order)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_every_change_of_a_word_and_every_exchange_is_found(dtype):
    rng = np.random.default_rng(1)
    order = rng.permutation(20_000).astype(dtype)
    sums = block_sums(order)
    for _ in range(200):
        changed = order.copy()
        first, second = rng.choice(order.size, 2, replace=False)
        if rng.random() < 0.5:
            changed[first] ^= 1 << int(rng.integers(0, 8 * order.itemsize - 1))
        else:
            changed[[first, second]] = order[[second, first]]
        assert block_sums(changed).tolist() != sums.tolist()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_samples_are_compared_with_the_size_of_the_dataset(dtype):
    order = np.arange(40_000).astype(dtype)
    BlockVerifier(Path("a"), block_sums(order), 40_000).verify_all(order)
    for value in (40_000, -1, np.iinfo(dtype).max, np.iinfo(dtype).min):
        for at in (0, 8191, 20_000, 39_999):
            wrong = order.copy()
            wrong[at] = value
            with pytest.raises(ValueError, match=r"a is damaged: samples .* in 0 \.\. 39999"):
                BlockVerifier(Path("a"), block_sums(wrong), 40_000).verify_all(wrong)


@pytest.mark.parametrize("position", [40_000, -1, 2**62, -(2**63)])
def test_a_position_outside_the_order_is_an_error(position):
    order = np.arange(40_000)
    verifier = BlockVerifier(Path("a"), block_sums(order), 40_000)
    with pytest.raises(ValueError, match=r"a position is not in 0 \.\. 39999"):
        verifier.verify(order, np.array([5, position, 7]))


# First uses


def test_a_block_is_verified_when_it_is_first_used(tmp_path):
    ids = np.random.default_rng(0).integers(0, 40, 400_000)  # 25 blocks
    PatchGroups.from_ids(ids).save(tmp_path / "a")

    def used_by(patch: int) -> set[int]:
        start, count = int(groups.starts[patch]), int(groups.counts[patch])
        return set(range(start // ITEMS, (start + count - 1) // ITEMS + 1))

    groups = PatchGroups.load(tmp_path / "a")
    assert blocks_of(groups) == []
    np.testing.assert_array_equal(groups.samples_of(37), np.flatnonzero(ids == 37))
    first = used_by(37)
    assert set(blocks_of(groups)) == first
    # A later use verifies some in advance, but not more than were verified before it.
    new = used_by(20) - first
    left = [block for block in range(25) if block not in first | new]
    groups.samples_of(20)
    ahead = left[: min(AHEAD * len(new), len(first))]
    assert ahead
    assert set(blocks_of(groups)) == {*first, *new, *ahead}
    # As batches do.
    plan = EpochPlan(PatchGroups.load(tmp_path / "a"), 64, seed=0)
    patch = int(plan.evaluate(0, [7]).groups[0])
    assert blocks_of(plan.groups)
    assert set(blocks_of(plan.groups)) <= used_by(patch)
    # A few uses of new blocks verify all, in the order of the file.
    uses = 0
    while groups._needs_verification:
        uses += 1
        groups.samples_of(40 - uses)
    assert uses < 7


def test_an_order_that_another_thread_completes_stays_complete(monkeypatch):
    order = np.arange(200_000)
    verifier = BlockVerifier(Path("a"), block_sums(order), order.size)
    verify = verifier._verify

    def meanwhile(order, positions):
        num_new = verify(order, positions)
        verifier.is_complete = True
        return num_new

    monkeypatch.setattr(verifier, "_verify", meanwhile)
    verifier.verify(order, np.array([0]))
    assert verifier.is_complete


def test_after_an_epoch_nothing_is_verified(index, monkeypatch):
    groups = PatchGroups.load(index)
    sampler = PatchBatchSampler(groups, 64, seed=0)
    first = epoch_of(sampler, 0)
    assert first == epoch_of(PatchBatchSampler(IDS, 64, seed=0), 0)
    assert not groups._needs_verification
    monkeypatch.setattr(BlockVerifier, "verify", None)
    assert epoch_of(sampler, 0) == first


@pytest.mark.parametrize("block", [0, 4, 9])
@pytest.mark.parametrize("output", ["list", "numpy"])
@pytest.mark.parametrize("interleave", [True, False])
def test_a_damaged_order_is_an_error_and_never_a_wrong_batch(index, block, output, interleave):
    settings: dict[str, Any] = {"seed": 0, "output": output, "interleave": interleave}
    expected = list(PatchBatchSampler(IDS, 64, **settings))
    damage(index, block)
    sampler = PatchBatchSampler(PatchGroups.load(index), 64, **settings)
    for _ in range(2):
        batches = []
        with pytest.raises(ValueError, match=DAMAGED.format(block)):
            batches.extend(sampler)
        for batch, right in zip(batches, expected, strict=False):
            np.testing.assert_array_equal(batch, right)
        sampler.set_epoch(0)


def test_the_reproducer_of_one_flipped_bit(tmp_path):
    # Sample 16,777,221 of 100, in an epoch that was perfect; the loader took row 99 instead.
    ids = np.random.default_rng(0).integers(0, 5, 100)
    PatchGroups.from_ids(ids).save(tmp_path / "a")
    flip(tmp_path / "a", [(ORDER_OFFSET + 3, 0)])
    sampler = PatchBatchSampler(PatchGroups.load(tmp_path / "a"), 8, seed=0)
    for use in (lambda: list(sampler), lambda: list(PatchTensorLoader(sampler, x=np.arange(100)))):
        with pytest.raises(ValueError, match="a is damaged: wrong checksum of block 0 of 1"):
            use()


USES = {
    "order": lambda groups: groups.order,
    "save": lambda groups: groups.save(os.devnull),
    "select": lambda groups: groups.select(np.arange(10)),
    "split by patch": lambda groups: groups.split([0.5, 0.5]),
    "split by sample": lambda groups: groups.split([0.5, 0.5], by="sample"),
    "samples_of": lambda groups: [groups.samples_of(patch) for patch in range(40)],
    "evaluate": lambda groups: (
        lambda plan: plan.evaluate(0, np.arange(plan.num_batches))
    )(EpochPlan(groups, 64, seed=0)),
    "cost bins": lambda groups: EpochPlan(
        groups, CostBudget(400, sample_costs=IDS + 1, max_batch_size=64), seed=0
    ),
    "loader": lambda groups: list(
        PatchTensorLoader(PatchBatchSampler(groups, 64, seed=0), x=np.zeros((IDS.size, 2)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_damaged_order_is_an_error(index, tmp_path, use, monkeypatch):
    damage(index, 5)
    groups = PatchGroups.load(index)
    monkeypatch.setattr(os, "devnull", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=DAMAGED.format(5)):
        USES[use](groups)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [{"mmap": False}, {"verify": True}])
def test_an_order_that_is_read_now_is_verified_now(index, options):
    np.testing.assert_array_equal(
        PatchGroups.load(index, **options).order, np.argsort(IDS, kind="stable")
    )
    damage(index, 9)
    with pytest.raises(ValueError, match=DAMAGED.format(9)):
        PatchGroups.load(index, **options)


def test_patches_in_other_blocks_can_be_used(index):
    damage(index, 9)
    groups = PatchGroups.load(index)
    np.testing.assert_array_equal(groups.samples_of(0), np.flatnonzero(IDS == 0))
    with pytest.raises(ValueError, match=DAMAGED.format(9)):
        groups.samples_of(39)


def test_damaged_checksums_are_found_when_the_file_is_opened(index):
    end = ORDER_OFFSET + 4 * IDS.size + 24 * 40
    for at in (end, end + 41, end + 79):
        flip(index, [(at, 5)])
        with pytest.raises(ValueError, match="is damaged: wrong checksum of the tables"):
            PatchGroups.load(index)
        flip(index, [(at, 5)])
    PatchGroups.load(index, verify=True)


@needs_torch
@pytest.mark.usefixtures("cpu_as_device")
def test_the_whole_order_is_verified_before_it_is_uploaded(index):
    sampler = PatchBatchSampler(PatchGroups.load(index), 64, seed=0, device="cpu")
    iterator = iter(sampler)
    next(iterator)
    assert not sampler.plan.groups._needs_verification
    calls = {row.name: row.calls for row in sampler.stats().rows}
    assert (calls["load_ids"], calls["transfer"] >= 1) == (1, True)
    assert epoch_of(sampler, 1) == epoch_of(PatchBatchSampler(IDS, 64, seed=0), 1)
    calls = {row.name: row.calls for row in sampler.stats().rows}
    assert calls["load_ids"] == 1
    # The last block, which the first batches do not need.
    damage(index, 9)
    sampler = PatchBatchSampler(
        PatchGroups.load(index), 64, seed=0, device="cpu", interleave=False, shuffle_patches=False
    )
    with pytest.raises(ValueError, match=DAMAGED.format(9)):
        next(iter(sampler))
    import torch

    plan = EpochPlan(PatchGroups.load(index), 64, seed=0, device="cpu")
    with pytest.raises(ValueError, match=DAMAGED.format(9)):
        plan.batch(torch.tensor(0), torch.tensor(0))


def test_a_copy_in_another_process_verifies_for_itself(index):
    groups = PatchGroups.load(index)
    assert groups.order is not None
    copied = pickle.loads(pickle.dumps(groups))
    assert copied._needs_verification
    status = os.stat(index)
    damage(index, 3)
    os.utime(index, ns=(status.st_atime_ns, status.st_mtime_ns))
    copied = pickle.loads(pickle.dumps(groups))
    with pytest.raises(ValueError, match=DAMAGED.format(3)):
        list(PatchBatchSampler(copied, 64, seed=0))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_many_threads_share_an_order(index, is_damaged):
    expected = [epoch_of(PatchBatchSampler(IDS, 64, seed=seed), 0) for seed in range(4)]
    if is_damaged:
        damage(index, 6)
    groups = PatchGroups.load(index)
    results: list[Any] = [None] * 8
    barrier = threading.Barrier(len(results))

    def work(number: int) -> None:
        sampler = PatchBatchSampler(groups, 64, seed=number % 4)
        barrier.wait()
        try:
            results[number] = epoch_of(sampler, 0)
        except ValueError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(results):
        if is_damaged:
            assert isinstance(result, str)
            assert "wrong checksum of block 6" in result
        else:
            assert result == expected[number % 4]
    assert groups._needs_verification == is_damaged


# Version 1


@pytest.fixture
def old_index(tmp_path: Path) -> Path:
    shutil.copy(GOLDEN / "index_v1.index", tmp_path / "a.index")
    return tmp_path / "a.index"


@pytest.mark.parametrize("mmap", [True, False])
def test_an_index_of_version_1_is_read(old_index, tmp_path, mmap):
    expected = PatchGroups.from_ids(NAMES)
    groups = PatchGroups.load(old_index, source=NAMES, mmap=mmap)
    assert not groups._needs_verification
    assert groups.order.tolist() == expected.order.tolist()
    assert (groups.names, groups.fingerprint) == (expected.names, expected.fingerprint)
    assert list(PatchBatchSampler(groups, 2, seed=3)) == list(PatchBatchSampler(NAMES, 2, seed=3))
    pickled = pickle.loads(pickle.dumps(groups))
    assert pickled.order.tolist() == expected.order.tolist()
    opened = PatchGroups.from_ids(NAMES, path=old_index)
    assert opened.order.tolist() == expected.order.tolist()
    groups.save(tmp_path / "b")
    expected.save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert IndexFile(tmp_path / "b").head["version"] == 2


@pytest.mark.parametrize("mmap", [True, False])
def test_an_index_of_version_1_is_checked_as_a_whole(old_index, mmap):
    whole = old_index.read_bytes()
    used = len(whole.partition(b"}}")[0]) + 2
    for at in [*range(0, used, 7), *range(ORDER_OFFSET - 5, len(whole))]:
        old_index.write_bytes(whole)
        flip(old_index, [(at, at % 8)])
        with pytest.raises(ValueError, match=r"a\.index is (damaged|not an index file)"):
            PatchGroups.load(old_index, mmap=mmap)


# Random damage


KINDS = {
    "order": lambda: PatchGroups.from_ids(IDS[:500]),
    "names": lambda: PatchGroups.from_ids(NAMES),
    "runs": lambda: PatchGroups.from_counts([40, 7, 3]),
    "selected": lambda: PatchGroups.from_ids(IDS[:500]).select(np.arange(0, 500, 2)),
}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Return a file of other bytes: flipped bits, overwritten, inserted, lost or exchanged ones."""
    changed = bytearray(data)
    # Most of a small file is the padding of its header.
    ends = [(0, 800), (ORDER_OFFSET, len(data)), (0, len(data))]
    low, high = ends[rng.integers(3)]
    at, size = int(rng.integers(low, high)), int(rng.integers(1, 40))
    kind = rng.integers(6)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at : at + size] = rng.bytes(min(size, len(data) - at))
    elif kind == 2:
        changed[at:at] = rng.bytes(size)
    elif kind == 3:
        del changed[at : at + size]
    elif kind == 4:
        changed[at : at + size] = bytes(min(size, len(data) - at))
    else:
        changed = changed[:at]
    return bytes(changed)


def check_mutations(path: Path, kind: str, seed: int, count: int) -> None:
    """See that a changed file gives the right batches, or a ValueError with its name."""
    rng = np.random.default_rng(seed)
    groups = KINDS[kind]()
    expected = list(PatchBatchSampler(groups, 7, seed=0))
    groups.save(path)
    data = path.read_bytes()
    for _ in range(count):
        path.write_bytes(mutate(data, rng))
        try:
            loaded = PatchGroups.load(path, mmap=bool(rng.integers(2)))
            batches = list(PatchBatchSampler(loaded, 7, seed=0))
        except ValueError as error:
            text = str(error)
        else:
            text = ""
        if text:
            assert text.startswith(f"{path} is "), text
            continue
        assert batches == expected
        assert path.read_bytes() == data


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(tmp_path, kind):
    check_mutations(tmp_path / "a", kind, len(kind), 40)


@pytest.mark.battery("50,000 files of each kind")
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(tmp_path, kind):
    check_mutations(tmp_path / "a", kind, 1, 50_000)
