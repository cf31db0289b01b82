"""Write patches to disk: coordinates and observations of core and ghost cells, and forcing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpusampler.groundwater import COLUMNS

from .aquifer import Aquifer
from .forcing import Forcing
from .grid import Bools, Floats
from .patches import PatchMasks

DENSITY = 1000.0  # kilograms per cubic metre
GRAVITY = 9.80665  # metres per second squared
FORCING = "forcing.csv"


def pressure_from_head(head: Floats, elevation: Floats) -> Floats:
    """Return the pressure, in kilopascals, of water of constant density.

    ``p = rho g (h - z)`` with rho = 1000 kg/m3 and g = 9.80665 m/s2 (Bear 1972, Dynamics of Fluids
    in Porous Media, section 2.3): gauge pressure, negative above the water table. Head and
    elevation are metres above the same datum and broadcast.
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
    """Write four float32 arrays per patch to ``folder/patch_<i>``; ``folder`` must exist.

    ``mass`` (grams per cubic metre) and ``head`` (metres) are float64 (T, L, R, K). They may be
    memory maps: one step of one patch is read at a time.
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


def write_forcing(folder: Path, forcing: Forcing, skip: int) -> None:
    """Write ``folder/forcing.csv``: one row per written step, after ``skip`` stress periods.

    A row has the forcing of the stress period that ends with its step: recharge (metres per day),
    its concentration (grams per cubic metre), the shifts of both boundary stages (metres), and the
    rate of each well (cubic metres per day, negative for pumping).
    """
    columns = ["recharge", "recharge_concentration", "inflow_shift", "river_shift"]
    series = [getattr(forcing, name) for name in columns]
    wells = [f"well_{i}" for i in range(forcing.well_rates.shape[1])]
    table = np.column_stack([*series, forcing.well_rates])[skip:]
    header = ",".join([*columns, *wells])
    np.savetxt(folder / FORCING, table, fmt="%.10g", delimiter=",", header=header, comments="")


def _coords(aquifer: Aquifer, mask: Bools) -> Floats:
    z = aquifer.centres[:, mask]
    rows, cols = np.nonzero(mask)
    x = np.broadcast_to(aquifer.x[cols], z.shape)
    y = np.broadcast_to(aquifer.y[rows], z.shape)
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)
