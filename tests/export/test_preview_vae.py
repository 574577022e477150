"""A tiny decoder in a bundle: it makes the pictures on the way, and only those."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sd_engines.errors import ConfigError, ExportError
from sd_export.export import export
from sd_runtime import Pipeline, Request
from tiny import make_tiny_vae

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = Request("a cat", seed=3, num_inference_steps=3, guidance_scale=3, scheduler="euler")


def test_previews_are_the_tiny_decoders_and_pictures_the_vaes(
    tiny_vae: Path, bundle_of_two_vaes: Path
) -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(tiny_vae)
    with Pipeline.load(bundle_of_two_vaes, threads=1) as pipeline:
        certificate = pipeline.bundle.manifest.certificate
        assert any(entry.component == "preview_decoder" for entry in certificate)
        assert "preview_decoder" not in pipeline.engines, "it is opened for the first preview"
        own = pipeline.generate(REQUEST)
        for step in pipeline.stream(REQUEST):
            preview = step.preview()
        # After the last step of Euler the latents are what is predicted.
        with torch.inference_mode():
            decoded = vae.decode(torch.from_numpy(np.array(step.latents))).sample
        expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
        np.testing.assert_allclose(preview, expected, atol=1)
        assert step.result is not None
        np.testing.assert_array_equal(step.result.pixels, own.pixels)
    assert np.abs(preview.astype(int) - own.pixels).max() > 10


def test_the_bundle_records_where_it_is_from(tiny_vae: Path, bundle_of_two_vaes: Path) -> None:
    record = json.loads((bundle_of_two_vaes / "export.json").read_text())
    assert record["preview_vae"] == {"source": str(tiny_vae), "revision": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_channels": 3}, "3 channels of latents"),
        ({"levels": 2}, "2 pixels a latent"),
    ],
)
def test_one_of_other_latents_is_refused(
    smallest: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = make_tiny_vae(tmp_path / "taesd", **options)
    with pytest.raises(ExportError, match=message):
        export(smallest, tmp_path / "bundle", preview_vae=str(model))
    assert not (tmp_path / "bundle").exists()


def test_what_is_no_tiny_vae_is_refused(smallest: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not an AutoencoderTiny"):
        export(smallest, tmp_path / "bundle", preview_vae=str(smallest / "vae"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        export(smallest, tmp_path / "bundle", preview_vae="./missing")
