"""GWPatchDataset, its windows, its collate function and Normalize."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gpusampler import PatchBatchSampler
from gpusampler.groundwater import COLUMNS, GWPatchDataset, Normalize, collate_fn
from gpusampler.groundwater.windows import Windows
from support.processes import run_python

STEPS = 20
SIZES = {10: (5, 2), 2: (3, 4), -7: (4, 0)}  # id: core points, ghost points


def write_patch(
    root: Path, patch_id: int | str, core: int, ghost: int, steps: int = STEPS, seed: int = 0
) -> Path:
    rng = np.random.default_rng([seed, core, ghost])
    folder = root / f"patch_{patch_id}"
    folder.mkdir(parents=True)
    for prefix, points in (("core", core), ("ghost", ghost)):
        np.save(folder / f"{prefix}_coords.npy", rng.uniform(0, 50, (points, 3)))
        obs = rng.normal([5.0, 100.0, 900.0], [1.0, 0.1, 30.0], (steps, points, 3))
        np.save(folder / f"{prefix}_obs.npy", obs.astype(np.float32))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for patch_id, (core, ghost) in SIZES.items():
        write_patch(tmp_path / "data", patch_id, core, ghost)
    return tmp_path / "data"


def same(first: dict, right: dict) -> bool:
    return list(first) == list(right) and all(
        torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        for key, value in first.items()
    )


# Windows


@given(
    steps=st.integers(0, 80),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 6),
    ratio=st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.9, 0.99]),
    gap=st.integers(0, 9),
    stride=st.none() | st.integers(1, 7),
)
def test_windows_keep_to_their_part(steps, inputs, outputs, ratio, gap, stride):
    windows_by_split = {
        split: Windows(steps, inputs, outputs, split, ratio, gap, stride)
        for split in ("train", "val", "all")
    }
    cut = windows_by_split["train"].cut
    assert abs(cut - (1 - ratio) * steps) < 1
    for split, (low, high) in {
        "train": (0, cut),
        "val": (cut + gap, steps),
        "all": (0, steps),
    }.items():
        windows = windows_by_split[split]
        starts = windows.starts()
        assert len(starts) == windows.count
        if len(starts) == 0:
            assert high - low < inputs + outputs
            continue
        assert starts[0] == low
        assert starts.min() >= low
        assert starts.max() + windows.length <= high
        # Not one window more would fit.
        assert starts.max() + windows.step + windows.length > high
        assert (np.diff(starts) == windows.step).all()


@given(
    steps=st.integers(12, 60), inputs=st.integers(1, 6), outputs=st.integers(1, 5), gap=st.just(0)
)
def test_every_step_is_an_output_once(steps, inputs, outputs, gap):
    windows = Windows(steps, inputs, outputs, "all")
    output_steps = (windows.starts()[:, None] + inputs + np.arange(outputs)).ravel()
    # All steps after the first input, but for the tail that no whole window reaches.
    assert output_steps.tolist() == list(range(inputs, inputs + windows.count * outputs))
    assert steps - (output_steps[-1] + 1) < outputs


def test_the_cut_survives_rounding():
    assert Windows(10, 1, 1, val_ratio=0.9).cut == 1  # 1 - 0.9 is 0.0999...
    assert Windows(60, 6, 1, val_ratio=0.2).cut == 48
    assert Windows(10, 1, 1, val_ratio=0.0).cut == 10


def test_training_is_the_same_whatever_the_gap(root):
    assert len(GWPatchDataset(root, 2, 1, gap=3)) == len(GWPatchDataset(root, 2, 1))
    without_gap = GWPatchDataset(root, 1, 1, split="val").windows
    with_gap = GWPatchDataset(root, 1, 1, split="val", gap=2).windows
    assert (without_gap.first, with_gap.first, with_gap.last) == (16, 18, 20)


# Samples


def test_samples_are_the_files_windows(root):
    dataset = GWPatchDataset(root, 4, 2, split="all")
    ids = dataset.get_all_patch_ids()
    assert ids.dtype == np.int64
    # As text: "patch_-7" < "patch_10" < "patch_2".
    assert ids.tolist() == np.repeat([-7, 10, 2], 8).tolist()
    assert dataset.get_all_patch_ids() is ids
    assert dataset.patch_ids is ids
    for index in range(len(dataset)):
        sample = dataset[index]
        start = index % 8 * 2
        folder = root / f"patch_{ids[index]}"
        assert sample["patch_id"] == ids[index]
        assert type(sample["patch_id"]) is int
        for prefix in ("core", "ghost"):
            obs = np.load(folder / f"{prefix}_obs.npy")
            assert np.array_equal(sample[f"{prefix}_in"], obs[start : start + 4])
            assert np.array_equal(sample[f"{prefix}_out"], obs[start + 4 : start + 6])
            coords = np.load(folder / f"{prefix}_coords.npy").astype(np.float32)
            assert np.array_equal(sample[f"{prefix}_coords"], coords)
        for key, value in sample.items():
            if key != "patch_id":
                assert value.dtype == torch.float32


def test_target_columns_by_name_and_position(root):
    everything = GWPatchDataset(root, 2, 1)
    assert everything.columns == COLUMNS == ("mass_concentration", "head", "pressure")
    assert everything.target_columns == COLUMNS
    for targets in (["pressure", "head"], [2, 1], ("pressure", np.int64(1))):
        dataset = GWPatchDataset(root, 2, 1, target_columns=targets)
        assert dataset.target_columns == ("pressure", "head")
        assert torch.equal(dataset[3]["core_out"], everything[3]["core_out"][..., [2, 1]])
        assert torch.equal(dataset[3]["ghost_out"], everything[3]["ghost_out"][..., [2, 1]])
        assert torch.equal(dataset[3]["core_in"], everything[3]["core_in"])
    assert GWPatchDataset(root, 2, 1, target_columns="head").target_columns == ("head",)
    assert GWPatchDataset(root, 2, 1, target_columns=0).target_columns == COLUMNS[:1]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_getitems_equals_getitem(root, kind):
    dataset = GWPatchDataset(root, 3, 1)
    indices = [5, -1, 0, 30, 5, 17]
    many = dataset.__getitems__(kind(indices))
    assert len(many) == len(indices)
    assert all(same(sample, dataset[i]) for sample, i in zip(many, indices, strict=True))
    assert dataset.__getitems__(kind([])) == []


def test_samples_are_writable_and_share_nothing(root):
    dataset = GWPatchDataset(root, 3, 1)
    untouched = dataset.__getitems__([0, 1])
    first, second = dataset.__getitems__([0, 1])
    for key, value in first.items():
        if key != "patch_id":
            value.fill_(-1.0)
    assert same(second, untouched[1])
    assert same(dataset[0], untouched[0])


def test_each_patch_is_mapped_once_for_a_batch(root, monkeypatch):
    dataset = GWPatchDataset(root, 3, 1, max_open_patches=1)
    opened: list[Path] = []
    from gpusampler.groundwater import folder

    plain = folder._open_array
    monkeypatch.setattr(folder, "_open_array", lambda path: opened.append(path) or plain(path))
    dataset.__getitems__([0, 20, 1, 21, 2])
    assert len(opened) == 2 * 4
    dataset.__getitems__([0])
    assert len(opened) == 3 * 4  # one patch stays open at a time, and 0 had gone


def test_an_origin_saves_precision(tmp_path):
    folder = write_patch(tmp_path, 0, 4, 0)
    coords = np.array([5e6, 7e5, 10.0]) + np.arange(12).reshape(4, 3) / 8
    np.save(folder / "core_coords.npy", coords)
    exact = GWPatchDataset(tmp_path, 2, 1, origin=(5e6, 7e5, 0))[0]["core_coords"]
    assert np.array_equal(exact, coords - [5e6, 7e5, 0])


def test_counts_of_points_and_bytes(root):
    dataset = GWPatchDataset(root, 2, 1)
    assert dataset.patch_costs() == {-7: 4, 10: 7, 2: 7}
    assert dataset.num_points == 18
    data = sum(np.load(path).nbytes for path in root.rglob("*.npy"))
    assert dataset.nbytes == data


def test_hidden_and_foreign_entries_are_passed_over(root):
    (root / ".DS_Store").write_text("x")
    shutil.copytree(root / "patch_2", root / ".patch_3")
    (root / "provenance.json").write_text("{}")
    (root / "notes").mkdir()
    (root / "patch_9").write_text("a file")
    assert len(GWPatchDataset(root, 2, 1).patches) == 3


def test_index_errors(root):
    dataset = GWPatchDataset(root, 3, 1)
    size = len(dataset)
    for index in (size, -size - 1):
        with pytest.raises(
            IndexError, match=rf"index must be in \[{-size}, {size}\), got {index}$"
        ):
            dataset[index]
    with pytest.raises(TypeError, match="indices must be integers, got dtype float64"):
        dataset.__getitems__(np.array([0.0]))
    with pytest.raises(TypeError, match="indices must be integers, got dtype bool"):
        dataset.__getitems__([True])
    with pytest.raises(TypeError, match=r"indices must be one-dimensional, got shape \(1, 2\)"):
        dataset.__getitems__([[0, 1]])
    with pytest.raises(
        KeyError, match=r"patch_id must be one of the ids in dataset\.patch_ids, got 3"
    ):
        dataset.arrays(3)


# Processes and threads


def test_pickle_drops_maps_and_gives_equal_samples(root):
    dataset = GWPatchDataset(
        root, 3, 1, transform=Normalize.from_dataset(GWPatchDataset(root, 3, 1))
    )
    before = [dataset[i] for i in range(len(dataset))]
    data = pickle.dumps(dataset)
    assert len(data) < 4000
    copied = pickle.loads(data)
    assert len(copied) == len(before)
    assert all(same(copied[i], sample) for i, sample in enumerate(before))
    assert np.array_equal(copied.patch_ids, dataset.patch_ids)


def test_threads_may_share_it(root):
    dataset = GWPatchDataset(root, 3, 1, max_open_patches=1)
    expected = [dataset[i] for i in range(len(dataset))]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(dataset)).tolist():
            if not same(dataset[i], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Python 3.12 and later warn of every fork beside a thread, and torch has threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("workers", "start"),
    [
        (0, None),
        (2, "fork"),
        pytest.param(2, "spawn", marks=pytest.mark.slow("spawned workers import torch anew")),
    ],
)
def test_loader_with_the_sampler(root, workers, start):
    dataset = GWPatchDataset(root, 3, 1)
    sampler = PatchBatchSampler(dataset, 4, seed=1)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate_fn,
        num_workers=workers,
        multiprocessing_context=start,
    )
    planned = [
        (int(dataset.patch_ids[rows[0]]), rows) for rows in PatchBatchSampler(dataset, 4, seed=1)
    ]
    batches = list(loader)
    assert [batch["patch_id"] for batch in batches] == [patch for patch, _ in planned]
    for batch, (_, rows) in zip(batches, planned, strict=True):
        assert same(batch, collate_fn([dataset[i] for i in rows]))


def test_importing_it_does_not_import_torch():
    code = "import sys, gpusampler.groundwater; print('torch' in sys.modules)"
    assert run_python("-c", code).stdout.strip() == "False"


# Collating


def test_collate_gives_the_cloud_once(root):
    dataset = GWPatchDataset(root, 3, 1)
    batch = collate_fn([dataset[0], dataset[1], dataset[2]])
    assert batch["patch_id"] == -7
    assert batch["core_in"].shape == (3, 3, 4, 3)
    assert batch["core_out"].shape == (3, 1, 4, 3)
    assert batch["core_coords"].shape == (1, 4, 3)
    assert batch["ghost_coords"].shape == (1, 0, 3)
    assert torch.equal(batch["core_in"][1], dataset[1]["core_in"])


def test_collate_carries_what_a_transform_added(root):
    samples = [
        {**GWPatchDataset(root, 3, 1)[i], "weight": torch.tensor(float(i)), "name": str(i)}
        for i in range(2)
    ]
    batch = collate_fn(samples)
    assert batch["weight"].tolist() == [0.0, 1.0]
    assert batch["name"] == ["0", "1"]


def test_collate_refuses_a_mixed_batch(root):
    dataset = GWPatchDataset(root, 3, 1)
    text = "a batch must hold samples of one patch, got patches -7, 2, 10; use batch_sampler="
    with pytest.raises(ValueError, match=text):
        collate_fn([dataset[0], dataset[-1], dataset[20]])
    with pytest.raises(ValueError, match="samples must hold at least one sample, got 0"):
        collate_fn([])


def test_collate_refuses_points_that_differ(root):
    first, second = GWPatchDataset(root, 3, 1).__getitems__([0, 1])
    second["core_coords"][0, 0] += 1
    with pytest.raises(
        ValueError, match="core_coords must be the same in every sample of patch -7"
    ):
        collate_fn([first, second])


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"input_window_size": 0}, ValueError, "input_window_size must be >= 1, got 0"),
        ({"output_window_size": -1}, ValueError, "output_window_size must be >= 1, got -1"),
        ({"input_window_size": True}, TypeError, "input_window_size must be an int, got True"),
        ({"output_window_size": 1.0}, TypeError, "output_window_size must be an int, got 1.0"),
        ({"split": "test"}, ValueError, "split must be one of 'train', 'val', 'all', got 'test'"),
        ({"val_ratio": 1.0}, ValueError, r"val_ratio must be in \[0, 1\), got 1.0"),
        ({"val_ratio": -0.1}, ValueError, r"val_ratio must be in \[0, 1\), got -0.1"),
        ({"val_ratio": float("nan")}, ValueError, r"val_ratio must be in \[0, 1\), got nan"),
        ({"val_ratio": False}, TypeError, "val_ratio must be a number, got False"),
        ({"val_ratio": "0.2"}, TypeError, "val_ratio must be a number, got '0.2'"),
        ({"gap": -1}, ValueError, "gap must be >= 0, got -1"),
        ({"gap": True}, TypeError, "gap must be an int, got True"),
        ({"stride": 0}, ValueError, "stride must be >= 1, got 0"),
        ({"stride": False}, TypeError, "stride must be an int, got False"),
        (
            {"target_columns": ["heat"]},
            ValueError,
            "target_columns must be among mass_concentration, head, pressure, got 'heat'",
        ),
        ({"target_columns": 3}, ValueError, "target_columns must be < 3, got 3"),
        ({"target_columns": -1}, ValueError, "target_columns must be >= 0, got -1"),
        ({"target_columns": [1.5]}, TypeError, "target_columns must be an int, got 1.5"),
        ({"target_columns": True}, TypeError, "target_columns must be an int, got True"),
        (
            {"target_columns": ["head", 1]},
            ValueError,
            "target_columns must name at least one column",
        ),
        ({"target_columns": []}, ValueError, "target_columns must name at least one column"),
        ({"transform": 3}, TypeError, "transform must be callable or None, got 3"),
        ({"columns": "head"}, TypeError, "columns must be a sequence of names, got 'head'"),
        ({"columns": ["a", "a", "b"]}, ValueError, "^columns must name at least one column"),
        ({"origin": (0, 0)}, ValueError, r"origin must be three finite numbers, got \(0, 0\)"),
        ({"max_open_patches": 0}, ValueError, "max_open_patches must be >= 1, got 0"),
    ],
)
def test_bad_arguments(root, kwargs, error, text):
    arguments = {"input_window_size": 2, "output_window_size": 1, **kwargs}
    with pytest.raises(error, match=text):
        GWPatchDataset(root, **arguments)


# Broken folders: every error names the patch and the file.


def _replace(name: str, array: np.ndarray):
    def change(folder: Path) -> None:
        np.save(folder / f"{name}.npy", array)

    return change


def _corrupt(text: bytes):
    def change(folder: Path) -> None:
        (folder / "core_obs.npy").write_bytes(text)

    return change


def _truncate(folder: Path) -> None:
    data = (folder / "ghost_obs.npy").read_bytes()
    (folder / "ghost_obs.npy").write_bytes(data[:-40])


BROKEN = {
    "missing": (
        lambda folder: (folder / "ghost_obs.npy").unlink(),
        FileNotFoundError,
        "patch_10/ghost_obs.npy is missing",
    ),
    "unequal T": (
        _replace("ghost_obs", np.zeros((STEPS - 1, 2, 3))),
        ValueError,
        "patch_10/ghost_obs.npy must have the 20 time steps of core_obs.npy, got 19",
    ),
    "columns": (
        _replace("core_obs", np.zeros((STEPS, 5, 4))),
        ValueError,
        r"patch_10/core_obs.npy must have 3 columns \(mass_concentration, head, pressure\), got 4",
    ),
    "ghost columns": (
        _replace("ghost_obs", np.zeros((STEPS, 2, 2))),
        ValueError,
        "patch_10/ghost_obs.npy must have 3 columns .* got 2",
    ),
    "obs ndim": (
        _replace("core_obs", np.zeros((STEPS, 5))),
        ValueError,
        r"patch_10/core_obs.npy must have shape \[time steps, points, columns\], got \[20, 5\]",
    ),
    "coords width": (
        _replace("core_coords", np.zeros((5, 2))),
        ValueError,
        r"patch_10/core_coords.npy must have shape \[points, 3\], got \[5, 2\]",
    ),
    "coords ndim": (
        _replace("ghost_coords", np.zeros(6)),
        ValueError,
        r"patch_10/ghost_coords.npy must have shape \[points, 3\], got \[6\]",
    ),
    "points": (
        _replace("core_coords", np.zeros((6, 3))),
        ValueError,
        "patch_10/core_obs.npy must have the 6 points of core_coords.npy, got 5",
    ),
    "ghost points": (
        _replace("ghost_coords", np.zeros((1, 3))),
        ValueError,
        "patch_10/ghost_obs.npy must have the 1 points of ghost_coords.npy, got 2",
    ),
    "text": (
        _replace("core_coords", np.full((5, 3), "1")),
        ValueError,
        "patch_10/core_coords.npy must hold real numbers, got dtype <U1",
    ),
    "bool": (
        _replace("core_obs", np.zeros((STEPS, 5, 3), dtype=bool)),
        ValueError,
        "patch_10/core_obs.npy must hold real numbers, got dtype bool",
    ),
    "complex": (
        _replace("core_obs", np.zeros((STEPS, 5, 3), dtype=complex)),
        ValueError,
        "patch_10/core_obs.npy must hold real numbers, got dtype complex128",
    ),
    "objects": (
        _replace("core_obs", np.full((STEPS, 5, 3), None)),
        ValueError,
        "patch_10/core_obs.npy cannot be mapped as a .npy array: .*objects",
    ),
    "no npy": (_corrupt(b"PK\x03\x04 not an array"), ValueError, "patch_10/core_obs.npy cannot be"),
    "empty file": (_corrupt(b""), ValueError, "patch_10/core_obs.npy cannot be mapped"),
    "bad header": (
        _corrupt(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((( \n"),
        ValueError,
        "patch_10/core_obs.npy cannot be mapped",
    ),
    "truncated": (
        _truncate,
        ValueError,
        r"patch_10/ghost_obs.npy cannot be mapped .* it must have \d+ bytes, got",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_patch(root, case):
    change, error, text = BROKEN[case]
    change(root / "patch_10")
    with pytest.raises(error, match=text):
        GWPatchDataset(root, 2, 1)


def test_files_in_fortran_order(root):
    expected = GWPatchDataset(root, 2, 1)[-1]["core_in"]
    for path in root.glob("patch_*/*_obs.npy"):
        np.save(path, np.asfortranarray(np.load(path)))
    assert torch.equal(GWPatchDataset(root, 2, 1)[-1]["core_in"], expected)


def test_patches_of_unequal_length(root):
    shutil.rmtree(root / "patch_10")
    write_patch(root, 10, 5, 2, steps=STEPS + 1)
    text = "patch_10/core_obs.npy must have the 20 time steps of patch_-7/core_obs.npy, got 21"
    with pytest.raises(ValueError, match=text):
        GWPatchDataset(root, 2, 1)


def test_a_patch_without_core_points(tmp_path):
    write_patch(tmp_path, 0, 0, 2)
    with pytest.raises(ValueError, match=r"patch_0/core_coords.npy must have at least one point"):
        GWPatchDataset(tmp_path, 2, 1)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"input_window_size": 16},
            r"split 'train' has 16 of the .*, but a window needs 17: change val_ratio or gap",
        ),
        (
            {"split": "val", "gap": 2},
            r"split 'val' has 2 of the 20 time steps in patch_-7/.*, but a window needs 3:",
        ),
        ({"split": "val", "gap": 99}, r"split 'val' has 0 of .* a window needs 3:"),
        ({"split": "val", "val_ratio": 0.0}, r"split 'val' has 0 of .* a window needs 3:"),
        ({"split": "all", "input_window_size": 20}, r"split 'all' has 20 of .* a window needs 21:"),
    ],
)
def test_series_shorter_than_a_window(root, kwargs, text):
    with pytest.raises(ValueError, match=text):
        GWPatchDataset(root, **{"input_window_size": 2, "output_window_size": 1, **kwargs})


@pytest.mark.parametrize(
    "name", ["patch_x", "patch_", "patch_1_0", "patch_1.5", "patch_²", f"patch_{2**63}"]
)
def test_patch_ids_must_be_integers(root, name):
    shutil.copytree(root / "patch_2", root / name)
    with pytest.raises(ValueError, match=f"name must be an int64, got '{name}'"):
        GWPatchDataset(root, 2, 1)


def test_patch_ids_must_differ(root):
    shutil.copytree(root / "patch_2", root / "patch_02")
    with pytest.raises(
        ValueError, match="patch ids must be unique, got 2 from 'patch_02' and 'patch_2'"
    ):
        GWPatchDataset(root, 2, 1)


def test_no_folder_and_no_patches(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"root must be an existing folder .*, got .*nowhere"
    ):
        GWPatchDataset(tmp_path / "nowhere", 2, 1)
    with pytest.raises(ValueError, match="root must have folders patch_<id>, got none in"):
        GWPatchDataset(tmp_path, 2, 1)


def test_files_that_change_later_are_noticed(root):
    dataset = GWPatchDataset(root, 2, 1)
    np.save(root / "patch_-7" / "core_obs.npy", np.zeros((STEPS, 9, 3)))
    with pytest.raises(ValueError, match="patch_-7 changed on disk since the dataset was made"):
        dataset[0]


# Normalize


def test_statistics_are_those_of_the_training_part(root, monkeypatch):
    from gpusampler.groundwater import statistics

    monkeypatch.setattr(statistics, "_BLOCK_VALUES", 40)  # several blocks a patch
    for split in ("train", "val", "all"):
        normalize = Normalize.from_dataset(GWPatchDataset(root, 2, 1, split=split))
        values = np.concatenate(
            [
                np.load(path)[:16].astype(np.float64).reshape(-1, 3)
                for path in sorted(root.rglob("core_obs.npy"))
            ]
        )
        np.testing.assert_allclose(normalize.mean, values.mean(0), rtol=1e-13)
        np.testing.assert_allclose(normalize.std, values.std(0), rtol=1e-12)
        points = np.concatenate([np.load(path) for path in root.rglob("*_coords.npy")])
        assert np.array_equal(normalize.low, points.min(0))
        assert np.array_equal(normalize.high, points.max(0))


@settings(deadline=None, max_examples=25)
@given(offset=st.floats(-1e6, 1e6), scale=st.floats(1e-3, 1e3), block=st.integers(1, 200))
def test_streaming_equals_numpy(tmp_path_factory, offset, scale, block):
    from gpusampler.groundwater import statistics

    root = tmp_path_factory.mktemp("stream")
    folder = write_patch(root, 0, 7, 1)
    obs = offset + scale * np.random.default_rng(0).normal(size=(STEPS, 7, 3))
    np.save(folder / "core_obs.npy", obs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_BLOCK_VALUES", block)
        normalize = Normalize.from_dataset(GWPatchDataset(root, 2, 1))
    train = obs[:16].reshape(-1, 3)
    tolerance = 1e-12 * (abs(offset) + scale)
    np.testing.assert_allclose(normalize.mean, train.mean(0), rtol=0, atol=tolerance)
    np.testing.assert_allclose(normalize.std, train.std(0), rtol=1e-6, atol=tolerance)


def test_validation_values_play_no_part(root):
    before = Normalize.from_dataset(GWPatchDataset(root, 2, 1))
    path = root / "patch_2" / "core_obs.npy"
    obs = np.load(path)
    obs[16:] = 1e9
    np.save(path, obs)
    assert Normalize.from_dataset(GWPatchDataset(root, 2, 1)) == before


def test_scaled_samples_have_mean_0_and_std_1(root):
    plain = GWPatchDataset(root, 1, 1)
    dataset = GWPatchDataset(root, 1, 1, transform=Normalize.from_dataset(plain))
    outputs = torch.cat([dataset[i]["core_out"].reshape(-1, 3) for i in range(len(dataset))])
    assert torch.allclose(outputs.mean(0), torch.zeros(3), atol=0.1)
    assert torch.allclose(outputs.std(0), torch.ones(3), atol=0.1)


@pytest.mark.parametrize("targets", [None, ["pressure"], ["pressure", "mass_concentration"]])
def test_inverse_gives_the_units_back(root, targets):
    plain = GWPatchDataset(root, 2, 1, target_columns=targets)
    normalize = Normalize.from_dataset(plain)
    for index in range(len(plain)):
        sample = plain[index]
        scaled = normalize(sample)
        for key, columns in (("core_in", COLUMNS), ("core_out", None), ("ghost_out", None)):
            back = normalize.inverse(scaled[key], columns)
            assert torch.allclose(back, sample[key], rtol=1e-6, atol=1e-5)
    head = normalize.inverse(normalize(sample)["core_in"][..., 1:2], "head")
    assert torch.allclose(head, sample["core_in"][..., 1:2], rtol=1e-6)


def test_normalize_leaves_the_sample_alone(root):
    dataset = GWPatchDataset(root, 2, 1)
    normalize, sample = Normalize.from_dataset(dataset), dataset[0]
    scaled = normalize(sample)
    assert same(sample, dataset[0])
    assert list(scaled) == list(sample)


def test_patch_coordinates_fill_the_cube(root):
    dataset = GWPatchDataset(root, 2, 1)
    dataset.transform = Normalize.from_dataset(dataset)
    for index in (0, 20, -1):
        sample = dataset[index]
        points = torch.cat([sample["core_coords"], sample["ghost_coords"]])
        assert torch.equal(points.amin(0), torch.zeros(3))
        assert torch.equal(points.amax(0), torch.ones(3))


def test_domain_coordinates_keep_their_place(root):
    plain = GWPatchDataset(root, 2, 1, origin=(1.0, 2.0, 3.0))
    dataset = GWPatchDataset(root, 2, 1, origin=(1.0, 2.0, 3.0))
    dataset.transform = Normalize.from_dataset(plain, coords="domain")
    low, high = np.array(dataset.transform.low), np.array(dataset.transform.high)
    clouds = []
    for index in (0, 20, -1):
        for key in ("core_coords", "ghost_coords"):
            raw, scaled = plain[index][key].double().numpy(), dataset[index][key]
            np.testing.assert_allclose(scaled, (raw - low) / (high - low), atol=1e-6)
            clouds.append(scaled)
    points = torch.cat(clouds)
    assert points.min() == 0
    assert points.max() == 1


def test_flat_axes_and_constant_columns(tmp_path):
    folder = write_patch(tmp_path, 0, 4, 3)
    coords = np.load(folder / "core_coords.npy")
    coords[:, 2] = 7.0
    np.save(folder / "core_coords.npy", coords)
    ghost = np.load(folder / "ghost_coords.npy")
    ghost[:, 2] = 7.0
    np.save(folder / "ghost_coords.npy", ghost)
    obs = np.load(folder / "core_obs.npy")
    obs = obs.astype(np.float64)
    obs[..., 0] = 0.1  # no binary fraction: its mean is off by a rounding
    assert obs[:16, :, 0].std() != 0
    np.save(folder / "core_obs.npy", obs)
    for coords_of in ("patch", "domain"):
        dataset = GWPatchDataset(tmp_path, 2, 1)
        dataset.transform = Normalize.from_dataset(dataset, coords=coords_of)
        assert dataset.transform.std[0] == 1.0
        sample = dataset[0]
        assert torch.equal(sample["core_coords"][:, 2], torch.full((4,), 0.5))
        assert sample["core_in"][..., 0].abs().max() < 1e-6
        assert all(value.isfinite().all() for k, value in sample.items() if k != "patch_id")


def test_normalize_survives_json_and_pickle(root):
    normalize = Normalize.from_dataset(GWPatchDataset(root, 2, 1, target_columns="head"), "domain")
    assert Normalize.from_dict(json.loads(json.dumps(normalize.to_dict()))) == normalize
    assert pickle.loads(pickle.dumps(normalize)) == normalize


def test_normalize_refuses(root):
    dataset = GWPatchDataset(root, 2, 1)
    normalize = Normalize.from_dataset(dataset)
    state = normalize.to_dict()
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        Normalize.from_dict({**state, "format": 2})
    with pytest.raises(ValueError, match=r"state must have the fields .* got .*"):
        Normalize.from_dict({k: v for k, v in state.items() if k != "std"})
    for change, text in (
        ({"std": [1.0, 0.0, 1.0]}, "std must be > 0, got 0.0"),
        ({"mean": [1.0]}, "mean must have 3 numbers, got 1"),
        ({"low": [1.0]}, "low must have 3 numbers, got 1"),
        ({"mean": [1.0, float("nan"), 1.0]}, "mean must be finite, got"),
        ({"coords": "city"}, "coords must be 'patch' or 'domain', got 'city'"),
        ({"target_columns": ["heat"]}, "target_columns must be among .* got 'heat'"),
    ):
        with pytest.raises(ValueError, match=text):
            Normalize.from_dict({**state, **change})
    with pytest.raises(
        ValueError, match=r"values must have a last axis of 3 columns .* got shape \[2, 2\]"
    ):
        normalize.inverse(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"columns must be among .* got 'heat'"):
        normalize.inverse(torch.zeros(2, 1), "heat")
    other = GWPatchDataset(root, 2, 1, target_columns="head")
    with pytest.raises(
        ValueError, match=r"transform must have the dataset's target_columns \('head',\), got"
    ):
        other.transform = normalize


def test_statistics_need_training_steps_and_finite_values(root):
    with pytest.raises(
        ValueError, match="the training split must have at least one time step, got 0"
    ):
        Normalize.from_dataset(GWPatchDataset(root, 2, 1, split="val", val_ratio=0.99))
    path = root / "patch_2" / "core_obs.npy"
    obs = np.load(path)
    obs[3, 1, 0] = np.nan
    np.save(path, obs)
    with pytest.raises(ValueError, match=r"patch_2/core_obs.npy must hold finite numbers"):
        Normalize.from_dataset(GWPatchDataset(root, 2, 1))
