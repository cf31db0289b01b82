"""The gate, with functions of the package made to take twice as long; `test_gate.py` runs it.

python -m benchmarks.slow_down gpusampler.permutation.host:permute_ranges [...] -- [OPTIONS]

OPTIONS are those of the gate.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from benchmarks import gate


def slowed(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function, which then goes on to burn as much time as it took."""

    @wraps(call)
    def twice(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = call(*args, **kwargs)
        stop = time.process_time()
        while time.process_time() - stop < stop - start:
            pass
        return result

    return twice


def plant(place: str) -> None:
    """Slow a function or a method down, under whatever names modules of the package have it."""
    module, path = place.split(":")
    owner = importlib.import_module(module)
    *way, name = path.split(".")
    for step in way:
        owner = getattr(owner, step)
    call = getattr(owner, name)
    slow = slowed(call)
    setattr(owner, name, slow)
    for module_object in [m for n, m in sys.modules.items() if n.partition(".")[0] == "gpusampler"]:
        for key, value in list(vars(module_object).items()):
            if value is call:
                setattr(module_object, key, slow)
            elif isinstance(value, dict):
                value.update({k: slow for k, v in value.items() if v is call})


def main() -> int:
    """Plant, then run the gate."""
    until = sys.argv.index("--")
    for place in sys.argv[1:until]:
        plant(place)
    return gate.main(sys.argv[until + 1 :])


if __name__ == "__main__":
    sys.exit(main())
