"""Helpers for code that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpusampler.core.devices import Device, loaded_module


def is_compiling() -> bool:
    """Whether torch.compile is currently tracing."""
    torch = loaded_module("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def check_counter(value: Any, name: str, device: Device) -> None:
    """Raise TypeError or ValueError unless ``value`` is a 0-d int64 torch tensor on ``device``."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a 0-d int64 tensor, got {type(value).__name__}")
    if value.dtype != torch.int64 or value.ndim != 0:
        raise TypeError(
            f"{name} must be a 0-d int64 tensor, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if value.device != torch.device(device.name):
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def untraced(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that torch.compile calls without tracing it."""
    import torch

    compiler: Any = torch.compiler
    disabled: Callable[[], None] = compiler.disable(function)
    return disabled


def keep_in_place(array: Any) -> None:
    """Mark a tensor's address as static for torch.compile.

    Captured CUDA graphs would otherwise copy the whole tensor at every replay.
    """
    from torch._dynamo import mark_static_address

    mark_static_address(array)
