"""The demo from start to end: load, train, compare, report, draw."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from gpusampler.core.files import check_regular
from gpusampler.demo.gino import PatchGino, fast_segment_csr
from gpusampler.demo.head_map import head_map
from gpusampler.demo.loading import DemoData, load
from gpusampler.demo.picture import draw
from gpusampler.demo.report import DataSummary, DemoReport
from gpusampler.demo.speed import compare_speed
from gpusampler.demo.stopwatch import Stopwatch
from gpusampler.demo.train import one_thread, train

PICTURE, REPORT = "demo.png", "report.json"


def run_demo(
    data: DemoData | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    epochs: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> DemoReport:
    """Train a GINO on groundwater patches and report losses and speeds.

    ``data`` is loaded data or a patch folder; default: the embedded data. ``out`` is a folder,
    created if missing, for ``report.json`` and ``demo.png``; without it nothing is written and
    matplotlib is not needed. ``seed`` determines the initial weights and batches; global random
    state is neither used nor changed. During the run, torch uses one thread and a faster function
    replaces neuraloperator's `segment_csr`; both are restored.
    """
    import neuralop
    import torch

    import gpusampler

    watch = Stopwatch()
    folder = None if out is None else Path(out)
    with watch.phase("job"), one_thread(), fast_segment_csr():
        loaded = data if isinstance(data, DemoData) else load(data)
        if folder is not None:
            # Fail before training, not after it.
            folder.mkdir(parents=True, exist_ok=True)
            for name in (PICTURE, REPORT):
                check_regular(folder / name, missing_ok=True)
        model = PatchGino(loaded, seed=seed)
        training = train(
            model, loaded, epochs=epochs, batch_size=batch_size, seed=seed, progress=progress
        )
        speed = compare_speed(model, loaded, batch_size=batch_size, seed=seed, progress=progress)
        heads = head_map(model, loaded)
        threads = torch.get_num_threads()
    report = DemoReport(
        loaded=_summary(loaded),
        training=training,
        speed=speed,
        seconds=watch.seconds["job"],
        versions={
            "gpusampler": gpusampler.__version__,
            "torch": torch.__version__,
            "neuraloperator": neuralop.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        threads=threads,
    )
    if folder is not None:
        report.write_json(folder / REPORT)
        draw(report, heads, folder / PICTURE)
    return report


def _summary(data: DemoData) -> DataSummary:
    return DataSummary(
        folder=str(data.train.root),
        patches=len(data.train.patches),
        points=data.train.num_points,
        train_samples=len(data.train),
        probe_samples=len(data.probe),
        nbytes=data.train.nbytes,
        forcing=data.num_forcing,
        steps=data.train.windows.steps,
    )
