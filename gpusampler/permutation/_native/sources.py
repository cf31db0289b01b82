"""Sources of the compiled module, and the hash that ties a binary to them.

The build hook runs this file before the package can be imported, so it imports only the standard
library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("native.c", "permutation.h")
MODULE = "native"
"""Name of the compiled module in this folder."""


def source_hash() -> str:
    """Return a hash of the sources, 16 hexadecimal digits; "" if they are not installed."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = FOLDER / name
        if not path.exists():
            return ""
        # Git may check text out with other line ends.
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]
