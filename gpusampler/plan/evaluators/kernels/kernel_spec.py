"""What a kernel is compiled for, and how a launch is cut into blocks: plain numbers, no library."""

from __future__ import annotations

from typing import NamedTuple

from gpusampler.batching.tables import PatchTables
from gpusampler.permutation.reference import SMALL, rounds_for
from gpusampler.plan.evaluators.base import EvaluatorSettings

SLOTS_AS_THEY_ARE, SLOTS_FISHER_YATES, SLOTS_32_BIT, SLOTS_64_BIT = range(4)


class KernelSpec(NamedTuple):
    """What a kernel is compiled for; the same names as macros of CUDA C and arguments of Triton.

    Attributes
    ----------
    slots : int
        How slots are permuted: not, by Fisher-Yates, on a grid of 32-bit or of 64-bit slots.
    located : bool
        Whether rows are told as batches of patches, and not as slots.
    passes : bool
        Whether rows are of a pass over their patch each, told like it, and not of the epoch.
    samples : bool
        Whether samples are permuted inside their patches.
    small : int
        Power of two that no patch of up to 32 samples exceeds; 0 if there is no such patch.
    fewest, most : int
        Pairs of rounds of the largest patch, and of the smallest above 32; 0 if there is none.
    ordered : bool
        Whether samples are looked up in an order.
    ragged : bool
        Whether rows lie end to end, each as long as it is.
    pad : bool
        Whether a ragged row is as long as its patch's size.
    epoch_on_device : bool
        Whether the epoch is read from the device (Triton only).
    """

    slots: int
    located: bool
    passes: bool
    samples: bool
    small: int
    fewest: int
    most: int
    ordered: bool
    ragged: bool
    pad: bool
    epoch_on_device: bool

    @classmethod
    def of(
        cls,
        tables: PatchTables,
        settings: EvaluatorSettings,
        *,
        ragged: bool,
        located: bool = False,
        passes: bool = False,
        epoch_on_device: bool = False,
    ) -> KernelSpec:
        """Return the form for a plan's tables; what no patch of it needs is left out."""
        slots = SLOTS_AS_THEY_ARE
        if not located and settings.shuffle_batches and tables.num_batches > 1:
            if tables.num_batches <= SMALL:
                slots = SLOTS_FISHER_YATES
            else:
                slots = SLOTS_32_BIT if tables.num_batches <= 1 << 32 else SLOTS_64_BIT
        small = fewest = most = 0
        if settings.shuffle_samples and tables.smallest_patch <= SMALL:
            small = power_of_two(max(2, min(tables.largest_patch, SMALL)))
        if settings.shuffle_samples and tables.largest_patch > SMALL:
            fewest = rounds_for(tables.largest_patch) // 2
            most = rounds_for(max(tables.smallest_patch, SMALL + 1)) // 2
        return cls(
            slots=slots,
            located=located,
            passes=passes and settings.shuffle_samples,
            samples=settings.shuffle_samples,
            small=small,
            fewest=fewest,
            most=most,
            ordered=tables.order is not None,
            ragged=ragged,
            pad=ragged and settings.pad,
            epoch_on_device=epoch_on_device,
        )

    def flags(self) -> dict[str, int]:
        """Return the attributes by the names of the macros."""
        return {name.upper(): int(value) for name, value in self._asdict().items()}


class Geometry(NamedTuple):
    """How a launch is cut: ``blocks`` of ``rows`` rows, ``columns`` lanes wide.

    A block covers ``span`` lanes of its rows, so that wide rows are shared by several.
    """

    rows: int
    columns: int
    span: int
    blocks: tuple[int, int]


MAX_BLOCKS = (1 << 16) - 1
"""Blocks side by side, as CUDA has it."""


def triton_geometry(spec: KernelSpec, num_rows: int, width: int) -> Geometry:
    """Return tiles of 1,024 or 2,048 lanes; their shape depends on spec and width alone.

    Each shape is a kernel to compile, so there are few; a training step's single row has its own.
    The larger tile spreads the work of a row over more lanes; where rows are wide, of several
    kinds, or not written 16 bytes at a time, it would not fit in registers.
    """
    columns = power_of_two(width)
    if width > 32:
        # Of the shapes that leave the fewest lanes idle, the widest.
        columns = min((32, 64, 128), key=lambda lanes: (-(-width // lanes) * lanes, -lanes))
    span = max(columns, min(power_of_two(width), 4096), power_of_two(-(-width // MAX_BLOCKS)))
    is_plain = spec.fewest == spec.most and not spec.small and not spec.ragged
    lanes = 2048 if is_plain and span == columns and width % 16 == 0 else 1024
    rows = 1 if spec.epoch_on_device else lanes // columns
    return Geometry(rows, columns, span, (-(-num_rows // rows), -(-width // span)))


THREADS = 256
MOST_ROWS = 64
BLOCK_LANES = 4096


def cuda_geometry(spec: KernelSpec, num_rows: int, width: int) -> Geometry:
    """Return blocks of 256 threads and about 4,096 lanes (constants of ``batches.cu``)."""
    rows = max(1, min(MOST_ROWS, BLOCK_LANES // width, num_rows))
    columns = min(power_of_two(width), max(32, THREADS // power_of_two(rows)))
    span = width if width <= BLOCK_LANES else max(BLOCK_LANES, -(-width // MAX_BLOCKS))
    return Geometry(rows, columns, span, (-(-num_rows // rows), -(-width // span)))


def power_of_two(minimum: int) -> int:
    """Return the smallest power of two that is not below ``minimum >= 1``."""
    return 1 << (minimum - 1).bit_length()
