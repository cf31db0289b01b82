"""Load what all tests share, `support.plugin`, from wherever pytest begins."""

from __future__ import annotations

import pytest


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the plugin; this hook is the first that a conftest is asked."""
    pluginmanager.import_plugin("support.plugin")
