"""Evaluation on a plan's device: by a kernel where there is one, else by array operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, torch_compile
from gpusampler.core.devices import Device
from gpusampler.core.transfer import Ready
from gpusampler.permutation.reference import Streams
from gpusampler.plan.evaluators.array import Reference
from gpusampler.plan.evaluators.base import BatchLocations, Shuffles
from gpusampler.plan.evaluators.kernels.fused import Fused, fused_on

T = TypeVar("T")

_warned: set[tuple[str, str]] = set()
"""Libraries whose kernel could not be built, and why, as this process has said already."""


class Evaluator:
    """Batches of a plan on its device; the methods are those of `Reference`.

    A kernel that cannot be built (no Triton, no compiler, a driver that does not fit) is given up
    with one warning that says why, and array operations make the same batches from then on.

    Parameters
    ----------
    tables : PatchTables
        The plan's, on the host.
    device : Device
    order : integer array, shape (N,), or None
        Samples sorted by patch, anywhere; uploaded if it is elsewhere.
    shuffles : Shuffles
    """

    def __init__(self, tables: PatchTables, device: Device, order: Any, shuffles: Shuffles) -> None:
        self.device = device
        there = tables.on(device, order)
        self._ready = Ready(device, there.members())
        self.reference = Reference(there, device, shuffles)
        # A kernel finds out by itself what slots lead to where that is one permutation and one
        # search; what takes more is found out before.
        self._kernel_locates = (
            shuffles.interleave
            and tables.layout.width == 1
            and tables.classes is None
            and tables.shares is None
        )
        self._parents = there.parents
        self._patch_order: tuple[PatchOrder, PatchOrder, Ready] | None = None
        self._patch_order_before: tuple[PatchOrder, PatchOrder, Ready] | None = None
        self._built: set[tuple[str, str]] = set()
        self.prepared = False
        """Whether `batch` may be traced."""
        self._fused: Fused | None = None
        try:
            self._fused = fused_on(there, device, shuffles)
        except Exception as error:
            # Not only ImportError: what a library's version does not know ends its import, too.
            self._give_up(error)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel does the work; it may turn out at first use that it cannot."""
        return self._fused is not None

    def prepare(self) -> None:
        """Make what `batch` needs beforehand; nothing of it may be made while it is traced."""
        self.reference.prepare_batch()
        # Graphs wait for nothing: what they read must have arrived.
        devices.wait_for(self.device)
        self.prepared = True

    def block(
        self,
        streams: Streams,
        epoch: int,
        slots: Any,
        patch_order: PatchOrder | None,
        dtype: str = "int64",
    ) -> tuple[Any, Any, Any]:
        """Return indices (K, B), lengths (K,) and groups (K,) of the batches at ``slots``.

        ``patch_order``, on the host, is None where batches are interleaved.
        """
        self._ready.wait()
        there = self.uploaded(patch_order)
        found = self._by_kernel(
            ("block", dtype),
            lambda fused: self._block_by_kernel(fused, streams, epoch, slots, there, dtype),
            lambda: self.reference.block(streams, epoch, slots, there, dtype),
        )
        return self._of_patches(found)

    def _of_patches(self, found: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Return batches whose groups are patches, not classes of cost of one."""
        if self._parents is None:
            return found
        indices, lengths, groups = found
        # Indexed by a single number, torch.compile would ask what it is.
        patches = self._parents[groups.reshape(-1)].reshape(groups.shape)
        return indices, lengths, patches

    def _block_by_kernel(
        self,
        fused: Fused,
        streams: Streams,
        epoch: int,
        slots: Any,
        patch_order: PatchOrder | None,
        dtype: str,
    ) -> tuple[Any, Any, Any]:
        if self._kernel_locates:
            return fused.block(streams, epoch, slots, dtype)
        with devices.on(self.device):
            rows = self.reference.locate(streams, epoch, slots, patch_order)
        return fused.located_block(streams, epoch, *rows, dtype)

    def block_by_reference(
        self, streams: Streams, epoch: int, slots: Any, patch_order: PatchOrder | None
    ) -> tuple[Any, Any, Any]:
        """Return `block` by array operations, whatever there is."""
        self._ready.wait()
        there = self.uploaded(patch_order)
        return self._of_patches(self.reference.block(streams, epoch, slots, there))

    def ragged(self, streams: Streams, epoch: int, at: BatchLocations) -> Any:
        """Return the samples of located batches end to end, ``at.size`` of each."""
        self._ready.wait()
        return self._by_kernel(
            ("ragged", "int64"),
            lambda fused: fused.ragged(streams, epoch, at, located=not self._kernel_locates),
            lambda: self.reference.ragged(streams, epoch, at),
        )

    def batch(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        """Return indices (B,), length and group of one batch; ``epoch`` and ``slot`` are 0-d."""
        if torch_compile.is_compiling():
            return self._of_patches(self.reference.batch(streams, epoch, slot))
        self._ready.wait()
        if not self._kernel_locates:
            return self._of_patches(self.reference.batch(streams, epoch, slot))
        found = self._by_kernel(
            ("batch", "int64"),
            lambda fused: fused.batch(streams, epoch, slot),
            lambda: self.reference.batch(streams, epoch, slot),
        )
        return self._of_patches(found)

    def uploaded(self, patch_order: PatchOrder | None) -> PatchOrder | None:
        """Return an epoch's order of the patches on the device; the last one is kept."""
        if patch_order is None:
            return None
        if self._patch_order is None or self._patch_order[0] is not patch_order:
            # Another stream may still read the one before.
            self._patch_order_before = self._patch_order
            there = PatchOrder(*(arrays.upload(part, self.device) for part in patch_order))
            self._patch_order = patch_order, there, Ready(self.device, list(there))
        self._patch_order[2].wait()
        return self._patch_order[1]

    def _by_kernel(
        self, form: tuple[str, str], run: Callable[[Fused], T], instead: Callable[[], T]
    ) -> T:
        if self._fused is None:
            return instead()
        try:
            found = run(self._fused)
        except Exception as error:
            # Once it has run, a failure is no matter of building it.
            if form in self._built or devices.is_out_of_memory(error):
                raise
            self._give_up(error)
            return instead()
        self._built.add(form)
        return found

    def _give_up(self, error: Exception) -> None:
        # A compiler says what is wrong in the last of many lines.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if len(reason) > 600:
            reason = f"{reason[:200]} ... {reason[-400:]}"
        said = self.device.library, reason
        if said not in _warned:
            # Where the warning is an error, every use is: the kernel is not given up.
            warnings.warn(
                f"the kernel for {self.device} could not be built, so array operations make the "
                f"same batches, more slowly: {reason}",
                stacklevel=2,
            )
            _warned.add(said)
        self._fused = None
