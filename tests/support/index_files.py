"""Index files in parts that a test changes, written again with right checksums."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from support.oracle import mix

START, ORDER = 24, 1 << 14
"""Where the header's text and the order begin."""
BLOCK = 1 << 16


def block_sums(order: bytes) -> list[int]:
    """Checksums of the blocks of an order, by their definition."""
    blocks = [order[first : first + BLOCK] for first in range(0, len(order), BLOCK)]
    return [
        sum(word * mix(i + 1) for i, (word,) in enumerate(struct.iter_unpack("<I", block))) % 2**64
        for block in blocks
    ]


class IndexFile:
    """The parts of an index file: ``head``, ``order``, ``tables`` (three columns) and ``names``."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        size = struct.unpack_from("<I", data, 16)[0]
        self.path = path
        self.lies: dict[str, Any] = {}
        """Fields of the header that are written as they are, even if they fit nothing."""
        self.head: dict[str, Any] = json.loads(data[START : START + size])
        end = ORDER + self.head["order_bytes"]
        self.order = bytearray(data[ORDER:end])
        patches = self.head["num_patches"]
        self.tables = np.frombuffer(data, "<i8", 3 * patches, end).reshape(3, patches).copy()
        self.patch_ids, self.counts, self.starts = self.tables
        rest = data[end + 24 * patches :]
        # Version 1 has no checksums of blocks.
        num_sums = -(-len(self.order) // BLOCK) if self.head["version"] != 1 else 0
        self.names = rest[8 * num_sums :]

    @property
    def samples(self) -> np.ndarray:
        """The order as an array whose changes are written."""
        return np.frombuffer(self.order, self.head["order"] or "<i4")

    def write(self, text: bytes | None = None, tables: bytes | None = None) -> None:
        """Write the file; ``text`` replaces the header's, and ``tables`` all after the order."""
        if tables is None:
            sums = block_sums(bytes(self.order)) if self.head["version"] != 1 else []
            tables = self.tables.tobytes() + np.array(sums, "<u8").tobytes() + self.names
        if text is None:
            sizes = {"tables_bytes": len(tables), "tables_crc": zlib.crc32(tables)}
            text = json.dumps({**self.head, **sizes, **self.lies}).encode()
        head = b"gpusampler index" + struct.pack("<II", len(text), zlib.crc32(text)) + text
        self.path.write_bytes(head.ljust(ORDER) + self.order + tables)


def flip(path: Path, places: Iterable[tuple[int, int]]) -> None:
    """Flip bits of a file: (byte, bit) each."""
    data = bytearray(path.read_bytes())
    for at, bit in places:
        data[at] ^= 1 << bit
    path.write_bytes(data)
