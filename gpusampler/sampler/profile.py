"""Profile: the time and memory of a training loop, or of a sampler since it was created."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

from gpusampler.core import devices, memory
from gpusampler.core.devices import Device
from gpusampler.core.text import format_bytes, format_table
from gpusampler.core.tracing import HAND_OUT, RANGES, Recorder
from gpusampler.permutation import _native
from gpusampler.sampler.state import EpochTracker

YOUR_LOOP = "your_loop"
"""The caller's time between batches."""


class Row(NamedTuple):
    """A line of a `Profile`.

    Attributes
    ----------
    name : str
        "load_ids", "group", "evaluate", "transfer", "hand_out" or "your_loop".
    calls : int
        Number of timed blocks of work; a block covers many batches. While a profile is active,
        "hand_out" counts one call per batch, and "your_loop" one per interval between batches.
    seconds : float
        Total time.
    per_batch : float
        Seconds per batch.
    share : float
        Fraction of the profile's ``wall_seconds``, 0 .. 1.
    """

    name: str
    calls: int
    seconds: float
    per_batch: float
    share: float


class Profile:
    """Time and memory of a loop or of a sampler; `str` returns a table.

    Attributes
    ----------
    rows : list of Row
        Empty until the block of `PatchBatchSampler.profile` has ended.
    batches : int
        Number of batches yielded in the block; for `PatchBatchSampler.stats`, of those evaluated.
    wall_seconds : float
        Duration of the block; for ``stats``, the sampler's own time since it was created.
    host_peak_bytes : int or None
        Peak resident memory of the process in the block: exact if it is the peak since the process
        started, else sampled at the end of each range. For ``stats``, the peak since the process
        started. None if the system does not report it.
    device_peak_bytes : int or None
        The same for the memory that torch or CuPy has allocated on the sampler's GPU. None without
        a GPU.
    table_bytes : dict of str to int
        Size of the sampler's tables, by device.
    grouped_on : str or None
        Device that grouped the ids by patch, such as "numpy" or "cuda:0"; None if the groups were
        made otherwise: from counts, from an index file, or by ``select`` or ``split``.
    host_form : str
        What evaluates batches on the host: "C (avx512)", "C (avx2)" or "C (plain)", by the
        instructions it uses, or "NumPy" and why the compiled module is not used.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
    >>> with sampler.profile() as p:
    ...     for batch in sampler:
    ...         pass
    >>> p.batches, [row.name for row in p.rows]
    (3, ['load_ids', 'group', 'evaluate', 'transfer', 'hand_out', 'your_loop'])
    >>> round(sum(row.share for row in p.rows), 1)
    1.0
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.batches = 0
        self.wall_seconds = 0.0
        self.host_peak_bytes: int | None = None
        self.device_peak_bytes: int | None = None
        self.table_bytes: dict[str, int] = {}
        self.grouped_on: str | None = None
        self.host_form = _native.describe()

    def _fill(
        self, spent: Mapping[str, tuple[int, float]], batches: int, wall_seconds: float
    ) -> None:
        self.batches, self.wall_seconds = batches, wall_seconds
        self.rows = [
            Row(name, calls, seconds, seconds / max(batches, 1), seconds / (wall_seconds or 1.0))
            for name, (calls, seconds) in spent.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as plain values, JSON-safe."""
        return {**vars(self), "rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        per_batch = self.wall_seconds / max(self.batches, 1)
        total_share = sum(row.share for row in self.rows)
        rows: list[Any] = [*self.rows, ("all", "", self.wall_seconds, per_batch, total_share)]
        cells = [
            (name, str(calls), f"{seconds:.4f}", f"{per_batch * 1e6:.2f}", f"{share:.1%}")
            for name, calls, seconds, per_batch, share in rows
        ]
        # Padding makes the columns of two profiles equally wide.
        header = " " * 10, "   calls", "  seconds", " us/batch", " share"
        table = format_table(cells, "<>>>>", header=header)
        facts = [f"{self.batches} batches"]
        for name, size in (("host", self.host_peak_bytes), ("device", self.device_peak_bytes)):
            if size is not None:
                facts.append(f"{name} peak {format_bytes(size)}")
        for name, size in self.table_bytes.items():
            facts.append(f"tables {format_bytes(size)} on {name}")
        if self.grouped_on is not None:
            facts.append(f"grouped on {self.grouped_on}")
        facts.append(f"host evaluates in {self.host_form}")
        return f"{table}\n{', '.join(facts)}"

    __repr__ = __str__


class ProfileWatcher:
    """The `RangeWatcher` of a profile.

    GPU work is asynchronous, so the watcher synchronizes the device at both ends of every range.
    """

    def __init__(self, device: Device) -> None:
        self.batches = 0
        self.loop_calls = 0
        self.loop_seconds = 0.0
        self.max_host_bytes = 0
        self.max_device_bytes = 0
        self._device = device
        self._loop_start = 0.0

    def begin(self) -> None:
        """Start the loop's clock."""
        self.measure_memory()
        devices.synchronize(self._device)
        self._loop_start = perf_counter()

    def enter(self) -> float:
        """Wait for the loop's GPU work and stop the loop's clock."""
        devices.synchronize(self._device)
        now = perf_counter()
        self.loop_calls += 1
        self.loop_seconds += now - self._loop_start
        return now

    def before_exit(self, name: str) -> None:
        """Wait for the GPU work of the range."""
        devices.synchronize(self._device)
        # Memory is not read for each returned batch: that would be too slow.
        if name != HAND_OUT:
            self.measure_memory()

    def after_exit(self, now: float) -> None:
        """Restart the loop's clock."""
        self._loop_start = now

    def end(self) -> None:
        """Stop the loop's clock at the end of the profile."""
        devices.synchronize(self._device)
        self.loop_seconds += perf_counter() - self._loop_start

    def measure_memory(self) -> None:
        """Update the peaks with the memory in use."""
        self.max_host_bytes = max(self.max_host_bytes, memory.resident_bytes() or 0)
        device_bytes = memory.allocated_device_bytes(self._device) or 0
        self.max_device_bytes = max(self.max_device_bytes, device_bytes)


@contextmanager
def profile_block(recorder: Recorder, device: Device, profile: Profile) -> Iterator[None]:
    """Watch a recorder until the block ends, then fill the profile."""
    if recorder.watcher is not None:
        raise RuntimeError(
            "a profile of this sampler is already active: end it before you start another"
        )
    host_peak, device_peak = memory.peak_resident_bytes(), memory.peak_device_bytes(device)
    before = _spent(recorder)
    watcher = ProfileWatcher(device)
    recorder.watcher = watcher
    for iterator in list(recorder.iterators):
        iterator.observe_each_batch()
    watcher.begin()
    start = perf_counter()
    try:
        yield
    finally:
        watcher.end()
        wall_seconds = perf_counter() - start
        recorder.watcher = None
        watcher.measure_memory()
        spent = {
            name: (calls - before[name][0], seconds - before[name][1])
            for name, (calls, seconds) in _spent(recorder).items()
        }
        spent[YOUR_LOOP] = watcher.loop_calls, watcher.loop_seconds
        profile.host_peak_bytes = _peak(
            host_peak, memory.peak_resident_bytes(), watcher.max_host_bytes
        )
        profile.device_peak_bytes = _peak(
            device_peak, memory.peak_device_bytes(device), watcher.max_device_bytes
        )
        profile._fill(spent, watcher.batches, wall_seconds)


def _spent(recorder: Recorder) -> dict[str, tuple[int, float]]:
    return {row.name: (row.calls, row.seconds) for row in recorder.ranges}


def _peak(before: int | None, after: int | None, sampled: int) -> int | None:
    """Return the peak memory in bytes, or None if unknown.

    ``before`` and ``after`` are the peaks known at the start and at the end. If the peak has risen,
    return ``after``, else ``sampled``, or None if this is 0.
    """
    if before is not None and after is not None and after > before:
        return after
    return sampled or None


def profile_since_creation(recorder: Recorder, device: Device) -> Profile:
    """Return a profile of everything that a recorder has counted."""
    profile = Profile()
    spent = _spent(recorder)
    profile._fill(spent, recorder.batches, sum(spent[name][1] for name in RANGES))
    profile.host_peak_bytes = memory.peak_resident_bytes()
    profile.device_peak_bytes = _peak(0, memory.peak_device_bytes(device), 0)
    return profile


class ProfiledSampler:
    """The part of a sampler that reports where its time and memory go."""

    _tracker: EpochTracker

    def stats(self) -> Profile:
        """Return the sampler's own time since it was created, by kind of work.

        The times are always recorded. The overhead is negligible, because each measurement covers a
        block of many batches.

        Returns
        -------
        Profile
            ``wall_seconds`` is the total time of the sampler; rows give fractions of it.

        Examples
        --------
        >>> from gpusampler import PatchBatchSampler
        >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
        >>> batches = list(sampler)
        >>> stats = sampler.stats()
        >>> stats.batches, stats.table_bytes["numpy"] > 0
        (3, True)
        """
        return self._add_plan_facts(
            profile_since_creation(self._tracker.recorder, self._tracker.plan.device)
        )

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Profile a ``with`` block: the time of the sampler and of the loop.

        The profile covers every iterator of this sampler in this process, including those of a
        DataLoader and a `PatchTensorLoader`. If several threads draw at the same time, the shares
        sum to more than 1. The block runs slower than the same loop without a profile: every batch
        is timed, and on a GPU every range synchronizes the device.

        Yields
        ------
        Profile
            Filled when the block ends; `str` returns a table.

        Raises
        ------
        RuntimeError
            If a profile of this sampler is already active.

        Examples
        --------
        >>> from gpusampler import PatchBatchSampler
        >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
        >>> with sampler.profile() as p:
        ...     batches = list(sampler)
        >>> p.batches, p.rows[-1].name
        (3, 'your_loop')
        """
        profile = Profile()
        try:
            with profile_block(self._tracker.recorder, self._tracker.plan.device, profile):
                yield profile
        finally:
            self._add_plan_facts(profile)

    def _add_plan_facts(self, profile: Profile) -> Profile:
        plan = self._tracker.plan
        profile.table_bytes = plan.table_bytes
        grouped_on = plan.groups.grouped_on
        profile.grouped_on = None if grouped_on is None else str(grouped_on)
        return profile
