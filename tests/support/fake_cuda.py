"""torch's CUDA on a machine that has none: tensors without memory, every operation recorded.

Tensors say that they are on a device while the current device is another one, so code that relies
on the current device is noticed. The Triton kernel is recorded instead of launched.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpusampler.core import transfer
from gpusampler.plan.evaluators.kernels import triton_batches

DEVICE = "cuda:1"
"""Where tensors are; the current device is 0."""

KERNEL, OPERATION, UPLOAD, DOWNLOAD, WAIT = "kernel", "operation", "upload", "download", "wait"

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand"),
    *("lift_fresh", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t"),
    *("transpose", "unbind", "unflatten", "unfold", "unsafe_split_with_sizes", "unsqueeze"),
    *("view", "view_as_real"),
}
# Their result, or its size, depends on values that the host has to read.
READ_BY_HOST = {
    *("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"),
    *("_unique2", "unique_consecutive", "unique_dim"),
}


class Entry(NamedTuple):
    """Something recorded; ``devices`` are those of the tensors in and out."""

    kind: str
    name: str
    devices: frozenset[str] = frozenset()
    current_device: int = 0


class Stream:
    """What `torch.cuda.Stream` is, as far as the package uses it."""

    def __init__(self, cuda: FakeCuda, device: Any = None) -> None:
        self._cuda = cuda
        self.device = torch.device("cuda:0" if device is None else device)
        cuda.num_streams += 1
        self.cuda_stream = cuda.num_streams

    def wait_event(self, event: Any) -> None:
        """Only the stream waits."""

    def wait_stream(self, stream: Any) -> None:
        """Only the stream waits."""

    def synchronize(self) -> None:
        self._cuda.add(WAIT, "Stream.synchronize")


class Event:
    def __init__(self, cuda: FakeCuda, **_: Any) -> None:
        self._cuda = cuda

    def record(self, stream: Any = None) -> None:
        """Only the stream does something."""

    def synchronize(self) -> None:
        self._cuda.add(WAIT, "Event.synchronize")


class FakeCuda(TorchDispatchMode):
    """Two devices; ``log`` has what was done since it was last cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Entry] = []
        self.num_streams = 0
        self.current_device = 0
        self._streams: dict[int, Stream] = {}
        self._pinned: dict[int, Any] = {}

    def add(self, kind: str, name: str, devices: frozenset[str] = frozenset()) -> None:
        self.log.append(Entry(kind, name, devices, self.current_device))

    def take(self) -> list[Entry]:
        """Return the log and clear it."""
        log, self.log = self.log, []
        return log

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        previous, self.current_device = self.current_device, torch.device(device).index or 0
        try:
            yield
        finally:
            self.current_device = previous

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index or 0
        previous, self._streams[index] = self.current_stream(index), stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self._streams[index] = previous

    def current_stream(self, device: Any = None) -> Stream:
        index = self.current_device if device is None else torch.device(device).index or 0
        if index not in self._streams:
            self._streams[index] = Stream(self, f"cuda:{index}")
        return self._streams[index]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        taken = _tensors_in((args, kwargs))
        if name in READ_BY_HOST and _on_cuda(taken):
            # Before the call: without values it raises.
            self.add(WAIT, name, _devices_of(taken))
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            storage = out.untyped_storage()
            self._pinned[storage._cdata] = storage
        made = _tensors_in(out)
        if func.namespace != "prim" and _on_cuda(taken + made):
            kind = self._kind(name, taken, made, args, kwargs)
            if kind is not None:
                self.add(kind, name, _devices_of(taken + made))
        return out

    def _kind(
        self, name: str, taken: list[Any], made: list[Any], args: Any, kwargs: Any
    ) -> str | None:
        if name in ALLOCATIONS | VIEWS | READ_BY_HOST:
            return None
        if name not in ("copy_", "_to_copy"):
            return OPERATION
        source, target = taken[-1], made[0]
        if source.device == target.device:
            return OPERATION
        is_asynchronous = args[2:3] == (True,) if name == "copy_" else kwargs.get("non_blocking")
        on_host = source if source.device.type == "cpu" else target
        is_pinned = on_host.untyped_storage()._cdata in self._pinned
        if not (is_asynchronous and is_pinned):
            return WAIT
        return UPLOAD if on_host is source else DOWNLOAD


