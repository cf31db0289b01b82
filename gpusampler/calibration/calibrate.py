"""calibrate: a budget of cost from what the user's own training step takes of the memory."""

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
  malloc keeps pieces of what is freed, so an epoch may come to hold more than a dozen batches do:
  leave room, or set MALLOC_MMAP_THRESHOLD_=1048576 for calibrating and training"""


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
    """Measure what a training step takes of the memory, and return the budget that fits.

    The step is made for a few patches (the cheapest, one in the middle, the dearest) and sizes that
    double, each twice: what the optimizer and libraries make at the first step is held from then
    on, and the second is measured. Through the peaks above what was held goes the line ``fixed +
    per_cost * cost * batch_size``, of least squares of relative errors, and ``max_cost`` is what
    fills the share of the memory by it. Then the dearest batch of all patches is tried, and a dozen
    batches in a row; if they take more, the budget is made smaller until they do not.

    On CUDA, memory is what torch gives out (``torch.cuda.max_memory_allocated``), in this process.
    On the CPU, each measurement is made in a child process of its own, made by ``fork`` (Linux): by
    its high-water mark of resident memory, with one thread, and malloc set to give back what is
    freed; only for the batches in a row it is left as it is in this process, where it holds on to
    pieces that do not fit what comes next (see the how-to page for what helps). Memory that runs
    out is a finding, here as there: half the size is tried next.

    Parameters
    ----------
    step : callable
        Your training step, ``step(batch)`` with a `Batch`: gathers, forward, backward, optimizer.
        It is called many times.
    sampler : PatchBatchSampler
        Of the patches that are to be trained on, with any batch size.
    state : tuple
        What the step changes: modules (with buffers, gradients and training mode), optimizers,
        schedulers, anything else with ``state_dict`` and ``load_state_dict``, random generators,
        tensors. It is as it was afterwards, bit for bit, as are the random generators of Python,
        NumPy and torch; also when the step raises.
    cost : array (G,), mapping, callable or dataset, optional
        Cost of a sample of each patch, as for `CostBudget`, or a dataset with ``patch_costs()``.
        Default: the costs of the sampler's own budget, unless those are ``sample_costs``.
    fit : {"auto", "proportional", "affine"}
        "proportional": as above. "affine": ``fixed + per_patch * cost + (per_sample + per_cost *
        cost) * batch_size``, for models that keep something once for a batch (the graph of its
        patch) or for a sample whatever its cost (a latent grid); the costs of the budget are bytes
        then. "auto": proportional, unless that is off by more than 15 % and affine by less than
        half as much.
    memory_limit : float, optional
        Bytes, with what this process holds. Default: what is free on the device and what this
        process holds already.
    share : float
        Of the limit, in (0, 1], that a batch may fill with what is held.
    max_batch_size, min_batch_size, multiple_of, power_of_two, over_budget
        As for `CostBudget`.
    picture : path, optional
        Where to draw peaks, line and residuals (PNG).
    progress : bool
        Print the table.

    Returns
    -------
    CostBudget
        ``cost`` is a mapping from patch ids; ``calibration`` has all that was measured, JSON-safe.

    Raises
    ------
    TypeError
        If an argument has the wrong type, or an object of ``state`` cannot be put back.
    ValueError
        If a value is out of range, costs are missing, or ``share`` of the limit does not suffice
        for what is held, or for the smallest batch of a patch (see ``over_budget``).
    RuntimeError
        If the memory of the device cannot be measured here, no probe succeeds, or the step's
        process ends or waits for ever.
    ImportError
        If ``picture`` is given and matplotlib is not installed.
    BaseException
        What the step raises, but for memory that has run out; from a child process with its
        traceback as the cause.

    Warns
    -----
    UserWarning
        If the line is off by more than 15 % of a peak: the cost does not describe what the step
        takes.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> points = {7: 4_000, 8: 64_000}
    >>> sampler = PatchBatchSampler([7] * 500 + [8] * 90, 4, seed=0)
    >>> def step(batch):
    ...     field = np.ones((len(batch.indices), points[batch.patch_id], 8))
    >>> budget = calibrate(step, sampler, cost=points, memory_limit=2e9, share=0.5, progress=False)
    >>> 55 < budget.calibration["per_cost"] < 73  # 8 numbers of 8 bytes a point
    True
    >>> sampler = PatchBatchSampler([7] * 500 + [8] * 90, budget, seed=0)
    """
    # Who does not calibrate does not wait for what only this needs.
    from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction

    from gpusampler.calibration.memory_meter import meter_for
    from gpusampler.calibration.report import draw_fit, format_record
    from gpusampler.calibration.search import Search
    from gpusampler.calibration.snapshot import check_state

    if not callable(step):
        raise TypeError(f"step must be a function of a batch, got {short_repr(step)}")
    # Called, they do nothing, and that would take no memory.
    if isgeneratorfunction(step) or iscoroutinefunction(step) or isasyncgenfunction(step):
        raise TypeError(
            "step must make the training step when it is called, got a function with yield or "
            f"async: {short_repr(step)}"
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
            f"memory_limit must be more than the {format_bytes(in_use)} that are held "
            f"already, times share={share:g}, got {format_bytes(meter.limit)}"
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
    if plan.costs_are_of_samples:
        raise ValueError(
            "sampler must not cut patches by sample_costs: what would be tried are the first "
            "samples of a patch, whatever they cost; give a sampler whose patches are lengths"
        )
    if cost is None:
        cost = plan.costs_by_patch
    if cost is None:
        raise ValueError(
            "cost must be given, as a mapping from patch ids or a dataset that has patch_costs(), "
            "where the sampler's batch_size is no CostBudget, got None"
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
            "picture must be left out where matplotlib is not installed; pip install matplotlib"
        ) from error
    return path
