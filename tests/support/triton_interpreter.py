"""Triton's interpreter, without work that it repeats and that changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest


@contextmanager
def interpreter_in_haste() -> Iterator[None]:
    """Let the interpreter run our kernels with the patches and shortcuts below."""
    with pytest.MonkeyPatch.context() as patch:
        for target, name, value in language_patches():
            patch.setattr(target, name, value, raising=False)
        for target, name, value in shortcuts():
            patch.setattr(target, name, value)
        yield


@cache
def language_patches() -> list[tuple[Any, str, Any]]:
    """What the interpreter sets in the language for our kernels: object, name, and value.

    It searches the language for them at each launch and each call of a device function.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    from gpusampler.plan.evaluators.kernels import triton_batches

    patches = []
    # The language of a function is what its module refers to: ours, and that of reductions.
    scopes = [interpreter._patch_lang(each.fn) for each in (triton_batches.batches_kernel, tl.max)]
    for scope in scopes:
        patches += [(target, name, getattr(target, name)) for target, name, _ in scope._changes]
    for scope in reversed(scopes):
        scope.restore()
    return patches


@cache
def shortcuts() -> list[tuple[Any, str, Any]]:
    """What replaces parts of the interpreter: object, name, and value."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    find_dtype, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    dtypes: dict[str, Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}

    # The interpreter makes a table of all types at each look-up.
    def dtype_of(of):
        if of.name not in dtypes:
            dtypes[of.name] = find_dtype(of)
        return dtypes[of.name]

    # It compares shapes number by number, each of which is an object.
    def broadcast_unequal(self, lhs, rhs):
        are_blocks = lhs.type.is_block() and rhs.type.is_block()
        if are_blocks and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    # It makes a type and a shape for each result.
    def type_once(self, element_ty, shape):
        key = element_ty.name, *shape
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        else:
            vars(self).update(types[key])

    def tensor_of_known_shape(self, handle, type):
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    return [
        # It computes sums and products again in 64 bits, for an assertion that is off.
        (builder, "options", replace(builder.options, sanitize_overflow=False)),
        (interpreter, "_get_np_dtype", dtype_of),
        (TritonSemantic, "broadcast_impl_value", broadcast_unequal),
        (tl.block_type, "__init__", type_once),
        (tl.tensor, "__init__", tensor_of_known_shape),
        (interpreter, "_patch_lang", lambda _: SimpleNamespace(restore=lambda: None)),
    ]
