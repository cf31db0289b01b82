"""Write provenance.json: the programs, settings and seed of a patch folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from gpusampler import __version__
from gpusampler.groundwater import COLUMNS

from .modflow_run import RunReport
from .patch_folder import DENSITY, GRAVITY
from .patches import PatchMasks
from .settings import SimulationSettings

PROVENANCE = "provenance.json"


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """Inputs of a patch folder; ``preset`` is None for custom settings."""

    preset: str | None
    seed: int
    settings: SimulationSettings
    mf6_version: str
    mf6_sha256: str


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_provenance(
    folder: Path, inputs: RunInputs, report: RunReport, patches: list[PatchMasks]
) -> Path:
    """Write ``provenance.json`` to a patch folder whose other files are complete; return its path.

    Paths in it are relative to ``folder``. The date is the current time in UTC, or that of
    ``SOURCE_DATE_EPOCH``.
    """
    s = inputs.settings
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    record = {
        "format": 1,
        "made_by": "groundwater_simulation.simulate.simulate",
        "date": _date(),
        "preset": inputs.preset,
        "seed": int(inputs.seed),
        "versions": {
            "gpusampler": __version__,
            "modflow6": inputs.mf6_version,
            "modflow6_sha256": inputs.mf6_sha256,
            "flopy": version("flopy"),
            "gstools": version("gstools"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
        "columns": list(COLUMNS),
        "units": {
            "length": "m",
            "time": "d",
            "coords": "m: east, north, up",
            "mass_concentration": "g/m3",
            "head": "m",
            "pressure": "kPa, gauge, at the cell centre",
            "recharge": "m/d",
            "recharge_concentration": "g/m3",
            "inflow_shift": "m",
            "river_shift": "m",
            "well_<i>": "m3/d, negative for pumping",
        },
        "constants": {"density_kg_m3": DENSITY, "gravity_m_s2": GRAVITY},
        "time": {
            "steps": s.n_steps,
            "step_days": s.step_days,
            "first_day": 1.0 + s.step_days * (s.warmup_steps + 1),
        },
        "budget_discrepancy_percent": dataclasses.asdict(report),
        "patches": {
            f"patch_{i}": {
                "core_points": int(p.core.sum()) * s.n_layers,
                "ghost_points": int(p.ghost.sum()) * s.n_layers,
            }
            for i, p in enumerate(patches)
        },
        "settings": s.to_dict(),
        "bytes": sum(p.stat().st_size for p in files),
        "sha256": {p.relative_to(folder).as_posix(): sha256_of(p) for p in files},
    }
    path = folder / PROVENANCE
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _date() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    return date.strftime("%Y-%m-%dT%H:%M:%SZ")
