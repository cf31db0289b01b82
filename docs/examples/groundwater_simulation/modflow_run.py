"""Run MODFLOW 6, check how it ended, and map its output into memory."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections import deque
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .grid import Floats

MAX_DISCREPANCY = 0.1  # per cent


class SimulationError(RuntimeError):
    """MODFLOW 6 failed, or gave output that must not be used; the message holds the reason."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a finished run says of itself.

    Attributes
    ----------
    flow_discrepancy, transport_discrepancy : float
        Largest absolute budget discrepancy of any stress period, per cent.
    """

    flow_discrepancy: float
    transport_discrepancy: float


def run_model(mf6: Path, folder: Path, periods: int, *, progress: bool = True) -> RunReport:
    """Run MODFLOW 6 in a folder and check how it ended.

    Parameters
    ----------
    mf6 : Path
        The program.
    folder : Path
        Folder with the input files of `write_model`; output files go there too.
    periods : int
        Number of stress periods, for the progress bar.
    progress : bool, default True
        Whether to show a bar; it stays away where standard error is no terminal.

    Returns
    -------
    RunReport
        Largest budget discrepancies.

    Raises
    ------
    SimulationError
        If the program cannot be started, does not end normally (no convergence among the
        reasons), or a water or solute budget is off by more than 0.1 per cent. The message ends
        with the tail of the listing file.
    """
    bar = tqdm(
        total=periods, desc="mf6", unit="period", disable=None if progress else True, leave=False
    )
    output_tail: deque[str] = deque(maxlen=15)
    try:
        process = subprocess.Popen(
            [str(mf6)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        bar.close()
        raise SimulationError(f"mf6 could not be started: {mf6}: {error}") from error
    with bar, process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output_tail.append(line.rstrip())
                if match := re.search(r"Stress period:\s*(\d+)", line):
                    bar.update(int(match[1]) - 1 - bar.n)
            bar.update(periods - bar.n)
        except BaseException:
            # The folder is about to be deleted under it.
            process.kill()
            raise
    listing = folder / "mfsim.lst"
    listing_text = listing.read_text(errors="replace") if listing.exists() else ""
    if process.returncode != 0 or "Normal termination of simulation" not in listing_text:
        tail = "\n".join([*output_tail, "--- mfsim.lst ---", *listing_text.splitlines()[-25:]])
        raise SimulationError(f"mf6 must end normally, got exit {process.returncode}:\n{tail}")
    report = RunReport(_discrepancy(folder / "gwf.lst"), _discrepancy(folder / "gwt.lst"))
    for name, value in (
        ("gwf.lst", report.flow_discrepancy),
        ("gwt.lst", report.transport_discrepancy),
    ):
        if not value <= MAX_DISCREPANCY:
            tail = "\n".join((folder / name).read_text(errors="replace").splitlines()[-40:])
            raise SimulationError(
                f"budget discrepancy in {name} must be <= {MAX_DISCREPANCY} per cent, "
                f"got {value}:\n{tail}"
            )
    return report


def _discrepancy(listing: Path) -> float:
    pattern = r"PERCENT DISCREPANCY\s*=\s*(\S+)\s+PERCENT DISCREPANCY\s*=\s*(\S+)"
    budgets = re.findall(pattern, listing.read_text(errors="replace"))
    if not budgets:
        raise SimulationError(f"{listing.name} must hold budgets, got none")
    return max(abs(float(value)) for budget in budgets for value in budget)


def read_steps(path: Path, shape: tuple[int, int, int], skip: int, steps: int) -> Floats:
    """Map a MODFLOW 6 binary head or concentration file into memory.

    The file is a row of records, one for each layer of each saved time: kstp, kper (int32),
    pertim, totim (float64), a 16-byte text, ncol, nrow, ilay (int32), then nrow x ncol float64
    (MODFLOW 6 Description of Input and Output, "Dependent Variable File").

    Parameters
    ----------
    path : Path
        ``gwf.bin`` or ``gwt.bin``.
    shape : tuple of int
        Layers, rows, columns.
    skip : int
        Saved times to leave out at the beginning.
    steps : int
        Saved times wanted after those.

    Returns
    -------
    ndarray of float64, (steps, layers, rows, columns)
        A read-only view of the mapped file; inactive cells hold 1e30.

    Raises
    ------
    SimulationError
        If the file does not hold ``skip + steps`` times of this shape.
    """
    layers, rows, cols = shape
    record = np.dtype(
        [
            ("kstp", "<i4"),
            ("kper", "<i4"),
            ("pertim", "<f8"),
            ("totim", "<f8"),
            ("text", "S16"),
            ("ncol", "<i4"),
            ("nrow", "<i4"),
            ("ilay", "<i4"),
            ("values", "<f8", (rows, cols)),
        ]
    )
    expected_bytes = (skip + steps) * layers * record.itemsize
    file_bytes = path.stat().st_size if path.exists() else 0
    if file_bytes != expected_bytes:
        raise SimulationError(
            f"{path.name} must hold {skip + steps} times of {layers} x {rows} x {cols} cells "
            f"({expected_bytes} bytes), got {file_bytes} bytes"
        )
    records = np.memmap(path, dtype=record, mode="r").reshape(skip + steps, layers)
    if not np.array_equal(np.asarray(records["ilay"][0]), np.arange(1, layers + 1)):
        raise SimulationError(f"{path.name} must list layers 1 to {layers} for each time")
    values: Floats = records["values"][skip:]
    return values
