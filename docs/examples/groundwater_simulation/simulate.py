"""Simulate groundwater with MODFLOW 6 and write it as a patch folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .aquifer import Aquifer, build_aquifer
from .forcing import PEAK_LOAD, Forcing, build_forcing
from .grid import Floats
from .mf6 import find_mf6
from .modflow import write_model
from .modflow_run import RunReport, SimulationError, read_steps, run_model
from .patch_folder import write_forcing, write_patches
from .patches import PatchMasks, cut_aquifer
from .provenance import PROVENANCE, RunInputs, sha256_of, write_provenance
from .settings import SimulationSettings, preset_settings

DEFAULT_SEED = 2


def simulate(
    out: str | os.PathLike[str],
    preset: str = "small",
    *,
    settings: SimulationSettings | None = None,
    seed: int = DEFAULT_SEED,
    mf6: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Simulate an aquifer with MODFLOW 6 and write its patches to a folder.

    Draws an aquifer from the seed (`build_aquifer`), runs a coupled flow and transport model in a
    temporary folder, checks its output, cuts the map into patches (`cut_patches`) and writes::

        out/forcing.csv                   recharge, stages and well rates of each step
        out/provenance.json               versions, settings, units, sizes, sha256 of each file
        out/patch_<id>/core_coords.npy    float32 (Nc, 3)      x, y, z of cell centres, metres
        out/patch_<id>/core_obs.npy       float32 (T, Nc, 3)   columns below
        out/patch_<id>/ghost_coords.npy   float32 (Ng, 3)
        out/patch_<id>/ghost_obs.npy      float32 (T, Ng, 3)

    Columns are ``mass_concentration`` (grams per cubic metre), ``head`` (metres) and ``pressure``
    (kilopascals above the atmosphere, at the cell centre). Points are ordered by layer, then by
    row; all layers of a column are in the same patch. The same seed, settings and programs give the
    same bytes, except for the date in ``provenance.json`` (set ``SOURCE_DATE_EPOCH`` to fix it).

    Parameters
    ----------
    out : str or path-like
        Folder to create, atomically: it is complete or does not exist.
    preset : {"small", "medium", "large"}, default "small"
        Named settings; ignored if ``settings`` is given.
    settings : SimulationSettings, optional
        Custom settings, e.g. ``dataclasses.replace(PRESETS["small"], n_steps=120)``.
    seed : int, default 2
        0 to 2^63 - 1. The embedded data set is preset small with the default seed.
    mf6 : str or path-like, optional
        The MODFLOW 6 program. Default: see `find_mf6`.
    overwrite : bool, default False
        Whether to replace ``out``. Only a folder with a ``provenance.json`` is replaced.
    progress : bool, default True
        Whether to show progress bars if standard error is a terminal.

    Returns
    -------
    Path
        Absolute path of the folder.

    Raises
    ------
    ValueError
        If the preset is unknown, the seed out of range, or the settings leave no room for the
        wells or the patches.
    TypeError
        If ``seed`` is not an int or ``settings`` not a SimulationSettings.
    FileExistsError
        If ``out`` is a file, or a non-empty folder that must not be replaced.
    FileNotFoundError
        If no ``mf6`` is found.
    ImportError
        If flopy or gstools is not installed.
    SimulationError
        If MODFLOW 6 fails, a budget does not close, a cell runs dry, or a value is not finite.

    Examples
    --------
    >>> from groundwater_simulation.simulate import simulate
    >>> folder = simulate("aquifer", "small")  # doctest: +SKIP
    >>> sorted(p.name for p in folder.iterdir())[0]  # doctest: +SKIP
    'patch_0'
    """
    if settings is not None and not isinstance(settings, SimulationSettings):
        raise TypeError(f"settings must be a SimulationSettings, got {settings!r}")
    run_settings = preset_settings(preset) if settings is None else settings
    _check_seed(seed)
    target = Path(out).expanduser().absolute()
    _check_target(target, overwrite)
    _check_libraries()
    program = find_mf6(mf6)
    inputs = RunInputs(
        preset=preset if settings is None else None,
        seed=seed,
        settings=run_settings,
        mf6_version=_version_of(program),
        mf6_sha256=sha256_of(program),
    )
    aquifer = build_aquifer(run_settings, seed)
    patches = cut_aquifer(aquifer, run_settings, seed)
    with tempfile.TemporaryDirectory(prefix="gpusampler-mf6-") as tmp:
        workspace = Path(tmp)
        forcing = build_forcing(run_settings, seed)
        write_model(aquifer, forcing, run_settings, workspace)
        report = run_model(program, workspace, len(forcing.recharge), progress=progress)
        with _staged(target, overwrite) as stage:
            _write_results(stage, workspace, aquifer, forcing, patches, inputs, report, progress)
    return target


