"""Results of the demo, as dataclasses, as JSON and as text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from gpusampler.core.files import open_output
from gpusampler.core.text import format_table


@dataclass(frozen=True)
class DataSummary:
    """Sizes of the data.

    ``points`` counts core and ghost points, ``nbytes`` the bytes of the patches on disk, and
    ``forcing`` the series that are known for the forecast step.
    """

    folder: str
    patches: int
    points: int
    train_samples: int
    probe_samples: int
    nbytes: int
    forcing: int
    steps: int


@dataclass(frozen=True)
class Training:
    """Results of training.

    Losses are mean squared errors, with the change of each target since the last input step scaled
    to a root mean square of 1 over the training windows.

    Attributes
    ----------
    parameters : int
        Number of trainable values of the model.
    probe_loss : tuple of float
        Loss on the probe set (at most 256 held-out windows), before training and after each epoch.
    batch_loss : tuple of float
        Loss of each training batch, in order.
    persistence_loss : float
        Probe loss of the persistence forecast, which repeats the last input step.
    head_rmse, head_rmse_persistence : float
        Root mean square error of the hydraulic head on the probe set in metres, of the trained
        model and of persistence.
    batch_patches : tuple of tuple of int
        Patch of each batch, per epoch.
    seconds : float
        Wall time of the epochs, without probing.
    shares : dict of str to float
        Percentage of that time per phase; the sum is 100.
    """

    epochs: int
    batch_size: int
    seed: int
    parameters: int
    probe_loss: tuple[float, ...]
    batch_loss: tuple[float, ...]
    persistence_loss: float
    head_rmse: float
    head_rmse_persistence: float
    batch_patches: tuple[tuple[int, ...], ...]
    seconds: float
    shares: dict[str, float]

    @property
    def head_gain(self) -> float:
        """Fraction by which the head error is below that of persistence; nan if that is 0."""
        if self.head_rmse_persistence == 0:
            return math.nan
        return 1.0 - self.head_rmse / self.head_rmse_persistence


@dataclass(frozen=True)
class Speed:
    """Samples per second in batches of one patch (``grouped``) and one at a time (``single``).

    Each is the best of ``repeats`` runs. Both variants take turns and train on the same samples,
    ``samples`` in number.
    """

    grouped: float
    single: float
    samples: int
    repeats: int

    @property
    def ratio(self) -> float:
        """Speed of grouped batches divided by that of single samples."""
        return self.grouped / self.single


@dataclass(frozen=True)
class DemoReport:
    """All results of the demo.

    ``seconds`` is the wall time of the whole job, ``versions`` are those of Python and of the
    libraries, and ``threads`` is the number of torch's threads.
    """

    loaded: DataSummary
    training: Training
    speed: Speed
    seconds: float
    versions: dict[str, str]
    threads: int

    def write_json(self, path: Path) -> None:
        """Write the report as JSON."""
        with open_output(path) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())

    def text(self) -> str:
        """Return the report as text."""
        loaded, training, speed = self.loaded, self.training, self.speed
        before, after = training.probe_loss[0], training.probe_loss[-1]
        lines = [
            f"loaded\t{loaded.patches} patches, {loaded.points:,} points "
            f"(core and ghost), {loaded.steps} time steps, {loaded.nbytes / 1e6:.1f} MB",
            f"\tfrom {loaded.folder}",
            f"forcing\t{loaded.forcing} series, known for the forecast step as well",
            f"samples\t{loaded.train_samples:,} to train on, {loaded.probe_samples} later ones "
            "held out as the probe",
            f"model\tneuralop GINO, {training.parameters:,} parameters, "
            f"weights from seed {training.seed}, {self.threads} thread",
            f"trained\t{training.epochs} epochs, {len(training.batch_loss)} batches of up to "
            f"{training.batch_size}, {training.seconds:.1f} s",
            f"probe loss\t{before:.3f} before (it is persistence: no change), {after:.3f} after",
            "\t(mean squared error of changes scaled by their spread, all columns)",
            f"head error\t{training.head_rmse:.3f} m (root mean square, held out), "
            f"persistence {training.head_rmse_persistence:.3f} m: {_gain(training.head_gain)}",
            f"speed\t{speed.grouped:.0f} samples/s in batches of one patch, "
            f"{speed.single:.0f} one at a time: {speed.ratio:.1f} times as fast",
            f"\t(same model, same {speed.samples} samples, reading and training steps, "
            f"best of {speed.repeats})",
            "time\t"
            + ", ".join(f"{name} {share:.1f} %" for name, share in training.shares.items()),
            "note\tthe demo replaces neuralop's segment_csr, a Python loop over points, by",
            "\tan index_add of the same result. Persistence does not use the forcing.",
        ]
        return format_table([line.split("\t", 1) for line in lines], "<")


def _gain(gain: float) -> str:
    if math.isnan(gain):
        return "exact"
    return f"{abs(gain):.0%} {'lower' if gain >= 0 else 'higher'}"
