"""Bundles that begin from a picture are refused by every instrument, before it measures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sd_bench.cli import main
from sd_engines.seal import seal
from sd_engines.spec import TensorSpec
from tiny_onnx import CHANNELS, SIZE, make_manifest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def inpainting(tmp_path: Path) -> Path:
    """A bundle whose UNet is fed a mask, as its manifest says."""
    manifest = make_manifest(tmp_path / "staging")
    unet = manifest.components["unet"]
    fed = tuple(
        TensorSpec(name, "float32", ("batch", channels, SIZE, SIZE))
        for name, channels in (("mask", 1), ("masked_image_latents", CHANNELS))
    )
    unet = replace(unet, inputs=(*unet.inputs, *fed))
    bundle = tmp_path / "bundle"
    seal(tmp_path / "staging", bundle, replace(manifest, components={"unet": unet}))
    return bundle


@pytest.mark.parametrize(
    "command",
    [
        ["latency", "BUNDLE", "--output", "LATENCY.json"],
        ["scaling", "BUNDLE"],
        ["gate", "BUNDLE", "BUNDLE"],
        ["peers", "BUNDLE"],
        ["parity", "BUNDLE"],
        ["quality", "BUNDLE"],
        ["serve", "BUNDLE"],
    ],
    ids=lambda command: command[0],
)
def test_a_bundle_that_takes_a_picture_is_not_measured(
    inpainting: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BUNDLE": str(inpainting), "LATENCY.json": str(tmp_path / "latency.json")}
    assert main([places.get(word, word) for word in command]) == 2
    words = capsys.readouterr().err
    assert "sd-bench draws from text alone" in words
    assert "is for inpainting" in words
    assert "--image" not in words
    assert not (tmp_path / "latency.json").exists()
