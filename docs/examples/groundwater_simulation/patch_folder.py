"""Write patches to disk: coordinates and observations of core and ghost cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpusampler.groundwater import COLUMNS

from .aquifer import Aquifer
from .grid import Bools, Floats
from .patches import PatchMasks

DENSITY = 1000.0  # kilograms per cubic metre
GRAVITY = 9.80665  # metres per second squared


def pressure_from_head(head: Floats, elevation: Floats) -> Floats:
    """Pressure of water of constant density from head and elevation.

    ``p = rho g (h - z)`` with rho = 1000 kg/m3 and g = 9.80665 m/s2 (Bear 1972, Dynamics of Fluids
    in Porous Media, section 2.3): gauge pressure, 0 where the head equals the elevation, negative
    above the water table.

    Parameters
    ----------
    head : ndarray of float64
        Hydraulic head, metres.
    elevation : ndarray of float64
        Elevation of the points, metres above the same datum; broadcasts against ``head``.

    Returns
    -------
    ndarray of float64
        Pressure, kilopascals.
    """
    return np.asarray(DENSITY * GRAVITY / 1000.0 * (head - elevation), dtype=np.float64)


def write_patches(
    folder: Path,
    aquifer: Aquifer,
    patches: list[PatchMasks],
    mass: Floats,
    head: Floats,
    *,
    progress: bool = True,
) -> None:
    """Write one ``patch_<id>`` folder for each patch, four float32 arrays each.

    Parameters
    ----------
    folder : Path
        Existing folder.
    aquifer : Aquifer
        Coordinates.
    patches : list of PatchMasks
        Patch ``i`` is written to ``patch_<i>``.
    mass, head : ndarray of float64, (T, L, R, K)
        Concentration (grams per cubic metre) and head (metres); may be mapped files, of which one
        step of one patch is in memory at a time.
    progress : bool, default True
        Whether to show a bar; it stays away where standard error is no terminal.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    bar = tqdm(
        patches, desc="patches", unit="patch", disable=None if progress else True, leave=False
    )
    for i, patch in enumerate(bar):
        patch_path = folder / f"patch_{i}"
        patch_path.mkdir()
        for name, mask in (("core", patch.core), ("ghost", patch.ghost)):
            coords = _coords(aquifer, mask)
            np.save(patch_path / f"{name}_coords.npy", coords.astype(np.float32))
            obs = np.empty((len(head), len(coords), len(COLUMNS)), dtype=np.float32)
            for step in range(len(head)):
                h = head[step][:, mask].ravel()
                obs[step, :, 0] = mass[step][:, mask].ravel()
                obs[step, :, 1] = h
                obs[step, :, 2] = pressure_from_head(h, coords[:, 2])
            np.save(patch_path / f"{name}_obs.npy", obs)


def _coords(aquifer: Aquifer, mask: Bools) -> Floats:
    z = aquifer.centres[:, mask]
    rows, cols = np.nonzero(mask)
    x = np.broadcast_to(aquifer.x[cols], z.shape)
    y = np.broadcast_to(aquifer.y[rows], z.shape)
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)
