"""Launching all of an engine at once, by a stand-in for CuPy that keeps what is enqueued."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from sd_engines.backends.cuda import Replay, named_stream

if TYPE_CHECKING:
    from collections.abc import Callable


class Graph:
    def __init__(self, work: list[str]) -> None:
        self.work = work

    def launch(self, stream: Stream) -> None:
        stream.done += [f"graph of {' '.join(self.work)}"]


class Stream:
    def __init__(self, device: Device, *, non_blocking: bool) -> None:
        self.ptr = len(device.streams) + 1
        self.non_blocking = non_blocking
        self.done: list[str] = []
        self.captured: list[str] | None = None
        self.waited_for = 0
        device.streams.append(self)

    def synchronize(self) -> None:
        self.waited_for = len(self.done)

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> Graph:
        assert self.captured is not None
        work, self.captured = self.captured, None
        if "wait" in work:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
        return Graph(work)

    def enqueue(self, kernel: str) -> None:
        (self.done if self.captured is None else self.captured).append(kernel)


class Device:
    """What of ``cupy.cuda`` is used."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.current: Any = type("Default", (), {"ptr": 0})

    def Stream(self, *, non_blocking: bool) -> Stream:  # noqa: N802 - CuPy's name
        return Stream(self, non_blocking=non_blocking)

    def get_current_stream(self) -> Any:
        return self.current

    def enqueue(self, *kernels: str) -> Callable[[int], None]:
        """What enqueues ``kernels`` on the stream at an address."""

        def enqueue(stream: int) -> None:
            for kernel in kernels:
                if kernel == "fail":
                    raise RuntimeError("the plan could not be run")
                self.streams[stream - 1].enqueue(kernel)

        return enqueue


def test_all_at_once_from_the_second_time() -> None:
    device = Device()
    replay, stream = Replay(device.enqueue("a", "b"), device), named_stream(device)
    for _ in range(3):
        replay.run(stream)
    assert stream.done == ["a", "b", "graph of a b", "graph of a b"]
    assert stream.waited_for == 2, "for the first run, before it is captured, and for no other"
    (capturing,) = device.streams[1:]
    assert capturing.non_blocking
    assert not capturing.done
    other = device.Stream(non_blocking=True)
    replay.run(other)
    assert other.done == ["graph of a b"]


def test_what_cannot_be_captured_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    replay, stream = Replay(device.enqueue("a", "wait"), device), named_stream(device)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            replay.run(stream)
    assert stream.done == ["a", "wait"] * 3
    assert all(each.captured is None for each in device.streams)
    assert ["CaptureInvalidated" in record.message for record in caplog.records] == [True]


def test_a_capture_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: Stream) -> None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")

    device = Device()
    monkeypatch.setattr(Stream, "begin_capture", refuse)
    replay, stream = Replay(device.enqueue("a"), device), named_stream(device)
    for _ in range(3):
        replay.run(stream)
    assert stream.done == ["a"] * 3


def test_work_that_fails_is_not_captured() -> None:
    device = Device()
    replay, stream = Replay(device.enqueue("fail"), device), named_stream(device)
    with pytest.raises(RuntimeError, match="could not be run"):
        replay.run(stream)
    assert len(device.streams) == 1


def test_named_stream() -> None:
    device = Device()
    ours = named_stream(device)
    assert not ours.non_blocking  # ordered with the default one, which it stands beside
    assert named_stream(device) is ours
    device.current = device.Stream(non_blocking=True)
    assert named_stream(device) is device.current
