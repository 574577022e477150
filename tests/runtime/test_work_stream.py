"""Where work for a GPU is enqueued, by a stand-in for CuPy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sd_runtime import Pipeline, Request
from sd_runtime.work_stream import NO_STREAM, on_stream, work_stream
from streams import Stream, put_engines_on_a_gpu, put_in_place_of_cupy
from tiny_onnx import stale_plan

if TYPE_CHECKING:
    import pytest

    from conftest import TinyModel
    from sd_engines import Bundle

ON_A_GPU = [stale_plan("fp32")]


def test_work_never_goes_to_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place_of_cupy(monkeypatch)
    own = work_stream(ON_A_GPU)
    assert isinstance(own, Stream)
    assert own.non_blocking
    assert own != work_stream(ON_A_GPU)
    with own:
        assert work_stream(ON_A_GPU) is own, "the caller's, where there is one"
    assert Stream.current().ptr == 0


def test_a_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place_of_cupy(monkeypatch)
    assert on_stream(0) is NO_STREAM
    with on_stream(0x5EED):
        assert Stream.current().ptr == 0x5EED


def test_no_stream_for_a_processor(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place_of_cupy(monkeypatch)
    assert work_stream(tiny_bundle.manifest.engines) is NO_STREAM


def test_no_stream_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place_of_cupy(monkeypatch, has_gpu=False)
    assert work_stream(ON_A_GPU) is NO_STREAM
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert work_stream(ON_A_GPU) is NO_STREAM


def test_a_steps_latents_are_complete_on_any_stream(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default stream, on which a caller reads them, does not wait for the pipeline's own."""
    put_in_place_of_cupy(monkeypatch)
    put_engines_on_a_gpu(monkeypatch)
    monkeypatch.setattr(Stream, "waited_for", 0)
    with Pipeline.load(tiny_model.bundle, backend="onnxruntime") as loaded:
        for step in loaded.stream(Request("a cat", num_inference_steps=3)):
            assert Stream.waited_for == step.index, "only who reads them waits"
            assert step.latents.shape[0] == 1
            assert Stream.waited_for == step.index + 1