def _write_results(
    stage: Path,
    workspace: Path,
    aquifer: Aquifer,
    forcing: Forcing,
    patches: list[PatchMasks],
    inputs: RunInputs,
    report: RunReport,
    progress: bool,
) -> None:
    # The maps must be freed before the files are deleted, since Windows does not delete mapped
    # files: they are local variables of this function.
    settings = inputs.settings
    skip, steps = 1 + settings.warmup_steps, settings.n_steps
    shape = (settings.n_layers, settings.n_rows, settings.n_cols)
    head = read_steps(workspace / "gwf.bin", shape, skip, steps)
    mass = read_steps(workspace / "gwt.bin", shape, skip, steps)
    _check_fields(head, mass, aquifer, settings)
    write_patches(stage, aquifer, patches, mass, head, progress=progress)
    write_forcing(stage, forcing, skip)
    write_provenance(stage, inputs, report, patches)


def _check_fields(
    head: Floats, mass: Floats, aquifer: Aquifer, settings: SimulationSettings
) -> None:
    peak_load = PEAK_LOAD * settings.recharge_concentration
    max_source = max(settings.injection_concentration, peak_load, 1e-12)
    bottoms = aquifer.bottoms[:, aquifer.active]
    for step in range(settings.n_steps):
        h, c = head[step][:, aquifer.active], mass[step][:, aquifer.active]
        for name, values in (("head", h), ("concentration", c)):
            # MODFLOW marks dry and inactive cells by +-1e30.
            if not np.all(np.isfinite(values)) or np.abs(values).max() > 1e20:
                raise SimulationError(
                    f"{name} is not finite in every active cell in step {step}: a cell is dry or "
                    "the solution diverged"
                )
        if dry := int(np.count_nonzero(h <= bottoms)):
            raise SimulationError(
                f"{dry} cells are dry in step {step}: their head is not above the cell bottom. "
                "Lower pumping_rate or raise layer_thickness."
            )
        # Allow 1 %: the TVD scheme is not strictly monotone on a grid of unequal cells.
        if c.min() < -0.01 * max_source or c.max() > 1.01 * max_source:
            raise SimulationError(
                f"concentration is {c.min():g} to {c.max():g} in step {step}, outside of 0 to "
                f"{max_source:g}, the largest of its sources. Raise substeps."
            )


def _check_seed(seed: object) -> None:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be 0 to 2^63 - 1, got {seed}")


def _check_libraries() -> None:
    missing = [name for name in ("flopy", "gstools") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the simulation needs {', '.join(missing)}: pip install flopy gstools")


def _version_of(program: Path) -> str:
    try:
        process = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SimulationError(f"cannot start mf6: {program}: {error}") from error
    match = re.search(r"mf6:\s*(\d[\w.]*)", process.stdout)
    if match is None:
        raise SimulationError(
            f"mf6 --version must name a MODFLOW 6 release, got {process.stdout.strip()[:200]!r} "
            f"from {program}"
        )
    return match[1]


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"out must be a folder, got the file {target}")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"out must not exist or be empty, got {target}; pass overwrite=True to replace it"
        )
    if not (target / PROVENANCE).is_file():
        raise FileExistsError(
            f"out must have a {PROVENANCE} to be replaced, got {target}; delete it first"
        )


@contextmanager
def _staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder that replaces the target if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as tmp:
        stage = Path(tmp) / "new"
        stage.mkdir()
        yield stage
        # Minutes have passed since the first check.
        _check_target(target, overwrite)
        backup = Path(tmp) / "old"
        if target.exists():
            shutil.move(target, backup)
        try:
            stage.rename(target)
        except BaseException:
            if backup.exists():
                backup.rename(target)
            raise
