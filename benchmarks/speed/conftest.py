from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.ratios import Ratio, compare

os.environ.setdefault("OMP_NUM_THREADS", "1")

_TABLE: list[Ratio] = []


def pytest_xdist_auto_num_workers() -> int:
    """Measure alone."""
    return 0


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def against(benchmark: Any) -> Callable[..., None]:
    """Compare ours with a baseline, and put the line into the table."""

    def run(*args: Any, **kwargs: Any) -> None:
        result = compare(benchmark, *args, **kwargs)
        if result is not None:
            _TABLE.append(result)

    return run


@pytest.fixture(scope="session")
def rng() -> np.random.Generator:
    return np.random.default_rng(2026)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _TABLE:
        return
    import torch

    terminalreporter.section("ratios (ours / baseline, best of several, one thread)")
    terminalreporter.write_line(
        f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, torch {torch.__version__}"
    )
    for line in _TABLE:
        terminalreporter.write_line(str(line))
