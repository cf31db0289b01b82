"""Run MODFLOW 6, check its result, and map its output files."""

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
    """MODFLOW 6 failed or returned unusable output; the message has the reason."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """Largest absolute budget discrepancies of any stress period, per cent."""

    flow_discrepancy: float
    transport_discrepancy: float


def run_model(mf6: Path, folder: Path, periods: int, *, progress: bool = True) -> RunReport:
    """Run MODFLOW 6 in a folder with the input files of `write_model` and check its result.

    ``periods``, the number of stress periods, is for the progress bar. Raises `SimulationError`,
    with the tail of the listing file, if the program cannot be started, fails (for example because
    it does not converge), or a water or solute budget is off by more than 0.1 per cent.
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
        raise SimulationError(f"cannot start mf6: {mf6}: {error}") from error
    with bar, process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output_tail.append(line.rstrip())
                if match := re.search(r"Stress period:\s*(\d+)", line):
                    bar.update(int(match[1]) - 1 - bar.n)
            bar.update(periods - bar.n)
        except BaseException:
            # The caller deletes the folder that the process works in.
            process.kill()
            raise
    listing = folder / "mfsim.lst"
    listing_text = listing.read_text(errors="replace") if listing.exists() else ""
    if process.returncode != 0 or "Normal termination of simulation" not in listing_text:
        tail = "\n".join([*output_tail, "--- mfsim.lst ---", *listing_text.splitlines()[-25:]])
        raise SimulationError(
            f"mf6 did not terminate normally (exit code {process.returncode}):\n{tail}"
        )
    report = RunReport(_discrepancy(folder / "gwf.lst"), _discrepancy(folder / "gwt.lst"))
    for name, value in (
        ("gwf.lst", report.flow_discrepancy),
        ("gwt.lst", report.transport_discrepancy),
    ):
        if not value <= MAX_DISCREPANCY:
            tail = "\n".join((folder / name).read_text(errors="replace").splitlines()[-40:])
            raise SimulationError(
                f"the budget discrepancy in {name} is {value} per cent, above the limit of "
                f"{MAX_DISCREPANCY}:\n{tail}"
            )
    return report


def _discrepancy(listing: Path) -> float:
    pattern = r"PERCENT DISCREPANCY\s*=\s*(\S+)\s+PERCENT DISCREPANCY\s*=\s*(\S+)"
    budgets = re.findall(pattern, listing.read_text(errors="replace"))
    if not budgets:
        raise SimulationError(f"{listing.name} has no budgets")
    return max(abs(float(value)) for budget in budgets for value in budget)


def read_steps(path: Path, shape: tuple[int, int, int], skip: int, steps: int) -> Floats:
    """Map a binary head or concentration file of MODFLOW 6, without its first ``skip`` times.

    The file has one record per layer of each saved time: kstp, kper (int32), pertim, totim
    (float64), a 16-byte text, ncol, nrow, ilay (int32), then nrow x ncol float64 (MODFLOW 6
    Description of Input and Output, "Dependent Variable File"). ``shape`` is (layers, rows,
    columns). Returns a read-only view, float64 (steps, layers, rows, columns); inactive cells are
    1e30.
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
            f"{path.name} must have {skip + steps} times of {layers} x {rows} x {cols} cells "
            f"({expected_bytes} bytes), got {file_bytes} bytes"
        )
    records = np.memmap(path, dtype=record, mode="r").reshape(skip + steps, layers)
    if not np.array_equal(np.asarray(records["ilay"][0]), np.arange(1, layers + 1)):
        raise SimulationError(f"{path.name} must list layers 1 to {layers} for each time")
    values: Floats = records["values"][skip:]
    return values
