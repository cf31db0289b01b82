"""PTX of one kernel, run on the CPU with every memory access checked.

`Program` parses PTX, `run` executes it in NumPy, all threads of a block at once.
"""

from __future__ import annotations

from support.ptx.machine import run
from support.ptx.memory import Array, PtxError
from support.ptx.program import Program, UnknownInstructionError

__all__ = ["Array", "Program", "PtxError", "UnknownInstructionError", "run"]
