"""What a context does that its callers from C cannot see on every machine."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest

from sd_engines.errors import BackendError
from sd_runtime import Request, engines
from sd_runtime.embed.context import Context

if TYPE_CHECKING:
    from conftest import TinyModel
    from sd_engines.engine import Engine


def test_the_engines_work_on_the_callers_stream(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = threading.local()

    class ExternalStream:
        def __init__(self, pointer: int) -> None:
            self.pointer = pointer

        def __enter__(self) -> Self:
            current.pointer = self.pointer
            return self

        def __exit__(self, *_: object) -> None:
            current.pointer = None

    opened_on = set()
    open_engine = engines.open_engine

    def watched_open(*arguments: Any, **options: Any) -> Engine:
        opened_on.add(current.pointer)  # in a thread of its own
        return open_engine(*arguments, **options)

    drawn_on = set()
    cuda = SimpleNamespace(
        ExternalStream=ExternalStream,
        is_available=lambda: True,
        get_current_stream=lambda: ExternalStream(current.pointer),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(engines, "open_engine", watched_open)
    bundle = str(tiny_model.bundle)
    with Context(bundle, threads=1, queue_size=1, cuda_stream=0x5EED) as context:
        ticket = context.submit(
            Request("a cat", num_inference_steps=3),
            previews=0,
            on_progress=lambda _: drawn_on.add(current.pointer),
        )
        ticket.result.result()
    assert opened_on == {0x5EED}
    assert drawn_on == {0x5EED}
    assert current.pointer is None


def test_a_stream_without_cupy_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="cupy"):
        Context(str(tiny_model.bundle), threads=1, queue_size=1, cuda_stream=1)
