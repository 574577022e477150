"""What only an NVIDIA GPU can show of an engine: what it computes, launched whole or not."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines import open_bundle, open_engine
from sd_engines.backends.cuda import Replay, named_stream
from sd_engines.engine import build_engine
from sd_engines.seal import add_engines
from sd_runtime.work_stream import CallersStream
from tiny_onnx import PROFILE, has_gpu, unet_arrays, unet_reference

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision

LARGEST = {"fp32": 1e-5, "tf32": 5e-3}
UNCAPTURED = ("cannot be captured", "not captured any more", "not graph capturable")
"""What is logged, by us or by TensorRT-RTX, where runs are not launched as one graph."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU"),
]


@pytest.fixture(params=["fp32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Precision:
    found: Precision = request.param
    return found


@pytest.fixture(params=["tensorrt", "tensorrt-rtx", "onnxruntime:cuda"])
def entry(
    request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path: Path, precision: Precision
) -> EngineEntry:
    """A UNet's engine for a GPU, added to ``tiny_bundle``."""
    backend, _, target = request.param.partition(":")
    package = pytest.importorskip(backend.replace("-", "_"), reason=f"{backend} is not installed")
    if target == "cuda" and "CUDAExecutionProvider" not in package.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    unet = tiny_bundle.manifest.components["unet"]
    staging = tmp_path / "staging"
    staging.mkdir()
    entry = build_engine(
        backend,
        tiny_bundle.path / unet.file,
        output_dir=staging,
        component="unet",
        entry=unet,
        profile=PROFILE,
        precision=precision,
        target=target or None,
    )
    add_engines(tiny_bundle.path, staging, engines=[entry])
    return entry


def test_run(entry: EngineEntry, tiny_bundle: Bundle) -> None:
    """Again and again, a CUDA graph by then, with runs of other batches between."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    with open_engine(open_bundle(tiny_bundle.path), "unet", prefer=entry) as opened:
        assert opened.entry == entry
        for batch in (1, 2, 4, 2):
            binding = opened.bind(batch)
            for seed in range(3):
                arrays = unet_arrays(batch, seed=seed)
                for name, array in arrays.items():
                    binding.inputs[name][...] = cupy.asarray(array)
                binding.run()
                for found in (binding.outputs, opened(**arrays)):
                    result = cupy.asnumpy(found["noise_pred"])
                    reference = unet_reference(**arrays)
                    off = np.linalg.norm(result - reference) / np.linalg.norm(reference)
                    assert off < LARGEST[entry.precision]


def test_closing_gives_memory_back(entry: EngineEntry, tiny_bundle: Bundle) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    free = []
    for _ in range(4):
        with open_engine(open_bundle(tiny_bundle.path), "unet", prefer=entry) as opened:
            opened.bind(4).run()
            opened(**unet_arrays(2))
        cupy.cuda.Device().synchronize()
        free.append(cupy.cuda.runtime.memGetInfo()[0])
    assert free[-1] >= free[0] - (1 << 20), "what the first one leaves is the libraries' own"


def test_runs_are_launched_as_one_graph(
    entry: EngineEntry, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.DEBUG),
        open_engine(open_bundle(tiny_bundle.path), "unet", prefer=entry) as opened,
    ):
        binding = opened.bind(2)
        for _ in range(4):
            binding.run()
    assert not [words for words in UNCAPTURED if words in caplog.text]


def test_work_is_captured_while_another_thread_allocates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CuPy alone stands for the engine, as it can wherever there is a GPU."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    numbers = cupy.zeros(1 << 20, "float32")

    def add_one(stream: int) -> None:
        with cupy.cuda.Stream.from_external(CallersStream(stream)):
            cupy.add(numbers, np.float32(1), out=numbers)

    done = threading.Event()

    def allocate() -> None:
        while not done.is_set():
            cupy.cuda.runtime.free(cupy.cuda.runtime.malloc(1 << 20))
            cupy.cuda.runtime.freeHost(cupy.cuda.runtime.hostAlloc(1 << 20, 0))

    other = threading.Thread(target=allocate)
    other.start()
    try:
        for index in range(20):
            replay = Replay(add_one, cupy.cuda)
            for _ in range(3):
                replay.run(named_stream(cupy.cuda))
            assert (cupy.asnumpy(numbers) == 3 * (index + 1)).all()
    finally:
        done.set()
        other.join()
    assert not [words for words in UNCAPTURED if words in caplog.text]
