"""What a context does that its callers from C cannot see on every machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from sd_engines.errors import BackendError, ConfigError
from sd_runtime import Request, engines
from sd_runtime.decoder import Decoder
from sd_runtime.embed.context import Context
from streams import Stream, put_engines_on_a_gpu, put_in_place_of_cupy

if TYPE_CHECKING:
    from conftest import TinyModel
    from sd_engines.engine import Engine


def test_the_engines_work_on_the_callers_stream(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place_of_cupy(monkeypatch)
    put_engines_on_a_gpu(monkeypatch)
    open_engine, draw = engines.open_engine, Decoder.draw
    opened_on, drawn_on, between = set(), set(), set()

    def watched_open(*arguments: Any, **options: Any) -> Engine:
        opened_on.add(Stream.current().ptr)  # in a thread of its own
        return open_engine(*arguments, **options)

    def watched_draw(*arguments: Any, **options: Any) -> Any:
        drawn_on.add(Stream.current().ptr)
        return draw(*arguments, **options)

    monkeypatch.setattr(engines, "open_engine", watched_open)
    monkeypatch.setattr(Decoder, "draw", watched_draw)
    with Context(str(tiny_model.bundle), threads=1, queue_size=1, cuda_stream=0x5EED) as context:
        ticket = context.submit(
            Request("a cat", num_inference_steps=3),
            previews=0,
            on_progress=lambda _: between.add(Stream.current().ptr),
        )
        ticket.result.result()
    assert opened_on == {0x5EED}
    assert drawn_on == {0x5EED}
    assert between == {0}, "callbacks are the caller's own code"
    assert Stream.current().ptr == 0


@pytest.mark.parametrize("handle", [1, 2])
def test_default_streams_are_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, handle: int
) -> None:
    put_in_place_of_cupy(monkeypatch)
    with pytest.raises(ConfigError, match="default stream"):
        Context(str(tiny_model.bundle), threads=1, queue_size=1, cuda_stream=handle)


def test_a_stream_without_cupy_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="cupy"):
        Context(str(tiny_model.bundle), threads=1, queue_size=1, cuda_stream=0x5EED)
