"""The long form runs only where it is asked for, and says so where it is not."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "battery" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="the long form takes minutes: pytest -m battery")
    for item in items:
        if item.get_closest_marker("battery"):
            item.add_marker(skip)
