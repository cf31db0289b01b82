"""torch where it is installed; where it is not, whatever touches it is skipped, visibly."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import array_api_compat.numpy
import pytest


class MissingTorch:
    """Stands for torch: a test runs up to where it needs it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "pytest" in name:  # pytest, looking for fixtures
            raise AttributeError(name)
        pytest.skip("torch is not installed")


if find_spec("torch"):
    import array_api_compat.torch
    import torch

    torch_namespace: Any = array_api_compat.torch
else:
    torch: Any = MissingTorch()
    torch_namespace = torch

every_namespace = pytest.mark.parametrize(
    "xp",
    [
        pytest.param(array_api_compat.numpy, id="numpy"),
        pytest.param(
            torch_namespace,
            id="torch",
            marks=pytest.mark.skipif(torch_namespace is torch, reason="torch is not installed"),
        ),
    ],
)
