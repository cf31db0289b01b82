"""Profile: where the time of a loop, or of a sampler since it was made, has gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

from gpusampler.core import devices, memory
from gpusampler.core.devices import Device
from gpusampler.core.text import human
from gpusampler.core.tracing import HAND_OUT, RANGES, Recorder

YOUR_LOOP = "your_loop"
"""The time between batches, which is the caller's."""


class Row(NamedTuple):
    """A line of a `Profile`.

    Attributes
    ----------
    name : str
        "load_ids", "group", "evaluate", "transfer", "hand_out" or "your_loop".
    calls : int
        Blocks of work, of many batches each. While a profile lasts, batches are handed out one by
        one, and each is a call; the calls of your loop are the times it took between batches.
    seconds : float
    per_batch : float
        Seconds.
    share : float
        Of the profile's ``wall_seconds``: 0 .. 1.
    """

    name: str
    calls: int
    seconds: float
    per_batch: float
    share: float


class Profile:
    """Where time and memory went. `str` makes a table of it.

    Attributes
    ----------
    rows : list of Row
        Empty until the block of `PatchBatchSampler.profile` has ended.
    batches : int
        Handed out in the block; for `PatchBatchSampler.stats`, made.
    wall_seconds : float
        Of the block; for ``stats``, what the sampler itself has taken since it was made.
    host_peak_bytes : int or None
        The process's most memory in the block, as seen when ranges end, or exactly, where it was
        the most ever; for ``stats``, the most ever. None where the system does not say.
    device_peak_bytes : int or None
        The same for what is given out on the sampler's GPU by its library. None without one.
    table_bytes : dict of str to int
        What the sampler's tables take, by device.

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

    def _fill(self, spent: Mapping[str, tuple[int, float]], batches: int, wall: float) -> None:
        self.batches, self.wall_seconds = batches, wall
        self.rows = [
            Row(name, calls, took, took / max(batches, 1), took / wall if wall else 0.0)
            for name, (calls, took) in spent.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, JSON-safe."""
        return {**vars(self), "rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        """Return the table."""
        lines = [f"{'':<10} {'calls':>9} {'seconds':>10} {'us/batch':>10} {'share':>7}"]
        lines += [
            f"{row.name:<10} {row.calls:>9} {row.seconds:>10.4f} {row.per_batch * 1e6:>10.2f} "
            f"{row.share:>7.1%}"
            for row in self.rows
        ]
        total = sum(row.share for row in self.rows)
        per_batch = self.wall_seconds / max(self.batches, 1)
        lines.append(
            f"{'all':<10} {'':>9} {self.wall_seconds:>10.4f} {per_batch * 1e6:>10.2f} {total:>7.1%}"
        )
        said = [f"{self.batches} batches"]
        for what, size in (("host", self.host_peak_bytes), ("device", self.device_peak_bytes)):
            if size is not None:
                said.append(f"{what} peak {human(size)}")
        said += [f"tables {human(size)} on {on}" for on, size in self.table_bytes.items()]
        return "\n".join([*lines, ", ".join(said)])

    __repr__ = __str__


class ProfileWatcher:
    """The `telemetry.Watch` of a profile.

    On a GPU, work goes on after the call that began it: the end of every range waits for it, and so
    does its beginning, for what the loop has begun.
    """

    def __init__(self, device: Device) -> None:
        self.batches = 0
        self.pauses = 0
        self.paused = 0.0
        self.peak_seen = 0
        self.device_peak_seen = 0
        self._device = device
        self._since = 0.0

    def begin(self) -> None:
        """Begin the loop's time."""
        self.look()
        devices.synchronize(self._device)
        self._since = perf_counter()

    def entered(self) -> float:
        """Wait for what the loop has begun; its time ends here."""
        devices.synchronize(self._device)
        now = perf_counter()
        self.pauses += 1
        self.paused += now - self._since
        return now

    def leaving(self, name: str) -> None:
        """Wait for what the range has begun."""
        devices.synchronize(self._device)
        # Batches are handed out too often for that.
        if name != HAND_OUT:
            self.look()

    def left(self, now: float) -> None:
        """Begin the loop's time again."""
        self._since = now

    def end(self) -> None:
        """End the loop's time for good."""
        devices.synchronize(self._device)
        self.paused += perf_counter() - self._since

    def look(self) -> None:
        """See how much memory is taken."""
        self.peak_seen = max(self.peak_seen, memory.resident() or 0)
        taken = memory.taken_on_device(self._device) or 0
        self.device_peak_seen = max(self.device_peak_seen, taken)


@contextmanager
def profiled(recorder: Recorder, device: Device, profile: Profile) -> Iterator[None]:
    """Look at a recorder until the block ends, and fill the profile then.

    Raises
    ------
    RuntimeError
        If another profile of the same sampler has not ended.
    """
    if recorder.watch is not None:
        raise RuntimeError("profile must end before another of the same sampler begins")
    highest, highest_there = memory.peak_resident(), memory.peak_on_device(device)
    before = {row.name: (row.calls, row.seconds) for row in recorder.ranges}
    looking = ProfileWatcher(device)
    recorder.watch = looking
    for iterator in list(recorder.iterators):
        iterator.hold()
    looking.begin()
    began = perf_counter()
    try:
        yield
    finally:
        looking.end()
        wall = perf_counter() - began
        recorder.watch = None
        looking.look()
        spent = {
            row.name: (row.calls - before[row.name][0], row.seconds - before[row.name][1])
            for row in recorder.ranges
        }
        spent[YOUR_LOOP] = looking.pauses, looking.paused
        profile.host_peak_bytes = _peak(highest, memory.peak_resident(), looking.peak_seen)
        there = memory.peak_on_device(device)
        profile.device_peak_bytes = _peak(highest_there, there, looking.device_peak_seen)
        profile._fill(spent, looking.batches, wall)


def _peak(before: int | None, after: int | None, seen: int) -> int | None:
    """Return a high-water mark if it rose, else the most that was seen."""
    if before is not None and after is not None and after > before:
        return after
    return seen or None


def since_made(recorder: Recorder, device: Device) -> Profile:
    """Return what a recorder has counted."""
    profile = Profile()
    spent = {row.name: (row.calls, row.seconds) for row in recorder.ranges}
    profile._fill(spent, recorder.batches, sum(spent[name][1] for name in RANGES))
    profile.host_peak_bytes = memory.peak_resident()
    profile.device_peak_bytes = _peak(0, memory.peak_on_device(device), 0)
    return profile
