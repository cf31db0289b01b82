"""The real data sets in ``docs/data``, as the benchmarks read them."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that the package under test is the installed one.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import make_data, real_data
from benchmarks.make_data import ORIGINS, OUT
from benchmarks.real_data import even_sizes, load, sizes_of

__all__ = ["ORIGINS", "OUT", "even_sizes", "load", "make_data", "real_data", "sizes_of"]
