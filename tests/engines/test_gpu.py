"""What only an NVIDIA GPU can show of an engine: what it computes, launched whole or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines import open_bundle, open_engine
from sd_engines.engine import build_engine
from sd_engines.seal import add_engines
from tiny_onnx import PROFILE, has_gpu, unet_arrays, unet_reference

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision

LARGEST = {"fp32": 1e-5, "tf32": 5e-3}
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