def _tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _devices_of(tensors: list[torch.Tensor]) -> frozenset[str]:
    return frozenset(str(tensor.device) for tensor in tensors)


def _on_cuda(tensors: list[torch.Tensor]) -> bool:
    return any(tensor.device.type == "cuda" for tensor in tensors)


class RecordedKernel:
    """What ``@triton.jit`` makes of the kernel is to the package."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self._name = cuda, name

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            tensors = _tensors_in(args)
            assert all(tensor.is_contiguous() for tensor in tensors)
            # Triton types an integer by its value; the kernel takes 32 bits.
            assert all(-(1 << 31) <= each < 1 << 31 for each in args if isinstance(each, int))
            self._cuda.add(KERNEL, self._name, _devices_of(tensors))

        return launch


# Of the functions of tensors that the package uses, these ask for CUDA before they dispatch.
_getitem, _setitem = torch.Tensor.__getitem__, torch.Tensor.__setitem__


def copy_by_operations(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
    return torch.ops.aten.copy_.default(tensor, source, non_blocking)


def read_by_operations(name: str) -> Any:
    """Return the method of that name, which reads a value."""
    method = getattr(torch.Tensor, name)

    def read(tensor: Any) -> Any:
        if tensor.device.type == "cpu":
            return method(tensor)
        return torch.ops.aten._local_scalar_dense.default(tensor)

    return read


def index_by_operations(tensor: Any, index: Any) -> Any:
    if tensor.device.type == "cpu":
        return _getitem(tensor, index)
    aten = torch.ops.aten
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
        at = parts.index(Ellipsis)
        num_used = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (tensor.dim() - num_used)
    dimension, gathers = 0, []
    for part in parts:
        if part is None:
            tensor = aten.unsqueeze.default(tensor, dimension)
        elif isinstance(part, slice):
            if part != slice(None):
                limits = part.start, part.stop, part.step or 1
                tensor = aten.slice.Tensor(tensor, dimension, *limits)
        elif isinstance(part, torch.Tensor):
            if part.dim() == 0:
                # torch reads a single number on the host.
                aten._local_scalar_dense.default(part)
            gathers += [None] * (dimension - len(gathers)) + [part]
        else:
            tensor = aten.select.int(tensor, dimension, int(part))
            continue
        dimension += 1
    return aten.index.Tensor(tensor, gathers) if gathers else tensor


def assign_by_operations(tensor: Any, index: Any, value: Any) -> None:
    if tensor.device.type == "cpu":
        _setitem(tensor, index, value)
    elif isinstance(value, torch.Tensor):
        index_by_operations(tensor, index).copy_(value)
    else:
        index_by_operations(tensor, index).fill_(value)


@contextmanager
def fake_cuda(*, records: bool = True) -> Iterator[FakeCuda]:
    """Let torch believe in two CUDA devices; tensors have no values.

    torch.compile traces only if operations and kernels are not recorded.
    """
    cuda = FakeCuda()
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "get_device_capability": lambda *_: (9, 0),
        "device_count": lambda: 2,
        "current_device": lambda: cuda.current_device,
        "current_stream": cuda.current_stream,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: cuda.add(WAIT, "synchronize"),
        "Stream": lambda device=None, **_: Stream(cuda, device),
        "Event": lambda **_: Event(cuda),
        "stream": cuda.stream,
        "device": cuda.device,
        "mem_get_info": lambda *_: (100 << 30, 140 << 30),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in ("__bool__", "__float__", "__index__", "__int__", "item", "tolist"):
            method = read_by_operations(name)
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        for name, value in {
            "__getitem__": index_by_operations,
            "__setitem__": assign_by_operations,
            "copy_": copy_by_operations,
            "pin_memory": lambda tensor, *_: torch.empty_like(tensor, pin_memory=True),
            "record_stream": lambda tensor, stream: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        # One per process otherwise, which would outlive this.
        transfer.side_stream.cache_clear()
        stack.callback(transfer.side_stream.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if records:
            for name in ("batches_kernel", "patch_order_kernel"):
                kernel = RecordedKernel(cuda, name)
                stack.enter_context(mock.patch.object(triton_batches, name, kernel))
            stack.enter_context(cuda)
        yield cuda


def counts_of(log: list[Entry]) -> Counter[str]:
    return Counter(entry.kind for entry in log)
