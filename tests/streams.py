"""CuPy without a GPU: arrays, and what chooses where the work of a thread is enqueued."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sd_runtime import pipeline

if TYPE_CHECKING:
    import pytest

    from sd_engines import Bundle
    from sd_engines.entries import EngineEntry


class Array(np.ndarray):  # type: ignore[type-arg]
    """numpy's, with an address where CuPy has it."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


class Stream:
    """``cupy.cuda.Stream``: entered by a thread, it is that thread's own current one."""

    made = waited_for = 0
    _entered = threading.local()

    def __init__(self, *, non_blocking: bool) -> None:
        type(self).made += 1
        self.non_blocking = non_blocking
        self.ptr = 0xF00 + self.made

    @classmethod
    def from_external(cls, owner: Any) -> Self:
        stream = cls.__new__(cls)
        version, stream.ptr = owner.__cuda_stream__()
        assert version == 0
        return stream

    @classmethod
    def current(cls) -> Any:
        """`get_current_stream`: the default one in a thread that has entered none."""
        entered = cls._stack()
        return entered[-1] if entered else SimpleNamespace(ptr=0)

    @classmethod
    def _stack(cls) -> list[Self]:
        stack: list[Self] = cls._entered.__dict__.setdefault("stack", [])
        return stack

    def synchronize(self) -> None:
        type(self).waited_for += 1

    def __enter__(self) -> Self:
        self._stack().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stack().pop() is self


def put_engines_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines take their engines to be there when they choose a stream."""
    listed_engines = pipeline.listed_engines

    def as_on_a_gpu(bundle: Bundle, component: str, **options: Any) -> list[EngineEntry]:
        return [replace(e, target="cuda") for e in listed_engines(bundle, component, **options)]

    monkeypatch.setattr(pipeline, "listed_engines", as_on_a_gpu)


def put_in_place_of_cupy(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool = True) -> None:
    """``import cupy`` gives this."""

    def current() -> Any:
        if not has_gpu:
            raise RuntimeError("cudaErrorInsufficientDriver")
        return Stream.current()

    cuda = SimpleNamespace(Stream=Stream, is_available=lambda: has_gpu, get_current_stream=current)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
