"""What only an NVIDIA GPU can show of a pipeline: pictures that stay there, a caller's stream."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_export.cli import main
from sd_runtime import Request
from sd_runtime.embed.context import Context
from sd_runtime.table import compile_table
from sd_runtime.update import Update
from tiny_onnx import has_gpu

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU"),
]


@pytest.mark.parametrize("engine", ["tensorrt-rtx", "onnxruntime:cuda"])
def test_pictures_stay_on_the_device(engine: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy")
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_model.bundle, bundle)
    backend, _, target = engine.partition(":")
    package = pytest.importorskip(backend.replace("-", "_"), reason=f"{backend} is not installed")
    if target == "cuda" and "CUDAExecutionProvider" not in package.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    options = ["--target", target] if target else []
    assert main(["build", str(bundle), "--backend", backend, *options]) == 0
    request = Request("a cat", seed=1, num_inference_steps=3, scheduler="euler_a")
    stream = cupy.cuda.Stream(non_blocking=True)
    with Context(
        str(bundle), backend=backend, threads=None, queue_size=1, cuda_stream=stream.ptr
    ) as context:
        ticket = context.submit(request, previews=1, on_progress=lambda _: None)
        result = ticket.result.result()
    assert isinstance(result.device_pixels, cupy.ndarray)
    shared = cupy.asnumpy(cupy.from_dlpack(result.device_pixels))
    np.testing.assert_array_equal(shared, result.pixels)
    expected = tiny_model.pipeline.generate(request).pixels
    assert np.abs(result.pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler_a"])
def test_rows_there_are_those_of_numpy(scheduler: str) -> None:
    cupy = pytest.importorskip("cupy")
    table = compile_table(CONFIG, scheduler=scheduler, num_inference_steps=20)
    draw = np.random.default_rng(0)
    sample = draw.standard_normal((2, 4, 8, 8)).astype(np.float32)
    there = cupy.asarray(sample)
    here, on_device = (Update(array, table, known=None) for array in (sample, there))
    for row in range(table.num_rows):
        output, noise = draw.standard_normal((2, *sample.shape)).astype(np.float32)
        drawn = noise if table.draws_noise[row] else None
        here.apply(row, output, noise=drawn)
        on_device.apply(row, cupy.asarray(output), noise=drawn)
        np.testing.assert_allclose(cupy.asnumpy(there), sample, rtol=1e-5, atol=1e-5)
