"""Index files that somebody has made, with right checksums: each is a ValueError with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.groups import fingerprint
from support.index_files import IndexFile

IDS = np.random.default_rng(0).permutation(np.repeat([3, 5, 9], [400, 70, 30]))
NAMES = ["sand", "clay", "sand", "silt", "clay", "sand"]
MADE = {
    "order": lambda: PatchGroups.from_ids(IDS),
    "names": lambda: PatchGroups.from_ids(NAMES),
    "runs": lambda: PatchGroups.from_counts([40, 7, 3], patch_ids=[9, 3, 5]),
    "selected": lambda: PatchGroups.from_ids(IDS).select(np.arange(0, 500, 2)),
    "keys": lambda: PatchGroups.from_ids([(1, "a"), (2, "b"), (1, "a")]),
}

Change = Callable[[IndexFile], None]


def field(**fields: Any) -> Change:
    """A header that says something else."""
    return lambda file: file.lies.update(fields)


def signature(**fields: Any) -> Change:
    return lambda file: file.lies.update(signature={**file.head["signature"], **fields})


def table(name: str, *values: int) -> Change:
    """A table of other numbers."""

    def change(file: IndexFile) -> None:
        getattr(file, name)[: len(values)] = values

    return change


def names(value: Any) -> Change:
    def change(file: IndexFile) -> None:
        file.names = value if isinstance(value, bytes) else json.dumps(value).encode()

    return change


def without(name: str) -> Change:
    def change(file: IndexFile) -> None:
        del file.head[name]

    return change


def more_patches(file: IndexFile) -> None:
    """10**12 patches, whose tables would take 24 TB."""
    file.lies.update(num_patches=10**12, num_samples=10**13, source_size=10**13)
    file.lies.update(order_bytes=0, order=None, signature=None)
    file.order.clear()


ODD_VALUES = [-1, 0, 1.5, "3", None, True, [], {}, 2**63, 2**70, 10**400, float("nan")]
INTEGERS = ["num_patches", "num_samples", "source_size", "order_bytes", "fingerprint"]
HEADERS: list[tuple[str, Change, str]] = [
    *(("order", without(name), "the header must have the fields") for name in INTEGERS),
    *(("order", without(name), "the header must have the fields") for name in ("order", "named")),
    ("order", field(more=1), "the header must have the fields"),
    *(
        ("order", field(**{name: value}), f"{name} must be|order_bytes must be|num_samples must be")
        for name in INTEGERS
        for value in ODD_VALUES
        if not (name == "fingerprint" and value in (0, 2**63))
    ),
    *(
        ("order", field(version=value), "version must be in 1 .. 2")
        for value in ("1", None, True, 2.0)
    ),
    ("order", field(num_samples=499), "order_bytes must be 4 for each of 499 samples"),
    ("order", field(num_samples=501), "num_samples must be at most source_size"),
    ("order", field(source_size=499), "num_samples must be at most source_size"),
    (
        "order",
        field(source_size=501),
        "signature's size, num_samples and source_size must be equal",
    ),
    ("selected", field(source_size=2**32), "source_size must be at most 2\\*\\*31 for an order"),
    ("order", field(num_patches=501), "num_patches must be at most num_samples"),
    ("order", field(num_patches=2), "must have 56 bytes without names, got 80"),
    ("order", more_patches, "the tables of 1000000000000 patches must have 24000000000000 bytes"),
    ("order", field(order="<i8"), "order_bytes must be 8 for each"),
    ("order", field(order=None), "order_bytes must be 0 for each"),
    *(
        ("order", field(order=value), "order must be one of")
        for value in ("<f4", "<u4", ">i4", "O", "V72000000", "no", 4, ["<i4"], {"a": 1}, True)
    ),
    *(("order", field(named=value), "named must be true or false") for value in (0, None, "x")),
    ("order", field(named=True), "signature's names must be present"),
    ("names", field(named=False), "signature's names must be present"),
    ("order", field(signature=[]), "signature must be a JSON object"),
    ("order", field(signature={}), "signature must have the fields"),
    *(
        ("order", signature(blocks=value), "signature's blocks must be in 2")
        for value in (0, 1, -3, 2**40, "64", None)
    ),
    ("order", signature(hashes=[]), "signature's hashes must be 1 texts"),
    ("order", signature(hashes=[5]), "signature's hashes must be 1 texts"),
    ("order", signature(hashes=None), "signature's hashes must be 1 texts"),
    ("order", signature(dtype=None), "signature's dtype must be text"),
    ("order", signature(size=499), "signature's size, num_samples and source_size"),
    ("order", signature(modified=10**30), "signature's modified must be in"),
    ("order", signature(modified=1.5), "signature's modified must be in"),
    ("order", signature(names=5), "signature's names must be present"),
    ("names", signature(names=None), "signature's names must be present"),
]
TABLES: list[tuple[str, Change, str]] = [
    ("order", table("counts", 0, 470), r"counts must be in 1 \.\. 2\*\*31 - 1, got 0"),
    ("order", table("counts", -1, 471), "counts must be in 1"),
    ("order", table("counts", -(2**63)), f"counts must be in 1 .* got {-(2**63)}"),
    ("order", table("counts", 2**31), f"counts must be in 1 .* got {2**31}"),
    ("order", table("counts", 2**63 - 1), f"counts must be in 1 .* got {2**63 - 1}"),
    ("order", table("counts", 399), r"counts must add up to num_samples \(500\), got 499"),
    ("order", table("starts", 1), "starts must be the sums of the counts"),
    ("order", table("starts", 0, 2**62), "starts must be the sums of the counts"),
    ("order", table("counts", 399, 71), "starts must be the sums of the counts"),
    ("order", table("patch_ids", 5), "patch_ids must ascend"),
    ("order", table("patch_ids", 6), "patch_ids must ascend"),
    ("runs", table("starts", 40, 39), "runs must not overlap, got \\[39\\]"),
    ("runs", table("starts", 0, 0, 0), "runs must not overlap, got \\[0\\]"),
    ("runs", table("starts", -1), r"runs must be in 0 \.\. 49"),
    ("runs", table("starts", 41, 48, 1), r"runs must be in 0 \.\. 49"),
    ("runs", table("starts", 2**63 - 1), r"runs must be in 0 \.\. 49"),
    ("names", table("patch_ids", -1), r"patch_ids must be in 0 \.\. 2, as indices of the names"),
    ("names", table("patch_ids", 0, 1, 3), r"patch_ids must be in 0 \.\. 2, as indices"),
    ("names", names(["clay", "sand"]), r"patch_ids must be in 0 \.\. 1, as indices of the names"),
    ("names", names([]), "patch_ids must be in"),
    ("names", names(["clay", "silt", "sand"]), "names must be of one type and ascend"),
    ("names", names(["clay", "clay", "sand"]), "names must be of one type and ascend"),
    ("names", names([["a", 1], "b", "c"]), "names must be of one type and ascend"),
    ("names", names([["a", 1], ["b", "x"], [1, 2]]), "names must be of one type and ascend"),
    *(
        ("names", names(["clay", value, "silt"]), "names must be strings, or tuples")
        for value in (None, 5, True, {"a": 1}, [["x"]], [None])
    ),
    *(
        ("names", names(value), "names must be a JSON array")
        for value in (None, 5, {"a": 1}, "abc")
    ),
    ("names", names(b"[" * 200_000), "recursion|nested"),
    ("names", names(b"\xff\xfe\xff"), "decode|Expecting"),
    ("names", names(b'["clay"'), "Expecting"),
    ("names", names(b""), "Expecting"),
]
CASES = [*HEADERS, *TABLES]


def use(path: Path, **options: Any) -> None:
    """Do what looks at an index."""
    groups = PatchGroups.load(path, **options)
    list(PatchBatchSampler(groups, 7, seed=0))


def check_refused(path: Path, text: str) -> None:
    for options in ({}, {"mmap": False}, {"verify": True}):
        with pytest.raises(ValueError) as caught:
            use(path, **options)
        assert str(caught.value).startswith(f"{path} is damaged: "), caught.value
        assert len(str(caught.value)) < 2000
        caught.match(text)


@pytest.mark.parametrize("made", MADE)
def test_a_file_that_is_not_changed_is_the_one_that_was_saved(tmp_path, made):
    MADE[made]().save(tmp_path / "a")
    saved = (tmp_path / "a").read_bytes()
    # The checksums that the test computes are those of the package, too.
    IndexFile(tmp_path / "a").write()
    assert (tmp_path / "a").read_bytes() == saved


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_does_not_fit_is_refused(tmp_path, number):
    made, change, text = CASES[number]
    MADE[made]().save(tmp_path / "a")
    use(tmp_path / "a", verify=True)
    file = IndexFile(tmp_path / "a")
    change(file)
    file.write()
    check_refused(tmp_path / "a", text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 16_000, "recursion|nested"),
        (b'{"a":' * 3_000, "recursion|nested|Expecting"),
        (b"", "Expecting"),
        (b"null", "the header must be a JSON object"),
        (b"[]", "the header must be a JSON object"),
        (b"5", "the header must be a JSON object"),
        (b'{"version": 1}', "the header must have the fields"),
        (b'{"version": ' + b"9" * 5000 + b"}", "digits"),
        (b"\xff" * 40, "decode|Expecting"),
    ],
    ids=lambda value: value[:14].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_header_that_is_no_header(tmp_path, text, reason):
    MADE["order"]().save(tmp_path / "a")
    IndexFile(tmp_path / "a").write(text=text)
    check_refused(tmp_path / "a", reason)
    # Where an index is built, the header is read first.
    with pytest.raises(ValueError, match=r"a is damaged: "):
        PatchGroups.from_ids(IDS, path=tmp_path / "a")


@pytest.mark.parametrize("cut", [1, 8, 24, 80])
def test_tables_that_are_too_short(tmp_path, cut):
    MADE["order"]().save(tmp_path / "a")
    file = IndexFile(tmp_path / "a")
    file.write(tables=(file.tables.tobytes() + bytes(8))[:-cut])
    check_refused(tmp_path / "a", "the tables of 3 patches must have 80 bytes without names")


def test_tables_that_are_too_long(tmp_path):
    MADE["order"]().save(tmp_path / "a")
    file = IndexFile(tmp_path / "a")
    file.names = b"[]"
    file.write()
    check_refused(tmp_path / "a", "must have 80 bytes without names, got 82")


# Orders with right checksums, which only somebody who makes a file on purpose can write


def swap(file: IndexFile, first: int, second: int) -> None:
    file.samples[[first, second]] = file.samples[[second, first]]


ORDERS: dict[str, tuple[str, Change, str]] = {
    "beyond": ("order", lambda f: f.samples.__setitem__(3, 500), r"samples .* in 0 \.\. 499"),
    "negative": ("order", lambda f: f.samples.__setitem__(3, -1), r"samples .* in 0 \.\. 499"),
    "beyond a selection": (
        "selected",
        lambda f: f.samples.__setitem__(-1, 2**31 - 1),
        r"samples .* in 0 \.\. 499",
    ),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.usefixtures("host_form")
def test_samples_outside_the_dataset_are_never_in_a_batch(tmp_path, case):
    made, change, text = ORDERS[case]
    MADE[made]().save(tmp_path / "a")
    file = IndexFile(tmp_path / "a")
    change(file)
    file.write()
    check_refused(tmp_path / "a", text)


PROVEN: dict[str, tuple[str, Change, str]] = {
    "descending": ("order", lambda f: swap(f, 3, 4), "samples of a patch do not ascend"),
    "in another patch": ("order", lambda f: swap(f, 0, 499), "do not ascend|wrong fingerprint"),
    "twice": ("order", lambda f: f.samples.__setitem__(slice(470, None), f.samples[400:430]),
              "wrong fingerprint"),
    "another fingerprint": ("order", field(fingerprint=5), "wrong fingerprint of the order"),
    "runs of another one": ("runs", field(fingerprint=5), "wrong fingerprint of the order"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROVEN)
def test_verify_proves_the_order(tmp_path, case):
    made, change, text = PROVEN[case]
    MADE[made]().save(tmp_path / "a")
    file = IndexFile(tmp_path / "a")
    change(file)
    file.write()
    with pytest.raises(ValueError, match=rf"a is damaged: .*({text}).* Delete it"):
        PatchGroups.load(tmp_path / "a", verify=True)


@pytest.mark.parametrize("made", ["order", "selected"])
def test_a_sample_of_two_patches_is_found_under_a_right_fingerprint(tmp_path, made):
    MADE[made]().save(tmp_path / "a")
    file = IndexFile(tmp_path / "a")
    # The last patch has a sample of the first one; all samples of a patch ascend.
    samples = file.samples
    last = samples[int(file.starts[-1]) :]
    last[:] = np.sort(np.append(last[1:], samples[0]))
    file.lies["fingerprint"] = fingerprint.of_order(file.patch_ids, file.counts, samples)
    file.write()
    with pytest.raises(ValueError, match="a sample is twice in the order"):
        PatchGroups.load(tmp_path / "a", verify=True)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("sample", [-1, 500, 2**31 - 1])
def test_samples_outside_the_dataset_in_version_1(tmp_path, mmap, sample):
    MADE["selected"]().save(tmp_path / "a")
    file = IndexFile(tmp_path / "a")
    file.head["version"] = 1
    file.write()
    use(tmp_path / "a", mmap=mmap)
    # The first or the last of its patch, so that the samples ascend.
    file.samples[0 if sample < 0 else -1] = sample
    file.lies["fingerprint"] = fingerprint.of_order(file.patch_ids, file.counts, file.samples)
    file.write()
    with pytest.raises(ValueError, match=r"a is damaged: samples .* must be in 0 \.\. 499"):
        use(tmp_path / "a", mmap=mmap)
