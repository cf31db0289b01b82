"""Compile-time settings of a kernel, and how a launch is divided into blocks."""

from __future__ import annotations

from typing import NamedTuple

from gpusampler.batching.tables import PatchTables
from gpusampler.permutation.reference import SMALL, rounds_for
from gpusampler.plan.evaluators.base import EvaluatorSettings

SLOTS_AS_THEY_ARE, SLOTS_FISHER_YATES, SLOTS_32_BIT, SLOTS_64_BIT = range(4)


class KernelSpec(NamedTuple):
    """Compile-time settings of a kernel: macros in CUDA C and constants in Triton, by these names.

    ``slots``: how slots are permuted: not at all (0), by Fisher-Yates (1), on a grid of 32-bit
    slots (2), or on a grid of 64-bit slots (3). ``located``: rows are given as batches of patches,
    not as slots. ``passes``: each row has its own pass over its patch; otherwise the epoch is the
    pass. ``samples``: samples are permuted inside patches. ``small``: a power of two, at least the
    size of every patch of up to 32 samples; 0 if there is no such patch. ``fewest``: number of
    pairs of permutation rounds for the largest patch; ``most``: the same for the smallest patch
    above 32 samples; both are 0 if no patch has more than 32 samples. ``ordered``: samples are
    looked up in the groups' order. ``ragged``: rows are stored end to end, each with its own
    length. ``pad``: the length of a ragged row is the batch size of its patch. ``epoch_on_device``:
    the kernel reads the epoch from device memory (Triton only).
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
        """Return the spec for a plan's tables, without anything that none of its patches needs."""
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
        """Return the values by macro name."""
        return {name.upper(): int(value) for name, value in self._asdict().items()}


class Geometry(NamedTuple):
    """Division of a launch into blocks; a lane is one element of a row.

    A block evaluates ``rows`` rows, ``columns`` lanes at a time, up to ``span`` lanes of each row.
    Wider rows are divided among several blocks. ``blocks``: the number of blocks that divide the
    rows, and the number of blocks that divide the lanes of a row.
    """

    rows: int
    columns: int
    span: int
    blocks: tuple[int, int]


MAX_BLOCKS = (1 << 16) - 1
"""CUDA's limit on the number of blocks in the second dimension of a launch."""


def triton_geometry(spec: KernelSpec, num_rows: int, width: int) -> Geometry:
    """Return tiles of 1,024 or 2,048 lanes; their shape depends only on spec and width.

    Each shape is compiled separately, so there are only a few; `batch`, with its single row, uses a
    shape of its own. The larger tile spreads the work of a row over more lanes, but would not fit
    in registers if rows are wide, need different permutations, or are not written 16 bytes at a
    time.
    """
    columns = power_of_two(width)
    if width > 32:
        # The widest of the shapes with the fewest idle lanes.
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
    """Return the smallest power of two that is at least ``minimum >= 1``."""
    return 1 << (minimum - 1).bit_length()
