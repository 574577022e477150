"""ONNX Runtime's runs on a GPU, by stand-ins for its session and for CuPy."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sd_engines.backends import onnxruntime_binding
from sd_engines.backends.onnxruntime_binding import CudaBinding
from sd_engines.errors import BackendError
from streams import Array


class Gpu:
    """What of ``cupy.cuda`` is used, and what happens there in its order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.runtime = SimpleNamespace(streamEndCapture=self.end_capture)
        self.own, self.other = Stream(self, 7), Stream(self, 8)
        self.current = self.own

    def get_current_stream(self) -> Stream:
        return self.current

    def end_capture(self, stream: int) -> None:
        self.log.append(f"end capture on {stream}")
        raise RuntimeError("cudaErrorStreamCaptureInvalidated")


class Stream:
    def __init__(self, gpu: Gpu, ptr: int) -> None:
        self.gpu, self.ptr = gpu, ptr

    def record(self) -> int:
        return self.ptr

    def wait_event(self, event: int) -> None:
        self.gpu.log.append(f"{self.ptr} waits for {event}")

    def synchronize(self) -> None:
        self.gpu.log.append(f"wait for {self.ptr}")


class Session:
    """Runs; where it ``cannot_capture`` only without a CUDA graph."""

    def __init__(self, gpu: Gpu, *, cannot_capture: bool = False, fails: bool = False) -> None:
        self.gpu, self.cannot_capture, self.fails = gpu, cannot_capture, fails

    def io_binding(self) -> Any:
        return SimpleNamespace(bind_input=lambda *a: None, bind_output=lambda *a: None)

    def run_with_iobinding(self, io: object, options: dict[str, str]) -> None:
        graph = options["gpu_graph_id"]
        assert options["disable_synchronize_execution_providers"] == "1"
        if self.fails or (self.cannot_capture and graph != "-1"):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.gpu.log.append(f"run {graph}")


@pytest.fixture(autouse=True)
def _options_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_binding, "_run_options", dict)


def binding_of(session: Session) -> CudaBinding:
    array = np.zeros((1, 4), np.float32).view(Array)
    gpu = session.gpu
    return CudaBinding(session, {"x": array}, {"y": array}, stream=gpu.own, cuda=gpu, number=3)


def test_a_run_is_enqueued_under_its_number() -> None:
    gpu = Gpu()
    binding = binding_of(Session(gpu))
    binding.run()
    assert gpu.log == ["run 3"], "and nobody waits"
    binding.close()
    binding.close()
    assert gpu.log == ["run 3", "wait for 7"]
    with pytest.raises(BackendError, match="closed"):
        binding.run()


def test_work_of_another_stream_is_kept_in_order() -> None:
    """A session has one stream for good, and the caller may work on another."""
    gpu = Gpu()
    binding = binding_of(Session(gpu))
    gpu.current = gpu.other
    binding.run()
    assert gpu.log == ["7 waits for 8", "run 3", "8 waits for 7"]


def test_what_cannot_be_captured_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()
    binding = binding_of(Session(gpu, cannot_capture=True))
    with caplog.at_level(logging.WARNING):
        binding.run()
        binding.run()
    assert gpu.log == ["end capture on 7", "run -1", "run -1"]
    assert ["not captured any more" in record.message for record in caplog.records] == [True]


def test_what_fails_for_good_says_so() -> None:
    gpu = Gpu()
    binding = binding_of(Session(gpu, fails=True))
    for _ in range(2):
        with pytest.raises(BackendError, match="not permitted"):
            binding.run()
    assert gpu.log == ["end capture on 7"]
