"""What only an NVIDIA GPU can show of an engine: what it computes, launched whole or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines import open_bundle, open_engine
from sd_engines.bundle import add_engines
from sd_engines.engine import build_engine
from tiny_onnx import PROFILE, has_gpu, unet_arrays, unet_reference

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU"),
]


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx", "onnxruntime:cuda"])
def test_run(engine: str, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Again and again, a CUDA graph by then, with runs of other batches between."""
    backend, _, target = engine.partition(":")
    pytest.importorskip(backend.replace("-", "_"), reason=f"{backend} is not installed")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
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
        target=target or None,
    )
    add_engines(tiny_bundle.path, staging, engines=[entry])
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
                    np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-5)
