"""Train a GINO on batches of one patch each, and measure its errors and times."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gpusampler.core.validation import check_int
from gpusampler.demo.gino import PatchGino
from gpusampler.demo.loading import DemoData, as_torch, loader, persistence, probe_loader
from gpusampler.demo.report import Training
from gpusampler.demo.stopwatch import Stopwatch
from gpusampler.sampler.batch_sampler import PatchBatchSampler

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 6e-3
# Solute changes most near the injection wells: without a limit, the few batches of large
# gradients decide the training.
MAX_GRADIENT_NORM = 0.3
_HEAD = "head"


@dataclass(frozen=True)
class ProbeErrors:
    """Mean squared errors on the probe set: of scaled changes, and of the head in m²."""

    loss: float
    persistence: float
    head: float
    head_persistence: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, since the demo's tensors are too small for several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batch_loss(model: PatchGino, batch: dict[str, Any]) -> torch.Tensor:
    """Return the mean squared error of a batch's changes at the core points, in their spread."""
    truth: torch.Tensor = batch["core_out"]
    return ((model(batch) - truth) / model.change_std).square().mean()


def update(model: PatchGino, optimizer: torch.optim.Optimizer) -> None:
    """Clip the norm of the gradients and update the weights."""
    import torch

    torch.nn.utils.clip_grad_norm_(model.net.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()


def measure_probe(model: PatchGino, data: DemoData, batch_size: int) -> ProbeErrors:
    """Return the errors of the model and of persistence on the probe set."""
    import torch

    normalize = data.normalize
    head = normalize.target_columns.index(_HEAD)
    unit = normalize.std[normalize.columns.index(_HEAD)]
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in probe_loader(data, batch_size):
            truth = batch["core_out"]
            for i, forecast in enumerate((model(batch), persistence(batch, normalize))):
                error = (forecast - truth).square()
                sums[i] += (error / data.change_std**2).mean() * len(truth)
                sums[i + 2] += error[..., head].mean() * unit**2 * len(truth)
            count += len(truth)
    if not bool(torch.isfinite(sums).all()):
        raise FloatingPointError(
            "the errors on the probe set (held-out windows) are not finite: check the held-out "
            "steps for NaN or infinity; if there are none, training diverged: try another seed"
        )
    return ProbeErrors(*(sums / count).tolist())


def train(
    model: PatchGino,
    data: DemoData,
    *,
    epochs: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Training:
    """Train in place with Adam, clipped gradients and a learning rate that falls to 0 on a cosine.

    ``seed`` determines the batches; nothing else is random. Raises FloatingPointError if a loss or
    a probe error is not finite.
    """
    import torch

    epochs = check_int(epochs, "epochs", low=1)
    watch = Stopwatch()
    sampler = PatchBatchSampler(data.train, batch_size, seed=seed)
    batches = loader(as_torch(data.train), sampler, watch)
    optimizer = torch.optim.Adam(model.net.parameters(), lr=LEARNING_RATE)
    probes = [measure_probe(model, data, batch_size)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sampler))
    losses: list[float] = []
    patches: list[tuple[int, ...]] = []
    with tqdm(
        total=epochs * len(sampler), desc="train", unit="batch", disable=None if progress else True
    ) as bar:
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            epoch_patches: list[int] = []
            with watch.phase("other"):
                reader = iter(batches)
                while True:
                    with watch.phase("read"):
                        batch = next(reader, None)
                    if batch is None:
                        break
                    with watch.phase("forward"):
                        loss = batch_loss(model, batch)
                    with watch.phase("backward"):
                        optimizer.zero_grad()
                        loss.backward()  # type: ignore[no-untyped-call]
                    with watch.phase("optimizer"):
                        update(model, optimizer)
                        schedule.step()
                    losses.append(loss.item())
                    if not math.isfinite(losses[-1]):
                        raise FloatingPointError(
                            f"training diverged: the loss is {losses[-1]} at batch {len(losses)} "
                            "of the run; check the data for outliers or try a different seed"
                        )
                    epoch_patches.append(batch["patch_id"])
                    bar.update()
            patches.append(tuple(epoch_patches))
            probes.append(measure_probe(model, data, batch_size))
            bar.set_postfix(probe_loss=f"{probes[-1].loss:.3f}")
    return Training(
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        parameters=model.num_parameters,
        probe_loss=tuple(probe.loss for probe in probes),
        batch_loss=tuple(losses),
        persistence_loss=probes[-1].persistence,
        head_rmse=math.sqrt(probes[-1].head),
        head_rmse_persistence=math.sqrt(probes[-1].head_persistence),
        batch_patches=tuple(patches),
        seconds=sum(watch.seconds.values()),
        shares=watch.shares(),
    )
