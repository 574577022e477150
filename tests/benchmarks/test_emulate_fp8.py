"""`benchmarks/emulate_fp8.py`: what a processor draws with rounded as TensorRT's fp8 rounds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from scripts import load_script
from sd_engines.bundle import open_bundle
from sd_runtime import Pipeline, Request

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_it_draws_nearly_the_same_picture(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "fp8.bundle"
    prompts.write_text("a large red circle on the left, on a white background\n")
    words = ["emulate_fp8.py", str(shapes_bundle), str(output), "--calibration-prompts"]
    monkeypatch.setattr(sys, "argv", [*words, str(prompts)])
    load_script("emulate_fp8").main()
    bundle = open_bundle(output)
    bundle.verify()
    unet, exact = (
        opened.manifest.components["unet"] for opened in (bundle, open_bundle(shapes_bundle))
    )
    assert unet.bytes < 0.4 * exact.bytes
    request = Request("a red circle", seed=5, num_inference_steps=3, guidance_scale=3)
    latents = []
    for path in (shapes_bundle, output):
        with Pipeline.load(path, backend="onnxruntime") as pipeline:
            latents.append(pipeline.generate(request).latents)
    difference = np.linalg.norm(latents[1] - latents[0]) / np.linalg.norm(latents[0])
    assert 1e-3 < difference < 0.2
