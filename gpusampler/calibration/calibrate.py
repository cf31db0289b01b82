"""calibrate: derive a cost budget from the measured memory of the user's training step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpusampler.batching.cost_budget import CostBudget, OverBudget
from gpusampler.batching.costs import positive_by_patch
from gpusampler.core import log
from gpusampler.core.text import format_bytes, short_repr
from gpusampler.core.validation import check_bool, check_choice, check_path, check_real
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.batch_sampler import PatchBatchSampler
from gpusampler.sampler.batches import Batch
from gpusampler.sources.datasets import dataset_patch_costs

if TYPE_CHECKING:
    from gpusampler.calibration.cost_model import Floats

FIT_CHOICES = ("auto", "proportional", "affine")

MALLOC_ADVICE = """\
  malloc keeps part of the freed memory, so an epoch may use more memory than a dozen batches:
  pass a smaller share, or set MALLOC_MMAP_THRESHOLD_=1048576 for calibration and training"""


def calibrate(
    step: Callable[[Batch], object],
    sampler: PatchBatchSampler,
    *,
    state: Sequence[Any] = (),
    cost: Any = None,
    fit: Literal["auto", "proportional", "affine"] = "auto",
    memory_limit: float | None = None,
    share: float = 0.9,
    max_batch_size: int | None = None,
    min_batch_size: int = 1,
    multiple_of: int = 1,
    power_of_two: bool = False,
    over_budget: OverBudget = "error",
    picture: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CostBudget:
    """Measure the memory of a training step and return the cost budget that fits in memory.

    Calibration runs the step for a few patches (the cheapest, a middle one, the most expensive) at
    doubling batch sizes, twice each: the first run allocates what the optimizer and libraries keep,
    the second is measured. It fits ``fixed + per_cost * cost * batch_size`` to the peaks above the
    memory in use before, by least squares of relative errors, and sets ``max_cost`` to fill
    ``share`` of the memory. Then it runs the most expensive batch of all patches, and a dozen
    batches in a row; if they exceed the share, it reduces the budget until they fit.

    On CUDA, the step runs in this process and memory is ``torch.cuda.max_memory_allocated``. On the
    CPU, each measurement runs in a forked child process (Linux only), with one thread: memory is
    the peak of resident memory, and malloc is set to return freed memory. Only the batches in a row
    run with this process's own malloc settings, with which malloc keeps freed pieces that do not
    fit later batches (see the how-to page for what helps). If memory runs out, calibration tries
    half the size next.

    Parameters
    ----------
    step : callable
        Your training step, ``step(batch)`` with a `Batch`: gather, forward, backward, optimizer. It
        is called many times.
    sampler : PatchBatchSampler
        Sampler of the patches to train on, with any batch size.
    state : tuple
        Objects that the step changes: modules (with buffers, gradients and training mode),
        optimizers, schedulers, anything else with ``state_dict`` and ``load_state_dict``, random
        generators, tensors. They are restored bit for bit, as are the global random generators of
        Python, NumPy and torch, even if the step raises.
    cost : array (G,), mapping, callable or dataset, optional
        Cost of a sample of each patch, as for `CostBudget`, or a dataset with ``patch_costs()``.
        Default: the costs of the sampler's own budget, unless those are ``sample_costs``.
    fit : {"auto", "proportional", "affine"}
        "proportional": as above. "affine": ``fixed + per_patch * cost + (per_sample + per_cost *
        cost) * batch_size``, for models that store something once per batch (the graph of its
        patch) or per sample whatever its cost (a latent grid); the costs of the budget are then
        bytes. "auto": affine if the proportional fit is off by more than 15 % and affine by less
        than half as much, else proportional.
    memory_limit : float, optional
        Bytes, including the memory that this process already uses. Default: the free memory of the
        device plus the memory that this process uses.
    share : float
        Fraction of the limit, in (0, 1], for a batch plus the memory already in use.
    max_batch_size, min_batch_size, multiple_of, power_of_two, over_budget
        As for `CostBudget`.
    picture : path, optional
        PNG file for a plot of the measured peaks, the fitted line and its residuals.
    progress : bool
        Print a table of the measurements and of the resulting batch sizes.

    Returns
    -------
    CostBudget
        ``cost`` is a mapping from patch ids; ``calibration`` has all measurements, JSON-safe.

    Raises
    ------
    TypeError
        If an argument has the wrong type, or an object of ``state`` cannot be restored.
    ValueError
        If a value is out of range, costs are missing, or ``share`` of the limit is too small for
        the memory in use or for the smallest batch of a patch (see ``over_budget``).
    RuntimeError
        If the memory of the device cannot be measured, every measurement runs out of memory, no
        budget fits, or the child process ends or hangs.
    ImportError
        If ``picture`` is given and matplotlib is not installed.
    BaseException
        Any error of the step, except out of memory; an error in a child process has the child's
        traceback as its cause.

    Warns
    -----
    UserWarning
        If the fit is off by more than 15 % of a peak: the cost does not predict the memory of the
        step.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> points = {7: 4_000, 8: 64_000}
    >>> sampler = PatchBatchSampler([7] * 500 + [8] * 90, 4, seed=0)
    >>> def step(batch):
    ...     field = np.ones((len(batch.indices), points[batch.patch_id], 8))
    >>> budget = calibrate(step, sampler, cost=points, memory_limit=2e9, share=0.5, progress=False)
    >>> 55 < budget.calibration["per_cost"] < 73  # 8 numbers of 8 bytes per point
    True
    >>> sampler = PatchBatchSampler([7] * 500 + [8] * 90, budget, seed=0)
    """
    # Lazy imports: only `calibrate` needs these.
    from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction

    from gpusampler.calibration.memory_meter import meter_for
    from gpusampler.calibration.report import draw_fit, format_record
    from gpusampler.calibration.search import Search
    from gpusampler.calibration.snapshot import check_state

    if not callable(step):
        raise TypeError(f"step must be a function of a batch, got {short_repr(step)}")
    # Calling one of these runs nothing, so it would use no memory.
    if isgeneratorfunction(step) or iscoroutinefunction(step) or isasyncgenfunction(step):
        raise TypeError(
            f"step must be a plain function, got a generator or async function: {short_repr(step)}"
        )
    if not isinstance(sampler, PatchBatchSampler):
        raise TypeError(f"sampler must be a PatchBatchSampler, got {short_repr(sampler)}")
    objects = check_state(state)
    limit = _check_memory_limit(memory_limit)
    share = float(check_real(share, "share", "be in (0, 1]", lambda x: 0 < x <= 1))
    check_choice(fit, "fit", FIT_CHOICES)
    check_bool(progress, "progress")
    bounds = CostBudget(
        1,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        multiple_of=multiple_of,
        power_of_two=power_of_two,
        over_budget=over_budget,
    )
    path = None if picture is None else _check_picture(picture)
    plan = sampler.plan
    costs = _check_costs(cost, plan)
    device, meter = meter_for(step, plan, objects, limit)
    in_use = meter.memory_in_use()
    if share * meter.limit <= in_use:
        raise ValueError(
            f"too little memory: {format_bytes(in_use)} is in use, but only "
            f"{format_bytes(int(share * meter.limit))} may be used (memory_limit="
            f"{format_bytes(meter.limit)} * share={share:g}). Free memory, or raise "
            "memory_limit or share."
        )
    search = Search(meter, plan, costs, bounds, share, fit)
    search.run_probes()
    budget = search.find_budget()
    record = search.record(device)
    text = format_record(record)
    if device == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        text += f"\n{MALLOC_ADVICE}"
    log.logger.info("calibrate:\n%s", text)
    if progress:
        print(text)  # noqa: T201
    if path is not None:
        draw_fit(record, path)
    search.warn_if_inaccurate()
    return replace(budget, calibration=record)


def _check_costs(cost: Any, plan: EpochPlan) -> Floats:
    if cost is not None and not isinstance(cost, Mapping) and not isinstance(cost, np.ndarray):
        patch_costs = dataset_patch_costs(cost)
        cost = cost if patch_costs is None else patch_costs
    if plan.units.has_sample_costs:
        raise ValueError(
            "sampler must not use sample_costs: calibration needs one cost per patch. Pass a "
            "sampler without sample_costs; if the cost of a sample is its length and patches do "
            "not matter, use the length as patch id."
        )
    if cost is None:
        cost = plan.costs_by_patch
    if cost is None:
        raise ValueError(
            "cost is missing: pass a mapping from patch ids to costs, a dataset with "
            "patch_costs(), or a sampler whose CostBudget has costs"
        )
    return positive_by_patch(cost, plan.groups, "cost")


def _check_memory_limit(limit: Any) -> int | None:
    if limit is None:
        return None
    rule, kind = "be > 0 bytes and < 2**62", "a number of bytes"
    return int(check_real(limit, "memory_limit", rule, lambda x: 0 < x < 2.0**62, kind=kind))


def _check_picture(picture: Any) -> Path:
    path = check_path(picture, "picture")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "picture needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return path
