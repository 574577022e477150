"""LDM3D checkpoints: what their bundles hold, and what is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ldm3d import make_ldm3d_checkpoint
from sd_engines.errors import ConfigError, ExportError
from sd_engines.spec import Defaults
from sd_export import export
from sd_export.source import find_checkpoint
from tiny import SMALLEST, make_smallest_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_the_bundle_paints_depth_and_is_proven(tmp_path: Path) -> None:
    checkpoint = make_ldm3d_checkpoint(tmp_path / "ldm3d", channels=6, **SMALLEST)
    manifest = export(checkpoint, tmp_path / "bundle", backends=("openvino",)).manifest
    assert manifest.model.defaults == Defaults(num_inference_steps=49, guidance_scale=5.0)
    assert "vae_encoder" not in manifest.components
    images, depth = manifest.components["vae_decoder"].outputs
    assert (images.name, images.shape) == ("images", ("batch", 8, 8, 3))
    assert (depth.name, depth.shape) == ("depth", ("batch", 8, 8, 3))
    (proof,) = (entry for entry in manifest.certificate if entry.component == "end_to_end")
    assert proof.metric == "pixels_within_1"
    assert proof.figure >= 0.999


@pytest.mark.parametrize(
    ("pipeline", "channels"),
    [("StableDiffusionPipeline", 4), ("StableDiffusionLDM3DPipeline", 5)],
)
def test_other_channels_of_pictures_are_refused(
    tmp_path: Path, pipeline: str, channels: int
) -> None:
    folder = make_smallest_checkpoint(tmp_path / "checkpoint")
    for name, changes in (
        ("model_index.json", {"_class_name": pipeline}),
        ("vae/config.json", {"out_channels": channels}),
    ):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
    with pytest.raises(ExportError, match=f"its VAE paints {channels} channels for {pipeline}"):
        find_checkpoint(str(folder))


def test_what_does_not_go_with_depth_is_refused_by_name(smallest: Path, tmp_path: Path) -> None:
    checkpoint = make_ldm3d_checkpoint(tmp_path / "ldm3d", channels=4, **SMALLEST)
    with pytest.raises(ExportError, match=r"it has 3 channels of pictures, .* own 4"):
        export(checkpoint, tmp_path / "bundle", vae=str(smallest))
    with pytest.raises(ConfigError, match="--controlnet with an LDM3D"):
        export(checkpoint, tmp_path / "bundle", controlnets=["some/controlnet"])
    assert not (tmp_path / "bundle").exists()
