"""Arrays that are made on one stream and used on others, with streams that only take notes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gpusampler.core.devices import Device
from gpusampler.core.transfer import ReadyArrays

torch = pytest.importorskip("torch")


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class Event:
    recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream


class Array:
    def __init__(self) -> None:
        self.used_on: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as `ReadyArrays` sees it: which stream is current, and whether it is captured."""
    state = SimpleNamespace(current=Stream(1), capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_the_stream_that_made_them_waits_for_nothing(cuda):
    array = Array()
    ready = ReadyArrays(Device("torch", "cuda:0"), [array])
    ready.wait()
    assert cuda.current.waited == []
    assert array.used_on == []


def test_another_stream_waits_once_and_keeps_them_in_memory(cuda):
    first, array = cuda.current, Array()
    ready = ReadyArrays(Device("torch", "cuda:0"), [array])
    cuda.current = second = Stream(4)
    ready.wait()
    ready.wait()
    assert [event.recorded_on for event in second.waited] == [first]
    assert array.used_on == [second]
    cuda.current = third = Stream(3)
    ready.wait()
    assert len(third.waited) == 1
    assert array.used_on == [second, third]


def test_a_captured_graph_waits_for_nothing_but_is_not_known_by_that(cuda):
    ready = ReadyArrays(Device("torch", "cuda:0"), [Array()])
    cuda.current, cuda.capturing = Stream(4), True
    ready.wait()
    assert cuda.current.waited == []
    cuda.capturing = False
    ready.wait()
    assert len(cuda.current.waited) == 1


@pytest.mark.parametrize("device", [Device("torch", "cpu"), Device("numpy")])
def test_the_host_has_no_streams(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("no stream"))
    ReadyArrays(device, [object()]).wait()


def test_the_per_thread_stream_is_another_one_in_every_thread(cuda):
    cuda.current = Stream(2)
    ready = ReadyArrays(Device("torch", "cuda:0"), [Array()])
    # The same pointer in another thread.
    cuda.current = Stream(2)
    ready.wait()
    ready.wait()
    assert len(cuda.current.waited) == 2
